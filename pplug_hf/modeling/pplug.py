"""A frozen language model with a persona plug: equations (5) and (6), as a transformers model.

The plug alone is built by `__init__`; backbone and encoders are attached afterwards and never saved.

Letters: B batch, N items of one user, T text length, P prefix length, D encoder width, H backbone width,
K persona tokens.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.utils import ModelOutput

from ..configuration import PPlugConfig
from ..configuration.pplug import choices as known_choices
from ..errors import ConfigurationError, MismatchError
from ..storage.location import HUB_ARGUMENTS
from . import backbone as backbones
from . import backbone_check, encoders, frozen, plug_folder
from .encoders import Query
from .forward import read_causal, read_encoder_decoder
from .frozen_backbone import FrozenBackboneModel
from .new_plug import new_config
from .persona import Personas
from .personalizer import Personalizer, histories_of, prompt_queries
from .plug import SoftPrompt
from .plugs import LoadedPlug, Plugs, soft_prompts_by_name
from .prefix import Inserted, checked_ids, generate_with_prefix, inferred_mask, insert, word_embeddings
from .prompt_cache import NOT_CACHED, AnyPromptCache, PromptCache
from .saving import SavingMixin, drop_frozen, ignore_missing_frozen
from .strength import Strength, checked_strength
from .substitution import reading_ids
from .weight_sample import weight_digests


class PPlugForConditionalGeneration(  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    SavingMixin, FrozenBackboneModel
):
    """Any frozen seq2seq or causal language model, personalised by a plug (Liu et al., ACL 2025).

    Create one with [`from_backbone`], load one with [`from_pretrained`]. `model.backbone` is the frozen model and
    stays usable alone (its dropout rates are zero from then on); `model.plug` is everything that is trained.

    Several plugs can share the backbone, which is in memory once:

        model = PPlugModel.from_pretrained("me/movie-tags")                # this one is called "default"
        model.load_plug("me/headlines", "headlines")
        model.set_plug("headlines")                                         # from now on
        model.generate(**inputs, persona=history, plug="default")           # for one call
        model.generate(**inputs, persona=histories, plug=["default", "headlines", None])  # row by row; None: no plug

    The active plug is what the attributes show (`plug`, `config`, `history_encoder`, `generation_config`), what is
    trained and what is saved. The others wait outside of the module tree, so no optimiser, checkpoint or
    `parameters()` sees them. A call that names a plug computes with it; nothing is swapped meanwhile.

    Args:
        config: a complete [`PPlugConfig`]. The constructor builds the plug only; see [`attach`].
    """

    config_class = PPlugConfig
    base_model_prefix = "plug"
    accepts_loss_kwargs = True  # the loss divides by num_items_in_batch itself

    def __init__(self, config: PPlugConfig):
        super().__init__(config)
        self.prompt_cache: PromptCache | None = None
        self._plugs = Plugs(LoadedPlug(Personalizer(config)))
        self._show()
        self.register_state_dict_post_hook(drop_frozen)
        self.register_load_state_dict_post_hook(ignore_missing_frozen)
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        encoder: str | SentenceTransformer,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        check_backbone: bool = True,
        chat: bool | str = "auto",
        system: str | None = None,
        query_marker: str = "",
        query_end: str = "",
        **choices: Any,
    ) -> PPlugForConditionalGeneration:
        """Create a new plug on a frozen language model.

        Args:
            backbone: Hub id, local folder, path of a GGUF file, or a loaded seq2seq or causal model.
            encoder: Hub id, local folder, or a loaded `SentenceTransformer`.
            tokenizer: the backbone's; default: the one saved with the backbone.
            backbone_kwargs: for the backbone's `from_pretrained` (dtype, device_map, quantization_config,
                gguf_file, ...), unless it is loaded.
            encoder_kwargs: for `SentenceTransformer` (revision, device, model_kwargs, ...), unless it is loaded.
            check_backbone: find out on a few tokens how the backbone takes a soft prompt, and refuse it at once if it cannot.
                Without it, soft prompts and words go in as `inputs_embeds`.
            chat: write prompts as a user's turn of the tokenizer's chat template: "auto" (if it has one), "always" or "never".
                Kept with the plug, so that every processor of it does what training did.
            system: system text of these chats (default: what the template does without one).
            query_marker, query_end: texts of a prompt between which its query stands, as of a [`Task`] (default: all of it is
                the query). Kept with the plug, too: a prompt that comes without a query has the one of training.
            **choices: fields of [`PPlugConfig`], e.g. `num_persona_tokens=4`. Prompts default to the encoder's own
                ("query" for requests, "document" for history items).

        Returns:
            The model in eval mode, its plug freshly drawn and in fp32.

        Raises:
            ConfigurationError: an unknown choice, arguments for something that is loaded already, or not a language model
                that can take a soft prompt.
            MissingFileError: backbone or encoder cannot be found.
        """
        if unknown := set(choices) - set(known_choices()):
            raise ConfigurationError(
                f"Unknown option {', '.join(sorted(unknown))}; options are {', '.join(known_choices())}. How the backbone is "
                "loaded (dtype, device_map, revision, ...) goes into backbone_kwargs={...}, and how the encoder is, into "
                "encoder_kwargs={...}."
            )
        backbone = backbones.load_backbone(backbone, **(backbone_kwargs or {}))
        if check_backbone:
            backbone_check.check_backbone(backbone)
        encoder = encoders.load_encoder(encoder, **(encoder_kwargs or {}))
        if backbones.checked_tokenizer(tokenizer) is None:
            tokenizer = backbones.find_tokenizer(backbone, **(backbone_kwargs or {}))
        written = {"system": system, "query_marker": query_marker, "query_end": query_end}
        model = cls(new_config(backbone, encoder, tokenizer, chat, written | choices))
        model._put_on(backbone, encoder, tokenizer, check_backbone)
        return model.eval()

    def attach(
        self,
        backbone: PreTrainedModel,
        encoder: SentenceTransformer,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Put the plug on its frozen backbone and encoder, on the backbone's device.

        Args:
            backbone: the language model, which is frozen here.
            encoder: the sentence encoder, which is frozen here; a copy of it becomes the input encoder.
            tokenizer: the backbone's; without it every request needs a `query`.

        Raises:
            MismatchError: one of them is not the one the plug was made for; the message names both.
        """
        backbone, encoder = backbones.load_backbone(backbone), encoders.load_encoder(encoder)
        frozen.check_fits(self.config, "backbone", backbones.fingerprint(backbone))
        frozen.check_fits(self.config, "encoder", encoders.fingerprint(encoder, self.config.history_prompt))
        backbones.checked_tokenizer(tokenizer)
        frozen.note_other_weights(self.config, weight_digests(backbone))
        self._put_on(backbone, encoder, tokenizer)

    def _put_on(
        self,
        backbone: PreTrainedModel,
        encoder: SentenceTransformer,
        tokenizer: PreTrainedTokenizerBase | None,
        check: bool = True,
    ) -> None:
        self._freeze(backbone, check)
        personalizer = self.personalizer
        personalizer.attach(encoder, word_embeddings(backbone).weight.device)
        settings = copy.deepcopy(backbone.generation_config)
        self._plugs.loaded[self._plugs.active] = LoadedPlug(personalizer, tokenizer, settings)
        self._show()

    def _show(self) -> None:
        """Let the attributes show the active plug."""
        personalizer, self.tokenizer, self.generation_config = self._plugs[self.active_plug]
        self.config, self.plug = personalizer.config, personalizer.plug
        self.history_encoder = personalizer.history_encoder

    def train(self, mode: bool = True) -> PPlugForConditionalGeneration:
        """Switch the mode. The history encoder never leaves eval mode; the backbone has no dropout left to switch on."""
        super().train(mode)
        if mode and self.history_encoder is not None:
            self.history_encoder.eval()
        return self

    @property
    def active_plug(self) -> str:
        """The name of the plug that answers unless a call names another."""
        return self._plugs.active

    @property
    def personalizer(self) -> Personalizer:
        """The active plug with its encoder, which needs no backbone."""
        return self._plugs.loaded[self._plugs.active].personalizer

    @property
    def personalizers(self) -> dict[str, Personalizer]:
        """Every loaded plug with its encoder, by name."""
        return {name: loaded.personalizer for name, loaded in self._plugs.loaded.items()}

    @property
    def plugs(self) -> dict[str, PPlugConfig]:
        """The configuration of every loaded plug, by name."""
        return {name: personalizer.config for name, personalizer in self.personalizers.items()}

    def load_plug(self, pretrained_model_name_or_path: str | os.PathLike, name: str, **kwargs: Any) -> None:
        """Load one more plug. It becomes active with [`set_plug`].

        Args:
            pretrained_model_name_or_path: plug folder or Hub id, made for this model's backbone.
            name: what to call it.
            **kwargs: as of `from_pretrained`: revision, subfolder, token, encoder, ... A sentence encoder that another
                plug has loaded already is shared, unless there are `encoder_kwargs`.

        Raises:
            ConfigurationError: the name is taken or not a text, or the model has no backbone yet.
            MismatchError: the plug was made for another backbone or encoder.
            MissingFileError, DataError: as `from_pretrained`.
        """
        backbone = self._attached()
        self._plugs.check_new(name, kwargs)
        # Opened once: configuration and weights are of one commit.
        where = {argument: kwargs.pop(argument) for argument in HUB_ARGUMENTS if argument in kwargs}
        location = plug_folder.open_location(pretrained_model_name_or_path, **where)
        if kwargs.get("encoder") is None and not kwargs.get("encoder_kwargs"):
            kwargs["encoder"] = self._plugs.encoder_of(plug_folder.load_config(location))
        model = type(self).from_pretrained(location, backbone=backbone, **kwargs)  # type: ignore[arg-type]
        model.personalizer.train(self.training)
        self._plugs.loaded[name] = model._current()

    def set_plug(self, name: str) -> None:
        """Make a loaded plug the one that answers, trains and is saved.

        Args:
            name: one of `plugs`.

        Raises:
            ConfigurationError: no plug of that name is loaded.
        """
        personalizer = self._personalizer(name)
        self._plugs.loaded[self._plugs.active], self._plugs.active = self._current(), name
        self._show()
        personalizer.train(self.training)

    def delete_plug(self, name: str) -> None:
        """Detach a plug and free its memory. The backbone stays; the last plug cannot go.

        Args:
            name: one of `plugs`.

        Raises:
            ConfigurationError: no such plug, or it is the active one.
        """
        self._plugs.remove(name)

    def _current(self) -> LoadedPlug:
        """Return the active plug with the tokenizer and the settings that it has now."""
        return LoadedPlug(self.personalizer, self.tokenizer, self.generation_config)

    def _loaded(self, name: str) -> LoadedPlug:
        """Return a plug by its name."""
        return self._current() if name == self.active_plug else self._plugs[name]

    def _asked(self, plug: str | Sequence[str | None]) -> LoadedPlug:
        """Return the plug that all rows name which name one, as far as it is loaded; else the active plug."""
        names = {plug} if isinstance(plug, str) else set(plug) - {None}
        name = names.pop() if len(names) == 1 else None
        return self._loaded(name if name is not None and name in self._plugs.loaded else self.active_plug)

    def _personalizer(self, name: str | None) -> Personalizer:
        """Return the plug of that name, or the active one, on the backbone's device."""
        if not name or name == self._plugs.active:
            return self._plugs.loaded[self._plugs.active].personalizer
        return self._plugs[name].personalizer.to(word_embeddings(self._attached()).weight.device)

    def encode_persona(self, history: Personas, batch_size: int = 32, show_progress: bool = False) -> Any:
        """Encode a history once (equation 1), to use it many times. See [`Personalizer.encode`]."""
        return self.personalizer.encode(history, batch_size, show_progress)

    def persona_weights(self, persona: Personas, query: Query | None = None) -> Tensor:
        """Equation (3): the weight of each item, [B, N]. See [`Personalizer.weights`]."""
        return self.personalizer.weights(persona, query)

    def persona_embedding(
        self, persona: Personas, query: Query | None = None, strength: Strength | None = None
    ) -> Tensor:
        """Equation (4): the personal embedding [B, K, H]. See [`Personalizer.embedding`]."""
        return self.personalizer.embedding(persona, query, strength)

    def soft_prompt(self, persona: Personas, query: Query | None = None, strength: Strength | None = None) -> Tensor:
        """Equation (5): [I ; P], [B, 1 + K, H], for any engine that takes embeddings. See [`Personalizer.soft_prompt`]."""
        return self.personalizer.soft_prompt(persona, query, strength)

    def _soft_prompts(
        self,
        plug: Any,
        persona: Personas,
        query: Query | None,
        strength: Strength | None,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor | None,
    ) -> SoftPrompt:
        """Return the soft prompts [B, P, H] of a batch whose rows may have plugs of their own.

        Args:
            plug: None for the active plug, a name for all rows, or a name or None (no plug) per row.
            persona, query, strength: as in `forward`.
            ids, labels: of the prompts, whose texts hold a query that is not given.
            mask: [B, T], ones at the tokens of these texts.
        """
        B, names, personalizer = len(ids), None, None
        if isinstance(plug, list | tuple):
            names = plug
        else:
            personalizer = self._personalizer(plug)
        users = [None] * B if persona is None else histories_of(persona)
        texts = [query] if isinstance(query, str) else query
        for what, values in (("plugs", names), ("personas", users)):
            if values is not None and len(values) != B:
                raise MismatchError(
                    f"Got {len(values)} {what} for {B} prompts: pass one per prompt (for one user and many prompts, "
                    "[history] * len(prompts))."
                )
        if personalizer is not None:
            answers = None if self.config.is_encoder_decoder else labels  # a causal model's input also holds them
            if query is None:
                texts = partial(prompt_queries, personalizer, self.tokenizer, ids, mask, answers)
            return personalizer(users, texts, strength)
        assert names is not None
        if texts is not None and len(texts) != B:
            raise MismatchError(f"Got {len(texts)} queries for {B} prompts: pass one per prompt.")
        given = users, texts, checked_strength(strength, B), ids, mask, labels
        device = word_embeddings(self.backbone).weight.device
        return soft_prompts_by_name(names, self._soft_prompts, given, self.config.sizes[2], device)

    def _insert(
        self,
        ids: object,
        mask: Tensor | None,
        plug: str | Sequence[str | None] | None,
        persona: Personas,
        query: Query | None,
        query_mask: Tensor | None,
        strength: Strength | None,
        position: Tensor | None,
        labels: Tensor | None = None,
    ) -> Inserted:
        """Return the batch with the soft prompts of its rows."""
        backbone = self._attached() if self.backbone is None else self.backbone
        ids = checked_ids(ids, mask, labels, aligned=not self.config.is_encoder_decoder)
        mask = torch.ones_like(ids) if mask is None else mask.long()
        if query_mask is not None and query_mask.shape != ids.shape:
            raise MismatchError(
                f"query_mask must be of input_ids' shape, {list(ids.shape)}, got {list(query_mask.shape)}."
            )
        asked = mask if query_mask is None else mask * query_mask.to(mask)
        soft_prompt = self._soft_prompts(plug, persona, query, strength, ids, asked, labels)
        where = {"labels": labels, "position": position, "reading": self._reading, "limit": self._position_limit}
        return insert(backbone, soft_prompt, ids, mask, **where)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        persona: Personas = None,
        query: Query | None = None,
        persona_position: Tensor | None = None,
        plug: str | Sequence[str | None] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        persona_strength: Strength | None = None,
        query_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Seq2SeqLMOutput:
        """Compute logits, and the loss of equation (6) if there are labels.

        Args:
            input_ids: [B, T] prompts; for a causal model in training, prompts followed by answers.
            attention_mask: [B, T], ones at real tokens; padding may be on either side.
            labels: [B, L] answers (encoder-decoder) or [B, T] (causal), -100 where there is nothing to predict.
            persona: one history, [`Persona`] or None per row. None is a user without history.
            query: one per row, which weights the history: texts, or vectors [B, D]. Default: the query in the prompt, or in
                what `query_mask` shows of it.
            persona_position: [B], number of prompt tokens in front of the prefix. Default: what the plug's placement says.
            plug: name of the loaded plug to use, or one name per row, None for a row without any plug. Default: the
                active plug.
            num_items_in_batch: divide the summed loss by this (the Trainer gives it) instead of by the number of
                labels here.
            persona_strength: one for all rows or one per row: 0 answers as for a user without history, 1 (the default) as
                trained, more than 1 exaggerates the user. P_a = P_0 + a (P - P_0).
            query_mask: [B, T], ones at the part of each prompt that stands in for its query: of a chat, the user's text.
            **kwargs: for the backbone's forward.

        Returns:
            The backbone's output; the logits of a causal model are [B, T, V], and those of a token predict the next one,
            also where the soft prompt stands between the two. In training, with labels and gradients, or with a prompt
            cache, a causal model computes no more logits than its loss needs: [B, L, V], from the first position of the
            batch that predicts a label to the last.
        """
        self._attached()
        who = plug, persona, query, query_mask, persona_strength, persona_position
        inserted = self._insert(input_ids, attention_mask, *who, labels)
        if self.training:
            kwargs.setdefault("use_cache", False)
        cache = None if labels is None else self._usable(self.prompt_cache, plug, kwargs)
        batch = self.backbone, inserted, labels, num_items_in_batch, cache, kwargs
        return read_encoder_decoder(*batch) if self.config.is_encoder_decoder else read_causal(*batch, self.training)

    def check_prompt_cache(self, plug: str | Sequence[str | None] | None = None) -> None:
        """Refuse a prompt cache for a plug with another placement than "answer".

        Args:
            plug: as in `forward`.

        Raises:
            ConfigurationError: names the plug.
        """
        names = [plug or self.active_plug] if plug is None or isinstance(plug, str) else plug
        for name in names:
            if name is not None and self._personalizer(name).config.placement != "answer":
                raise ConfigurationError(
                    f"The soft prompt of the plug {name!r} stands in front of the prompt, so all of the prompt depends on the "
                    "persona and a prompt cache has nothing to keep: leave prompt_cache out, or make a plug with "
                    "placement='answer'."
                )

    def _usable(
        self, cache: AnyPromptCache | None, plug: str | Sequence[str | None] | None, options: Mapping[str, object]
    ) -> AnyPromptCache | None:
        """Return a prompt cache, unless a call's options ask for what it does not have."""
        if cache is not None:
            self.check_prompt_cache(plug)
        return None if any(map(options.get, NOT_CACHED)) else cache

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        persona: Personas = None,
        query: Query | None = None,
        query_mask: Tensor | None = None,
        persona_strength: Strength | None = None,
        persona_position: Tensor | None = None,
        plug: str | Sequence[str | None] | None = None,
        generation_config: GenerationConfig | None = None,
        prompt_cache: AnyPromptCache | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Answer prompts, each for its user. Arguments and results are those of the backbone's generate.

        Args:
            input_ids: [B, T] prompts, padded on either side.
            attention_mask: [B, T]. Default: as in transformers, padding is where the pad token is, unless that is EOS, too.
            persona, query, query_mask, persona_strength, persona_position, plug: as in `forward`.
            generation_config: default: the plug's own, or the active plug's if rows name several.
            prompt_cache: with `placement="answer"`, take what is in front of the soft prompts from here: the states of a prompt
                are the same for every user, and those of a conversation go on in its next turn. Answers are the same
                as without. Default: `model.prompt_cache`.
            labels: ignored; the Trainer passes its whole batch.
            **kwargs: any argument of `generate`: max_new_tokens, num_beams, do_sample, streamer, ...

        Returns:
            [B * num_return_sequences, length] token ids, or a `ModelOutput`. Causal models: prompt and new tokens.
        """
        backbone = self._attached() if self.backbone is None else self.backbone
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        own = self.generation_config if plug is None else self._asked(plug).generation_config
        settings = copy.deepcopy(generation_config or own)
        if generation_config is not None:
            settings.update(**own.to_dict(), defaults_only=True)  # completes a partial one
        if attention_mask is None and isinstance(input_ids, Tensor):
            attention_mask = inferred_mask(input_ids, {**settings.to_dict(), **kwargs})
        who = plug, persona, query, query_mask, persona_strength, persona_position
        inserted = self._insert(input_ids, attention_mask, *who)
        cache = self.prompt_cache if prompt_cache is None else prompt_cache
        if cache is not None:
            cache = self._usable(cache, plug, {**settings.to_dict(), **kwargs})
        known = None if cache is None else cache.of_batch(backbone, inserted)
        batch = inserted.embeddings, inserted.mask, inserted.input_ids, inserted.text_mask
        ids = None if known and self.config.is_encoder_decoder else inserted.ids
        with nullcontext() if ids is None else reading_ids(backbone, ids):
            return generate_with_prefix(
                backbone, *batch, settings, kwargs, self._position_limit, inserted.behind, known
            )
