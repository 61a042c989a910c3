"""A frozen language model with a persona plug: equations (5) and (6), as a transformers model.

The plug alone is built by `__init__`; backbone and encoders are attached afterwards and never saved. That order
matters: transformers initialises, casts and moves what a constructor builds, and would corrupt loaded parts
without a word.

Letters: B batch, N items of one user, T text length, P prefix length, D encoder width, H backbone width,
K persona tokens.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.utils import ModelOutput

from ..configuration import PPlugConfig
from ..configuration.pplug import choices as known_choices
from ..errors import ConfigurationError, DataError, MismatchError
from ..storage.location import HUB_ARGUMENTS, local_files
from . import backbone as backbones
from . import backbone_check, encoders, frozen, plug_folder
from .device import checked_device
from .encoders import History
from .persona import Persona
from .personalizer import Personalizer, histories_of
from .plug import SoftPrompt
from .prefix import (
    Inserted,
    Known,
    Reading,
    cache_argument,
    encode,
    generate_with_prefix,
    insert,
    position_ids,
    position_limit,
    reorder,
    word_embeddings,
)
from .prompt_cache import PromptCache
from .saving import SavingMixin, drop_frozen, ignore_missing_frozen
from .substitution import reading_ids
from .weight_sample import weight_digests

_NOT_CACHED = ("output_attentions", "output_hidden_states", "cache_implementation", "past_key_values", "cache")

DEFAULT = "default"  # the name of a model's first plug, as PEFT calls its first adapter


class _Loaded(NamedTuple):
    """A plug with its own tokenizer and generation settings; all plugs share the backbone."""

    personalizer: Personalizer
    tokenizer: Any = None
    generation_config: Any = None


class PPlugForConditionalGeneration(  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    SavingMixin, PreTrainedModel, GenerationMixin
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
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the loss below divides by num_items_in_batch itself
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the choice is the backbone's

    def __init__(self, config: PPlugConfig):
        super().__init__(config)
        self.loss_type = None  # transformers would pick one by the class name
        self.backbone: Any = None  # a PreTrainedModel, once attached
        self._reading = Reading()  # the way in which the backbone takes soft prompts
        self._position_limit: int | None = None  # of the backbone
        self.prompt_cache: PromptCache | None = None
        self.active_plug = DEFAULT  # name of the plug that answers unless a call names another
        self._loaded = {DEFAULT: _Loaded(Personalizer(config))}  # by name, in the order of loading
        self._show()
        self.register_state_dict_post_hook(drop_frozen)
        self.register_load_state_dict_post_hook(ignore_missing_frozen)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave all weights alone: the plug initialises its own, and attached modules are trained already."""

    # ---- creating, attaching -------------------------------------------------------------------------------

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
        **choices: Any,
    ) -> PPlugForConditionalGeneration:
        """Create a new plug on a frozen language model.

        Args:
            backbone: Hub id, local folder, path of a GGUF file, or a loaded seq2seq or causal model.
            encoder: Hub id, local folder, or a loaded `SentenceTransformer`.
            tokenizer: the backbone's; default: the one saved with the backbone.
            backbone_kwargs: for the backbone's `from_pretrained` (dtype, device_map, quantization_config,
                gguf_file, ...).
            encoder_kwargs: for `SentenceTransformer` (revision, device, model_kwargs, ...).
            check_backbone: find out on a few tokens how the backbone takes a soft prompt, and refuse it at once if it cannot.
                Without it, soft prompts and words go in as `inputs_embeds`.
            chat: write prompts as a user's turn of the tokenizer's chat template: "auto" (if it has one), "always" or "never".
                Kept with the plug, so that every processor of it does what training did.
            system: system text of these chats (default: what the template does without one).
            **choices: fields of [`PPlugConfig`], e.g. `num_persona_tokens=4`. Prompts default to the encoder's own
                ("query" for requests, "document" for history items).

        Returns:
            The model in eval mode, its plug freshly drawn and in fp32.

        Raises:
            ConfigurationError: an unknown choice, or not a language model that can take a soft prompt.
            MissingFileError: backbone or encoder cannot be found.
        """
        if unknown := set(choices) - set(known_choices()):
            raise ConfigurationError(f"Unknown option {sorted(unknown)}; options are {', '.join(known_choices())}.")
        backbone = backbones.load_backbone(backbone, **(backbone_kwargs or {}))
        digests = weight_digests(backbone)
        if check_backbone:
            backbone_check.check_backbone(backbone)
        encoder = encoders.load_encoder(encoder, **(encoder_kwargs or {}))
        if backbones.checked_tokenizer(tokenizer) is None:
            tokenizer = backbones.find_tokenizer(backbone, **(backbone_kwargs or {}))
        chat = backbones.writes_chats(tokenizer, chat)
        choices.setdefault("query_prompt", encoder.prompts.get("query") or "")
        choices.setdefault("history_prompt", encoder.prompts.get("document") or "")
        (backbone_name, backbone_commit), (encoder_name, encoder_commit) = (
            backbones.origin(backbone),
            encoders.origin(encoder),
        )
        at_states = backbone.config.is_encoder_decoder and choices.get("placement", PPlugConfig.placement) == "answer"
        norm = backbones.state_norm if at_states else backbones.embedding_norm
        frozen.note_changed_backbone(backbone_name, local_files(backbone_name, backbone_commit), backbone)
        config = PPlugConfig(
            backbone=plug_folder.absolute_if_local(backbone_name),
            backbone_revision=backbone_commit,
            backbone_fingerprint={**backbones.fingerprint(backbone), **digests},
            encoder=plug_folder.absolute_if_local(encoder_name),
            encoder_revision=encoder_commit,
            encoder_fingerprint=encoders.fingerprint(encoder, choices["history_prompt"]),
            is_encoder_decoder=bool(backbone.config.is_encoder_decoder),
            hidden_size=backbones.hidden_size(backbone),
            encoder_size=encoders.encoder_size(encoder),
            embedding_norm=norm(backbone, len(tokenizer) if tokenizer is not None else None),
            chat=chat,
            system=system,
            **choices,
        )
        model = cls(config)
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
        backbone: Any,
        encoder: SentenceTransformer,
        tokenizer: PreTrainedTokenizerBase | None,
        check: bool = True,
    ) -> None:
        if check:
            self._reading = backbone_check.check_backbone(backbone)
        else:
            backbones.freeze_backbone(backbone)
        self.backbone, self._position_limit = backbone, position_limit(backbone)
        personalizer = self.personalizer
        personalizer.attach(encoder, word_embeddings(backbone).weight.device)
        self._loaded[self.active_plug] = _Loaded(personalizer, tokenizer, copy.deepcopy(backbone.generation_config))
        self._show()

    def _show(self) -> None:
        """Let the attributes show the active plug."""
        personalizer, self.tokenizer, self.generation_config = self._loaded[self.active_plug]
        self.config, self.plug = personalizer.config, personalizer.plug
        self.history_encoder = personalizer.history_encoder

    def _attached(self) -> Any:
        """Return the backbone."""
        if self.backbone is None:
            raise ConfigurationError(
                "This plug has no backbone yet: use PPlugForConditionalGeneration.from_backbone or "
                "PPlugModel.from_pretrained, or call model.attach(backbone, encoder)."
            )
        return self.backbone

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the plug and the backbone in place, each as one graph. Texts are tokenised and encoded outside of them.

        Args:
            *args: as of `torch.compile`.
            **kwargs: likewise.

        Raises:
            ConfigurationError: the model has no backbone yet.
        """
        backbone = self._attached()
        self.plug.compile(*args, **kwargs)
        backbone.compile(*args, **kwargs)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Choose the backbone's attention. The encoders keep theirs: they compute in a dtype of their own.

        Args:
            *args: as of the backbone's: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...
            **kwargs: likewise.

        Raises:
            ConfigurationError: the model has no backbone yet.
        """
        self._attached().set_attn_implementation(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        """Return the backbone's input embeddings, which some tools expect of any model; None before there is a backbone."""
        return None if self.backbone is None else self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the backbone's output layer; None before there is a backbone."""
        return None if self.backbone is None else self.backbone.get_output_embeddings()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the weights that are tied in the backbone, and no others.

        transformers would go by the configuration, which says "tied" for FlanT5 although the checkpoint is not, and would
        overwrite the output layer.

        Args:
            missing_keys: ignored, no weights of the backbone are loaded here.
            recompute_mapping: likewise.
        """
        if self.backbone is not None:
            self.backbone.tie_weights(recompute_mapping=False)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Return the backbone's input embeddings; another size is refused, for a plug fits one vocabulary.

        Args:
            new_num_tokens, pad_to_multiple_of: None.
            mean_resizing: ignored.

        Raises:
            ConfigurationError: a size is given.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        raise ConfigurationError(
            f"A plug fits the vocabulary that its backbone had when it was made, got new_num_tokens={new_num_tokens}, "
            f"pad_to_multiple_of={pad_to_multiple_of}: resize and save the backbone alone, then make a new plug on it "
            "with PPlugForConditionalGeneration.from_backbone."
        )

    # ---- training ------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Move the model, as in every model of transformers.

        Raises:
            ConfigurationError: a device that is not there, or no device.
        """
        try:
            return super().to(*args, **kwargs)
        except (AssertionError, RuntimeError):  # a torch without CUDA; a name that it does not recognise
            device = kwargs.get("device", args[0] if args else None)
            if isinstance(device, str | torch.device):
                checked_device(device)
            raise

    def cuda(self, device: int | torch.device | None = None) -> Any:  # type: ignore[override]
        """Move the model to a GPU. Errors as in `to`."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def train(self, mode: bool = True) -> PPlugForConditionalGeneration:
        """Switch the mode. The history encoder never leaves eval mode; the backbone has no dropout left to switch on."""
        super().train(mode)
        if mode and self.history_encoder is not None:
            self.history_encoder.eval()
        return self

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters in one line, as PEFT does."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # ---- several plugs -------------------------------------------------------------------------------------

    @property
    def personalizer(self) -> Personalizer:
        """The active plug with its encoder, which needs no backbone."""
        return self._loaded[self.active_plug].personalizer

    @property
    def personalizers(self) -> dict[str, Personalizer]:
        """Every loaded plug with its encoder, by name."""
        return {name: loaded.personalizer for name, loaded in self._loaded.items()}

    @property
    def plugs(self) -> dict[str, PPlugConfig]:
        """The configuration of every loaded plug, by name."""
        return {name: loaded.personalizer.config for name, loaded in self._loaded.items()}

    def load_plug(self, pretrained_model_name_or_path: str | os.PathLike, name: str, **kwargs: Any) -> None:
        """Load one more plug. It becomes active with [`set_plug`].

        Args:
            pretrained_model_name_or_path: plug folder or Hub id, made for this model's backbone.
            name: what to call it.
            **kwargs: as of `from_pretrained`: revision, subfolder, token, encoder, ... A sentence encoder that another
                plug has loaded already is shared.

        Raises:
            ConfigurationError: the name is taken or not a text, or the model has no backbone yet.
            MismatchError: the plug was made for another backbone or encoder.
            MissingFileError, DataError: as `from_pretrained`.
        """
        backbone = self._attached()
        if not isinstance(name, str) or not name or name in self._loaded:
            raise ConfigurationError(
                f"A new plug needs a name that is not taken, got {name!r}; taken are {', '.join(self._loaded)}. Choose "
                "another, or delete_plug first."
            )
        if "backbone" in kwargs:
            raise ConfigurationError(
                "load_plug puts a plug on the backbone that is there: leave backbone= out, or load the plug with "
                "PPlugModel.from_pretrained."
            )
        # Opened once: configuration and weights are of one commit.
        where = {argument: kwargs.pop(argument) for argument in HUB_ARGUMENTS if argument in kwargs}
        location = plug_folder.open_location(pretrained_model_name_or_path, **where)
        if kwargs.get("encoder") is None:
            digest = (plug_folder.load_config(location).encoder_fingerprint or {}).get("digest")
            shared = (p.history_encoder for p in self.personalizers.values() if digest and p.spec.digest == digest)
            kwargs["encoder"] = next(shared, None)
        model: Any = type(self).from_pretrained(location, backbone=backbone, **kwargs)  # type: ignore[arg-type]
        loaded = model._loaded[model.active_plug]
        loaded.personalizer.train(self.training)
        self._loaded[name] = loaded._replace(generation_config=model.generation_config)

    def set_plug(self, name: str) -> None:
        """Make a loaded plug the one that answers, trains and is saved.

        Args:
            name: one of `plugs`.

        Raises:
            ConfigurationError: no plug of that name is loaded.
        """
        personalizer = self._personalizer(name)
        mine = _Loaded(self.personalizer, self.tokenizer, self.generation_config)  # as they are now
        self._loaded[self.active_plug], self.active_plug = mine, name
        self._show()
        personalizer.train(self.training)

    def delete_plug(self, name: str) -> None:
        """Detach a plug and free its memory. The backbone stays; the last plug cannot go.

        Args:
            name: one of `plugs`.

        Raises:
            ConfigurationError: no such plug, or it is the active one.
        """
        self._personalizer(name)
        if name == self.active_plug:
            others = [other for other in self._loaded if other != name]
            raise ConfigurationError(
                f"The plug {name!r} is active: call set_plug first, with one of {', '.join(others)}."
                if others
                else f"{name!r} is the only plug; the backbone alone is model.backbone."
            )
        del self._loaded[name]

    def _personalizer(self, name: str) -> Personalizer:
        """Return the plug of that name, on the backbone's device."""
        if name not in self._loaded:
            raise ConfigurationError(
                f"There is no plug {name!r}; loaded are {', '.join(self._loaded)}. Load it with "
                f"model.load_plug(<folder or Hub id>, {name!r})."
            )
        personalizer = self._loaded[name].personalizer
        return (
            personalizer
            if name == self.active_plug
            else personalizer.to(word_embeddings(self._attached()).weight.device)
        )

    # ---- personas ------------------------------------------------------------------------------------------

    def encode_persona(
        self, history: History | Persona | Sequence[Any], batch_size: int = 32, show_progress: bool = False
    ) -> Any:
        """Encode a history once (equation 1), to use it many times. See [`Personalizer.encode`]."""
        return self.personalizer.encode(history, batch_size, show_progress)

    def persona_weights(self, persona: Any, query: Any = None) -> Tensor:
        """Equation (3): the weight of each item, [B, N]. See [`Personalizer.weights`]."""
        return self.personalizer.weights(persona, query)

    def persona_embedding(self, persona: Any, query: Any = None) -> Tensor:
        """Equation (4): the personal embedding [B, K, H]. See [`Personalizer.embedding`]."""
        return self.personalizer.embedding(persona, query)

    def soft_prompt(self, persona: Any, query: Any = None) -> Tensor:
        """Equation (5): [I ; P], [B, 1 + K, H], for any engine that takes embeddings. See [`Personalizer.soft_prompt`]."""
        return self.personalizer.soft_prompt(persona, query)

    def _soft_prompts(self, plug: Any, persona: Any, query: Any, ids: Tensor, mask: Tensor, labels: Any) -> SoftPrompt:
        """Return the soft prompts [B, P, H] of a batch whose rows may have plugs of their own.

        Args:
            plug: None for the active plug, a name for all rows, or a name or None (no plug) per row.
            persona, query: as in `forward`.
            ids, mask, labels: of the prompts, whose texts stand in for a query that is not given.
        """
        B = len(ids)
        names: Any = plug if isinstance(plug, list | tuple) else None
        personalizer: Any = None if isinstance(plug, list | tuple) else self._personalizer(plug or self.active_plug)
        users = [None] * B if persona is None else histories_of(persona)
        texts = [query] if isinstance(query, str) else query
        for what, values in (("plugs", names), ("personas", users)):
            if values is not None and len(values) != B:
                raise MismatchError(
                    f"Got {len(values)} {what} for {B} prompts: pass one per prompt (for one user and many prompts, "
                    "[history] * len(prompts))."
                )
        if personalizer is not None:
            texts = partial(self._prompt_texts, ids, mask, labels) if query is None else texts
            return personalizer(users, texts)
        if texts is not None and len(texts) != B:
            raise MismatchError(f"Got {len(texts)} queries for {B} prompts: pass one per prompt.")

        found: list[tuple[list[int], SoftPrompt]] = []
        for name in dict.fromkeys(name for name in names if name is not None):
            rows = [i for i, other in enumerate(names) if other == name]
            own = texts[rows] if isinstance(texts, Tensor) else None if texts is None else [texts[i] for i in rows]
            of_rows = ids[rows], mask[rows], None if labels is None else labels[rows]
            found.append((rows, self._soft_prompts(name, [users[i] for i in rows], own, *of_rows)))
        P = max((part.mask.shape[1] for _, part in found), default=0)
        embeddings = torch.zeros(B, P, self.config.sizes[2], device=word_embeddings(self.backbone).weight.device)
        shown, at_answer = mask.new_zeros(B, P), mask.new_zeros(B).bool()
        for rows, part in found:
            embeddings[rows, : part.mask.shape[1]] = part.embeddings
            shown[rows, : part.mask.shape[1]] = part.mask
            at_answer[rows] = part.at_answer
        return SoftPrompt(embeddings, shown, at_answer)

    def _prompt_texts(self, ids: Tensor, mask: Tensor, labels: Tensor | None) -> list[str]:
        """Return the prompts of a batch as texts, to stand in for the queries."""
        if self.tokenizer is None:
            raise ConfigurationError(
                "query= is missing, and without the backbone's tokenizer the prompt cannot be decoded to take its "
                "place: pass query=<text>, or set model.tokenizer."
            )
        keep = mask.bool()
        if labels is not None and not self.config.is_encoder_decoder:
            keep = keep & (labels == -100)  # a causal model's input also holds the answer
        return [self.tokenizer.decode(row[k], skip_special_tokens=True) for row, k in zip(ids, keep, strict=True)]

    # ---- forward, generate ---------------------------------------------------------------------------------

    def _insert(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        persona: Any,
        query: Any,
        position: Any,
        plug: Any,
        labels: Any,
    ) -> Inserted:
        """Return the batch with the soft prompts of its rows."""
        backbone = self._attached() if self.backbone is None else self.backbone
        _check_batch(input_ids, attention_mask, labels, aligned=not self.config.is_encoder_decoder)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        soft_prompt = self._soft_prompts(plug, persona, query, input_ids, mask, labels)
        where = {"labels": labels, "position": position, "reading": self._reading, "limit": self._position_limit}
        return insert(backbone, soft_prompt, input_ids, mask, **where)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        persona: Any = None,
        query: Any = None,
        persona_position: Tensor | None = None,
        plug: str | Sequence[str | None] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Seq2SeqLMOutput:
        """Compute logits, and the loss of equation (6) if there are labels.

        Args:
            input_ids: [B, T] prompts; for a causal model in training, prompts followed by answers.
            attention_mask: [B, T], ones at real tokens; padding may be on either side.
            labels: [B, L] answers (encoder-decoder) or [B, T] (causal), -100 where there is nothing to predict.
            persona: one history, [`Persona`] or None per row. None is a user without history.
            query: one per row, which weights the history: texts, or vectors [B, D]. Default: the prompt.
            persona_position: [B], number of prompt tokens in front of the prefix. Default: what the plug's placement says.
            plug: name of the loaded plug to use, or one name per row, None for a row without any plug. Default: the
                active plug.
            num_items_in_batch: divide the summed loss by this (the Trainer gives it) instead of by the number of
                labels here.
            **kwargs: for the backbone's forward.

        Returns:
            The backbone's output; the logits of a causal model are [B, T, V], and those of a token predict the next one,
            also where the soft prompt stands between the two. In training, with labels and gradients, or with a prompt
            cache, a causal model computes no more logits than its loss needs: [B, L, V], from the first position of the
            batch that predicts a label to the last.
        """
        self._attached()
        inserted = self._insert(input_ids, attention_mask, persona, query, persona_position, plug, labels)
        if self.training:
            kwargs.setdefault("use_cache", False)
        read = self._read_encoder_decoder if self.config.is_encoder_decoder else self._read_causal
        return read(inserted, labels, num_items_in_batch, plug, kwargs)

    def _read_encoder_decoder(
        self, inserted: Inserted, labels: Tensor | None, num_items: Any, plug: Any, options: dict[str, Any]
    ) -> Any:
        """Return the output of an encoder-decoder backbone for a batch."""
        backbone, mask, ids = self.backbone, inserted.mask, inserted.ids
        if labels is not None and options.get("decoder_input_ids") is None:
            if shift := getattr(backbone, "prepare_decoder_input_ids_from_labels", None):
                options["decoder_input_ids"] = shift(labels=labels)
            else:  # M2M100: it shifts the labels itself, and its loss is not used
                options["labels"] = labels.contiguous()
        cache = self.prompt_cache if labels is not None else None
        known = self._known(cache, plug, inserted, options) if cache is not None else None
        with nullcontext() if ids is None or known else reading_ids(backbone, ids):
            read: dict[str, Any] = {"inputs_embeds": inserted.embeddings}
            if inserted.behind is not None or known is not None:
                encoded, mask = encode(backbone, inserted.embeddings, mask, inserted.behind, options, known)
                read = {"encoder_outputs": encoded}
            output = backbone(**read, attention_mask=mask, **options)
        if labels is not None:
            output["loss"] = _token_loss(output.logits, labels, num_items)
        return output

    def _read_causal(
        self, inserted: Inserted, labels: Tensor | None, num_items: Any, plug: Any, options: dict[str, Any]
    ) -> Any:
        """Return the output of a causal backbone for a batch."""
        backbone, embeds, mask, ids = self.backbone, inserted.embeddings, inserted.mask, inserted.ids
        targets, first, end = None, 0, embeds.shape[1]
        if labels is not None:
            P = embeds.shape[1] - labels.shape[1]
            targets = reorder(inserted.order, labels.new_full((len(labels), P), -100), labels)
            targets = targets[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # nothing stands in front of a first token
            targets = F.pad(targets, (0, 1), value=-100)  # [B, P + T], what each position has to predict
            if labelled := (targets != -100).any(dim=0).nonzero().flatten().tolist():
                first, end = labelled[0], labelled[-1] + 1
        learning = targets is not None and self.training and torch.is_grad_enabled()
        if learning:
            # Padding is in front, so answers end together: what follows them is in no loss, and only the L = end - first
            # positions between the first label and the last need logits, the widest layer.
            embeds, mask, ids = embeds[:, :end].contiguous(), mask[:, :end], None if ids is None else ids[:, :end]
            if "logits_to_keep" in inspect.signature(backbone.forward).parameters:
                options["logits_to_keep"] = end - first
        start = 0  # of what is read here, behind what a cache has of all rows
        cache = self.prompt_cache if labels is not None else None
        known = self._known(cache, plug, inserted, options, first) if cache is not None else None
        if known is not None:
            start = known.mask.shape[1]
            options |= {cache_argument(backbone): known.states, "use_cache": True}
        options["position_ids"] = position_ids(mask)[:, start:]
        with nullcontext() if ids is None else reading_ids(backbone, ids):
            output = backbone(inputs_embeds=embeds[:, start:], attention_mask=mask, **options)
        if targets is not None:
            logits = output.logits[:, : end - start][:, first - end :]  # [B, L, V]
            output["loss"] = _token_loss(logits, targets[:, first:end], num_items)
            if learning or start:
                output["logits"] = logits
                return output
        places = inserted.next_token[..., None]  # [B, T, 1]
        output["logits"] = output.logits.gather(1, places.expand(-1, -1, output.logits.shape[-1]))
        return output

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

    def _known(
        self,
        cache: PromptCache,
        plug: Any,
        inserted: Inserted,
        options: dict[str, Any],
        needed: int | None = None,
    ) -> Known | None:
        """Return the states of what a cache can have read of a batch, if there is anything.

        Args:
            cache: to take them from.
            plug: as in `forward`.
            inserted: the batch.
            options: of the call. Some ask for what a cache does not have.
            needed: as of `PromptCache.of_batch`.
        """
        self.check_prompt_cache(plug)
        asks_for_more = any(options.get(name) for name in _NOT_CACHED)
        return None if asks_for_more else cache.of_batch(self.backbone, inserted, needed)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Any = None,
        *,
        attention_mask: Tensor | None = None,
        persona: Any = None,
        query: Any = None,
        persona_position: Tensor | None = None,
        plug: str | Sequence[str | None] | None = None,
        generation_config: GenerationConfig | None = None,
        prompt_cache: PromptCache | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Answer prompts, each for its user. Arguments and results are those of the backbone's generate.

        Args:
            input_ids: [B, T] prompts, padded on either side.
            attention_mask: [B, T].
            persona, query, persona_position, plug: as in `forward`.
            generation_config: default `model.generation_config`.
            prompt_cache: with `placement="answer"`, take what is in front of the soft prompts from here: the states of a prompt
                are the same for every user, and those of a conversation go on in its next turn. Answers are the same
                as without. Default: `model.prompt_cache`.
            labels: ignored; the Trainer passes its whole batch.
            **kwargs: any argument of `generate`: max_new_tokens, num_beams, do_sample, streamer, ...

        Returns:
            [B * num_return_sequences, length] token ids, or a `ModelOutput`. Causal models: prompt and new tokens.
        """
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        inserted = self._insert(input_ids, attention_mask, persona, query, persona_position, plug, None)
        settings = copy.deepcopy(generation_config or self.generation_config)
        if generation_config is not None:
            settings.update(**self.generation_config.to_dict(), defaults_only=True)  # completes a partial one
        cache = self.prompt_cache if prompt_cache is None else prompt_cache
        known = self._known(cache, plug, inserted, {**settings.to_dict(), **kwargs}) if cache is not None else None
        batch = inserted.embeddings, inserted.mask, input_ids, inserted.text_mask
        ids = None if known and self.config.is_encoder_decoder else inserted.ids
        with nullcontext() if ids is None else reading_ids(self.backbone, ids):
            return generate_with_prefix(
                self.backbone, *batch, settings, kwargs, self._position_limit, inserted.behind, known
            )

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the log-probability of each token that `generate` chose: the backbone's method, with its arguments.

        Args:
            *args: `sequences`, `scores`, `beam_indices`, `normalize_logits` of an output of `generate`.
            **kwargs: likewise.

        Raises:
            ConfigurationError: the model has no backbone yet.
        """
        return self._attached().compute_transition_scores(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching, which takes ids alone.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "Continuous batching takes ids alone and would not see a persona: use model.generate, with one persona per "
            "prompt, or an engine that takes prompt embeddings and model.soft_prompt."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


class PPlugModel:
    """The class to load a plug with: `PPlugModel.from_pretrained(plug)` gives a model that is ready to generate."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise ConfigurationError(
            "PPlugModel is loaded with PPlugModel.from_pretrained(plug); to create a plug use "
            "PPlugForConditionalGeneration.from_backbone(backbone, encoder=...)."
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PPlugForConditionalGeneration:
        """Load a plug, see [`PPlugForConditionalGeneration.from_pretrained`]."""
        return PPlugForConditionalGeneration.from_pretrained(*args, **kwargs)


def _token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Equation (6): summed next-token NLL over the number of answer tokens (of the whole accumulated batch)."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def _check_batch(input_ids: Any, attention_mask: Any, labels: Any, aligned: bool) -> None:
    """Refuse what is not a batch of token ids with a mask of its shape, and labels that it has no rows or places for."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = type(input_ids).__name__
        if isinstance(input_ids, Tensor):
            got = f"{list(input_ids.shape)} of {input_ids.dtype}"
        raise DataError(
            f"input_ids must be [batch, tokens], got {got}: pass a processor's batch as **batch, and texts "
            "through the processor."
        )
    shape = list(input_ids.shape)
    if attention_mask is not None and list(attention_mask.shape) != shape:
        raise DataError(f"attention_mask must be {shape}, as input_ids are, got {list(attention_mask.shape)}.")
    if labels is not None and aligned and list(labels.shape) != shape:
        raise DataError(
            f"labels must be {shape}, as input_ids are, got {list(labels.shape)}: a causal backbone is given prompt and "
            "answer as one row, with -100 where there is nothing to learn; processor(..., labels=answers) makes both."
        )
    if labels is not None and (labels.ndim != 2 or len(labels) != len(input_ids)):
        raise DataError(f"labels must be [{len(input_ids)}, tokens], got {list(labels.shape)}: one answer per prompt.")
