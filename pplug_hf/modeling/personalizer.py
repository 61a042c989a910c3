"""Histories and queries to soft prompts, without a language model: equations (1) to (5) end to end.

    personalizer = Personalizer.from_pretrained("me/movie-tags")     # the plug and its encoder; no backbone is loaded
    persona = personalizer.encode(history)                           # once
    S = personalizer.soft_prompt(persona, query="...")               # [1, 1 + K, H], for any engine that takes embeddings

Letters: B batch, N items of one user, D encoder width, H backbone width, K persona tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from typing import Any, TypeGuard

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from ..configuration import PPlugConfig
from ..configuration.queries import query_of
from ..errors import ConfigurationError, DataError, MismatchError, kind_of
from ..storage.location import HubArguments, Location
from . import encoders, frozen, plug_folder
from .device import checked_device
from .encoders import Query, check_finite, item_texts
from .persona import EncoderSpec, Persona, PersonaLike, Personas, check_spec, item_facts
from .plug import PersonaPlug, SoftPrompt, batch_histories
from .plug_batched import Group
from .projection_cache import get_or_compute
from .strength import Strength, checked_strength


class Personalizer(nn.Module):
    """A plug with its sentence encoder: everything of a personalised model but the language model.

    Load one with [`from_pretrained`].

    Args:
        config: a complete [`PPlugConfig`].
    """

    def __init__(self, config: PPlugConfig):
        super().__init__()
        self.config = config
        self.plug = PersonaPlug(config)
        self.history_encoder: Any = None  # a frozen SentenceTransformer, once attached

    # ---- loading -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        encoder: str | SentenceTransformer | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        encode_only: bool = False,
        device: str | torch.device | None = None,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Personalizer:
        """Load a plug and its encoder, and no language model.

        Args:
            pretrained_model_name_or_path: plug folder or Hub id.
            encoder: a loaded encoder (or a folder or Hub id) to use instead of the recorded one; it must be the same.
            encoder_kwargs: for `SentenceTransformer` (device, model_kwargs, ...).
            encode_only: read no trained weights, for who shares vectors alone: then only `encode` works.
            device: of plug and encoder (default: the encoder's).
            revision, subfolder: of the plug.
            token, cache_dir, local_files_only, force_download: for both.

        Returns:
            The personalizer in eval mode, from the plug's files of one commit and the encoder at its recorded commit.

        Raises:
            MissingFileError: the plug or its encoder cannot be found.
            HubError: the Hub refuses, or fails.
            ConfigurationError: the plug's encoder is on no Hub and was not given.
            MismatchError: the encoder is not the one that the plug was trained with.
            DataError: the weights are damaged or do not fit the configuration.
        """
        where: HubArguments = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
        where |= {"local_files_only": local_files_only, "force_download": force_download}
        location = plug_folder.open_location(pretrained_model_name_or_path, **where)
        config = plug_folder.load_config(location)
        if not encode_only:
            plug_folder.check_sizes(plug_folder.weight_shapes(location), config, location.name)
        found = frozen.locate("encoder", encoder, config, location)
        loaded = encoders.load_encoder(found, **(encoder_kwargs or {}))
        frozen.check_fits(config, "encoder", encoders.fingerprint(loaded, config.history_prompt))
        with torch.device("meta") if encode_only else nullcontext():
            personalizer = cls(config)
        personalizer.attach(loaded, device)
        if not encode_only:
            personalizer.load_weights(location)
        return personalizer.eval()

    def attach(self, encoder: SentenceTransformer, device: str | torch.device | None = None) -> None:
        """Take in the frozen encoder, and a copy of it to train as the encoder of queries.

        Args:
            encoder: the sentence encoder that the plug is made for, which is frozen here.
            device: of both (default: the encoder's).
        """
        device = checked_device(device or encoder.device)
        encoders.freeze_encoder(encoder)
        self.history_encoder = encoder if encoder.device == device else encoder.to(device)
        if self.plug.no_persona.is_meta:
            return
        if self.config.train_input_encoder and self.plug.aggregator.needs_query:
            self.plug.input_encoder = encoders.trainable_copy(encoder)
        self.plug.to(device)

    def load_weights(self, location: Location) -> None:
        """Read the trained weights of a plug folder; those of the encoder's unused head stay as they are.

        Args:
            location: of the plug.

        Raises:
            MissingFileError: there are none.
            DataError: they are damaged or do not fit.
        """
        named = self.plug.state_dict(prefix="plug.").items()
        expected = {name: weight for name, weight in named if not encoders.is_unused(name)}
        weights = plug_folder.load_weights(location, expected=expected)
        self.plug.load_state_dict({name.removeprefix("plug."): w for name, w in weights.items()}, strict=False)

    def train(self, mode: bool = True) -> Personalizer:
        """Switch the plug's mode; the history encoder never leaves eval mode."""
        super().train(mode)
        if self.history_encoder is not None:
            self.history_encoder.eval()
        return self

    # ---- one call for a batch ------------------------------------------------------------------------------

    def forward(
        self,
        persona: Sequence[PersonaLike],
        query: Query | Callable[[], Sequence[str]] | None = None,
        strength: Strength | None = None,
    ) -> SoftPrompt:
        """Equation (5) for a batch, with gradients for what is trained.

        Args:
            persona: one history, [`Persona`] or None (a user without history) per row.
            query: one text per row or vectors [B, D]; or a function that gives the texts, which is called only if they
                are needed: not for an aggregator that ignores them, nor where nobody has a history.
            strength: of the personas, a number or one per row: P_a = P_0 + a (P - P_0), where P_0 is the embedding of users
                without history. 0 is nobody, 1 as trained (the default, bit for bit), more than 1 exaggerates.

        Returns:
            The soft prompt [B, 1 + K, H].

        Raises:
            DataError: something that is not a history, a query or a strength.
            MismatchError: a persona of another encoder, or not one query or strength per row.
        """
        if strength is not None:
            strength = checked_strength(strength, len(persona))
        items = self._items(persona, self.plug.no_persona)
        embeddings = self.plug(self._queries(query, items), self._batch(items), strength)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return SoftPrompt(embeddings, mask, mask.new_full((len(mask),), self.config.placement == "answer").bool())

    @torch.no_grad()
    def soft_prompt(self, persona: Personas, query: Query | None = None, strength: Strength | None = None) -> Tensor:
        """Equation (5): [I ; P], for any engine that takes prompt embeddings.

        Args:
            persona: a history, a [`Persona`], or a list of them.
            query: the query (text, list of texts, or vectors [B, D]).
            strength: of the personas, as in `forward`.

        Returns:
            [B, 1 + K, H] ([B, K, H] without an instruction), detached.
        """
        return self(histories_of(persona), query, strength).embeddings

    @torch.no_grad()
    def embedding(self, persona: Personas, query: Query | None = None, strength: Strength | None = None) -> Tensor:
        """Equation (4): the personal embedding [B, K, H]. See `soft_prompt` for the arguments."""
        items = self._items(histories_of(persona), self.plug.no_persona)
        strength = checked_strength(strength, len(items))
        return self.plug.persona_embedding(self._queries(query, items), self._batch(items), strength)

    @torch.no_grad()
    def weights(self, persona: Personas, query: Query | None = None) -> Tensor:
        """Equation (3): the weight of each item. See `soft_prompt` for the arguments.

        Returns:
            [B, N], padded with zeros behind the shorter histories. Rows sum to 1 (to 0 for an empty history).
        """
        items = self._items(histories_of(persona), self.plug.no_persona)
        weights = self.plug.weights(self._queries(query, items), self._batch(items))
        return torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)

    @property
    def spec(self) -> EncoderSpec:
        """The spec of the personas that this plug reads."""
        return EncoderSpec.of(self.config)

    def encode(self, history: Personas, batch_size: int = 32, show_progress: bool = False) -> Any:
        """Encode a history once (equation 1), to use it many times. Repeated texts are encoded once.

        Args:
            history: texts, or task items for `config.item_template`, oldest first; or a list of such histories.
            batch_size: texts per forward pass of the encoder.
            show_progress: show a progress bar.

        Returns:
            A [`Persona`] of [N, D] vectors, or a list of them for a list of histories. Ids and dates of items that all
            have one go with it.

        Raises:
            DataError: something in it is not a text.
            MismatchError: a finished persona of another encoder.
        """
        given = listed(history)
        histories = histories_of(given)
        encoded = self._items(histories, None, batch_size=batch_size, show_progress=show_progress)
        personas = [
            vectors
            if isinstance(vectors, Persona)
            else Persona(vectors, self.spec, *item_facts(items if isinstance(items, Iterable) else ()))
            for vectors, items in zip(encoded, histories, strict=True)
        ]
        return personas[0] if is_one_user(given) else personas

    # ---- the steps -----------------------------------------------------------------------------------------

    def _items(self, histories: Sequence[PersonaLike], like: Tensor | None, **options: Any) -> list[Persona | Tensor]:
        """Return the vectors [N, D] of every history, each distinct text encoded once; personas as they are.

        Rows that are given the same object share one result. Vectors come in the dtype and on the device of `like`, if
        it is given.
        """
        if self.history_encoder is None:
            raise ConfigurationError(
                "This plug has no sentence encoder yet: use Personalizer.from_pretrained or PPlugModel.from_pretrained, "
                "or attach one."
            )
        if like is not None and like.is_meta:
            raise ConfigurationError(
                "This personalizer was loaded with encode_only=True: load it without, to weight items."
            )
        if like is not None and self.plug.aggregator.needs_ages:  # which personas alone have
            return self.encode(list(histories))
        made: dict[int, Persona | Tensor] = {}
        texts: dict[int, list[str]] = {}
        flat: list[str] = []
        for history in histories:
            if isinstance(history, Persona):
                check_spec(history, self.spec)
                made[id(history)] = history
            elif id(history) not in texts:
                texts[id(history)] = item_texts(() if history is None else history, self.config.item_template)
                flat += texts[id(history)]
        if flat:
            vectors = encoders.embed(self.history_encoder, flat, self.config.history_prompt, **options)
            if not vectors.sum().isfinite():
                check_finite(vectors)
        else:
            vectors = torch.zeros(0, self.config.sizes[0])
        vectors = vectors if like is None else vectors.to(like)
        made.update(zip(texts, vectors.split(list(map(len, texts.values()))), strict=True))
        return list(map(made.__getitem__, map(id, histories)))

    def _queries(
        self, query: Query | Callable[[], Sequence[str]] | None, items: Sequence[Persona | Tensor]
    ) -> Tensor | None:
        """Equation (2): the queries' vectors [B, D], or None where nothing would look at them."""
        plug, B = self.plug, len(items)
        if not plug.aggregator.needs_query or not (plug.sync_query_encoder or any(map(len, items))):
            return None
        query = query() if callable(query) else query
        if query is None:
            raise ConfigurationError("query= is missing: the items are weighted by it. Pass query=<text>.")
        if isinstance(query, Tensor):
            if query.shape != (B, self.config.encoder_size):
                raise MismatchError(
                    f"query vectors must be [{B}, {self.config.encoder_size}], got {list(query.shape)}."
                )
            if not query.isfinite().all():
                raise DataError("query vectors hold NaN or infinity.")
            return query.to(plug.no_persona)
        if not isinstance(query, Iterable):
            raise DataError(f"query must be a text or a list of texts, one per prompt, got {kind_of(query)}.")
        query = [query] if isinstance(query, str) else list(query)
        if len(query) != B:
            raise MismatchError(f"Got {len(query)} queries for {B} prompts: pass one query per prompt.")
        for i, text in enumerate(query):
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"The query of row {i} is empty or not a text; the persona is weighted by it. Pass query=<what the "
                    "request is about>, one text per prompt."
                )
        if plug.input_encoder is None:
            vectors = encoders.embed(self.history_encoder, query, self.config.query_prompt, task="query")
        else:
            vectors = encoders.embed_with_gradient(plug.input_encoder, query, self.config.query_prompt)
        return vectors.to(plug.no_persona)

    def _batch(self, items: Sequence[Persona | Tensor]) -> Sequence[Group]:
        """Return histories as the plug takes them, with what is known of personas already."""
        known: Any = get_or_compute(self.plug, items) if Persona in set(map(type, items)) else (items,)
        return batch_histories(*known)


def listed(values: object) -> object:
    """Return an array, a Series, a column of a data set or a generator as a list; everything else as it is."""
    known = str | bytes | Mapping | Set | Persona | Tensor | list | tuple | None
    if isinstance(values, known) or not isinstance(values, Iterable):
        return values
    return values.tolist() if isinstance(values, np.ndarray) and values.dtype.kind in "OU" else list(values)


def is_one_user(persona: object) -> TypeGuard[PersonaLike]:
    """Return whether this is one history, Persona or None, not a list of them."""
    if persona is None or isinstance(persona, Persona):
        return True
    return isinstance(persona, list | tuple) and (not persona or isinstance(persona[0], str | Mapping))


def histories_of(persona: object) -> list[PersonaLike]:
    """Return what a user passes as `persona` as one history, Persona or None per row.

    Raises:
        DataError: neither a history nor a list of them.
    """
    if is_one_user(persona):
        return [persona]
    if is_one_user(persona := listed(persona)):
        return [persona]
    if not isinstance(persona, list | tuple):
        advice = "Wrap it: persona=[text]."
        if isinstance(persona, Mapping):
            advice = "Pass, of histories by user, the one of each prompt: persona=[histories[user], ...]."
        elif isinstance(persona, Tensor):
            advice = "Pass texts, or pass a Persona: Persona(vectors, model.personalizer.spec) wraps finished vectors."
        raise DataError(f"persona must be a list of texts, got a single {type(persona).__name__}. {advice}")
    histories: list[PersonaLike] = []
    for i, history in enumerate([listed(history) for history in persona]):
        if isinstance(history, Tensor) or not isinstance(history, Iterable | Persona | None):
            raise encoders.no_text(i, history)
        if isinstance(history, list | tuple) and history and not isinstance(history[0], str | Mapping):
            raise encoders.no_text(0, history[0])
        histories.append(history)
    return histories


def prompt_queries(
    personalizer: Personalizer, tokenizer: Any, ids: Tensor, mask: Tensor, labels: Tensor | None = None
) -> list[str]:
    """Return the queries in the prompts of a batch.

    Args:
        personalizer: of the plug, whose configuration says where they stand.
        tokenizer: of the backbone.
        ids, mask: [B, T] of the prompts.
        labels: [B, T], where answers follow them.
    """
    if tokenizer is None:
        raise ConfigurationError(
            "query= is missing, and without the backbone's tokenizer the prompt cannot be decoded to take its "
            "place: pass query=<text>, or set model.tokenizer."
        )
    keep = mask.bool() if labels is None else mask.bool() & (labels == -100)
    texts = [tokenizer.decode(row[k], skip_special_tokens=True) for row, k in zip(ids, keep, strict=True)]
    config = personalizer.config
    if not config.query_marker:
        return texts
    # A tokenizer may spell a text differently, as "book :".
    marks = (
        tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in (config.query_marker, config.query_end)
    )
    marker, end = (tokenizer.decode(mark, skip_special_tokens=True) for mark in marks)
    return [query_of(text, marker, end) for text in texts]
