"""From what a user passes (histories, personas, requests) to what the plug takes (vectors), and back out.

Letters: B batch, N items of one user, D encoder width, H backbone width, K persona tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, DataError, MismatchError
from . import encoders
from .aggregators import AGGREGATORS
from .encoding import encode, is_one_user, users_of
from .persona import History, Persona
from .plug import Group, PersonaPlug, batch_histories
from .projection_cache import get_or_compute


class PersonaMixin:
    """The persona methods of [`PPlugForConditionalGeneration`], which has what they need."""

    config: PPlugConfig
    plug: PersonaPlug
    history_encoder: Any
    tokenizer: Any
    _attached: Callable[[], tuple[Any, Any]]

    def encode_persona(
        self,
        history: History | Persona | Sequence[History | Persona],
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> Any:
        """Encode a history once (equation 1), to use it many times. Repeated texts are encoded once.

        Args:
            history: texts, or task items for `config.item_template`, oldest first; or a list of such histories.
            batch_size: texts per forward pass of the encoder.
            show_progress: show a progress bar.

        Returns:
            A [`Persona`] of [N, D] vectors, or a list of them for a list of histories.

        Raises:
            DataError: something in it is not a text.
        """
        _, encoder = self._attached()
        personas = encode(encoder, self.config, users_of(history), batch_size=batch_size, show_progress=show_progress)
        return personas[0] if is_one_user(history) else personas

    def _personas(self, persona: Any, batch_size: int) -> list[Persona]:
        """What a user passes as `persona` to one encoded persona per row; rows of one user share theirs."""
        persona = [None] * batch_size if persona is None else list(users_of(persona))
        if len(persona) != batch_size:
            raise MismatchError(
                f"Got {len(persona)} personas for {batch_size} prompts: pass a list with one history per prompt "
                "(for one user and many prompts, [history] * len(prompts))."
            )
        distinct = {id(user): user for user in persona}
        encoded = dict(zip(distinct, encode(self._attached()[1], self.config, list(distinct.values())), strict=True))
        return [encoded[id(user)] for user in persona]

    def _queries(
        self,
        query: Any,
        personas: Sequence[Persona],
        input_ids: Any,
        mask: Any,
        labels: Any,
    ) -> Any:
        """Equation (2): the requests' vectors [B, D], or None where nothing would look at them."""
        asks = self.plug.sync_query_encoder or any(map(len, personas))
        if not AGGREGATORS[self.config.aggregator].needs_query or not asks:
            return None
        if query is None:
            query = self._decode_queries(input_ids, mask, labels)
        if isinstance(query, Tensor):
            if query.shape != (len(personas), self.config.encoder_size):
                raise MismatchError(
                    f"query vectors must be [{len(personas)}, {self.config.encoder_size}], got {list(query.shape)}."
                )
            if not query.isfinite().all():
                raise DataError("query vectors hold NaN or infinity.")
            return query.to(self.plug.no_persona)
        query = [query] if isinstance(query, str) else list(query)
        if len(query) != len(personas):
            raise MismatchError(f"Got {len(query)} queries for {len(personas)} prompts: pass one query per prompt.")
        if empty := [i for i, text in enumerate(query) if not isinstance(text, str) or not text.strip()]:
            raise DataError(
                f"The query of row {empty[0]} is empty or no text; the persona is weighted by it. Pass query=<what the "
                "request is about>, one text per prompt."
            )
        if self.plug.input_encoder is None:
            vectors = encoders.embed(self._attached()[1], query, prompt=self.config.query_prompt)
        else:
            vectors = encoders.embed_with_gradient(self.plug.input_encoder, query, self.config.query_prompt)
        return vectors.to(self.plug.no_persona)

    def _decode_queries(self, input_ids: Any, mask: Any, labels: Any) -> Any:
        if self.tokenizer is None or input_ids is None:
            raise ConfigurationError(
                "query= is missing, and without the backbone's tokenizer the prompt cannot be decoded to take its "
                "place: pass query=<text>, or set model.tokenizer."
            )
        keep = mask.bool()
        if labels is not None and not self.config.is_encoder_decoder:
            keep = keep & (labels == -100)  # a causal model's input also holds the answer
        return [
            self.tokenizer.decode(ids[k], skip_special_tokens=True) for ids, k in zip(input_ids, keep, strict=True)
        ]

    @torch.no_grad()
    def persona_weights(self, persona: Any, query: Any = None) -> Tensor:
        """Equation (3): how much each item speaks.

        Args:
            persona: a history, a [`Persona`], or a list of them.
            query: the request (text, list of texts, or vectors [B, D]).

        Returns:
            [B, N], padded with zeros behind the shorter histories. Rows sum to 1 (to 0 for an empty history).
        """
        personas, queries = self._persona_inputs(persona, query)
        histories = [p.embeddings.to(self.plug.no_persona) for p in personas]
        return torch.nn.utils.rnn.pad_sequence(self.plug.weights(queries, histories), batch_first=True)

    @torch.no_grad()
    def persona_embedding(self, persona: Any, query: Any = None) -> Tensor:
        """Equation (4): the personal embedding [B, K, H]. See `persona_weights` for the arguments."""
        personas, queries = self._persona_inputs(persona, query)
        return self.plug.persona_embedding(queries, self._groups(personas))

    @torch.no_grad()
    def soft_prompt(self, persona: Any, query: Any = None) -> Tensor:
        """Equation (5): [I ; P], [B, 1 + K, H], for any engine that takes prompt embeddings. See `persona_weights` for the
        arguments."""
        personas, queries = self._persona_inputs(persona, query)
        return self.plug(queries, self._groups(personas))

    def _persona_inputs(self, persona: Any, query: Any) -> tuple[list[Persona], Any]:
        personas = self._personas(persona, len(users_of(persona)))
        return personas, self._queries(query, personas, None, None, None)

    def _groups(self, personas: Sequence[Persona]) -> Sequence[Group]:
        """Personas as the plug takes them, with what is known of them already."""
        return batch_histories(*get_or_compute(self.plug, personas))
