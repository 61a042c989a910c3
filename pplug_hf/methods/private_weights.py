"""Weights of one user at a time on a frozen language model: LoRA by `peft`, or a soft prompt.

    with Lora(language_model, processor, LoraShape()) as weights:
        weights.reset(seed)                          # as fresh as for the first user
        train(weights, ...)                          # pair_training.py
        state = weights.state()                      # to keep
        weights.load(state)                          # to answer: one user after the other
        weights.generate(...)
    # the language model is what it was, to the bit

B batch, T tokens, L answer tokens, V vocabulary, r rank.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import ConfigurationError, MismatchError
from ..modeling.prefix import cache_argument, position_ids
from ..modeling.prompt_states import CausalStates, EncoderStates, find_states
from ..optional import require
from ..processing import PPlugProcessor
from .decoding import Answers, ModelInputs
from .resources import Resources

Modules = Literal["qkv", "qv"]
ADAPTER = "user"  # name of the one adapter in memory
WORTH_SHARING = 16  # tokens; a second pass through all layers costs more than it saves below

# Names of the layers for queries, keys and values, in the order in which they are looked for; of GPT-2 they are one layer.
_LAYERS = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("query", "key", "value"))
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """Shape of a LoRA: W becomes W + alpha / r * B A, with A [r, in] drawn at random and B [out, r] zero at first.

    Args:
        rank: r.
        alpha: as above.
        dropout: of the input of A, in training.
        modules: layers that have one: those for queries, keys and values, or without keys.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    modules: Modules = "qkv"


class PrivateWeights(ABC):
    """Trainable weights on a frozen language model, within a `with` block; after it the language model is as before."""

    file: ClassVar[str]  # of the weights, in a user's folder

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *error: object) -> None: ...

    @abstractmethod
    def reset(self, seed: int, start: Mapping[str, Tensor] | None = None) -> None:
        """Give the weights the values from which training starts; nothing of an earlier user is left.

        Args:
            seed: of what is random.
            start: values to start from instead.
        """

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return a copy of the weights, by name, on the CPU."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights.

        Raises:
            MismatchError: names or shapes are other ones.
        """

    @abstractmethod
    def loss(self, prompts: Sequence[str], answers: Sequence[str], max_length: int, max_answer_length: int) -> Tensor:
        """Return the mean negative log-likelihood of the answers' tokens, with their ends."""

    @abstractmethod
    def generate(self, inputs: ModelInputs, resources: Resources) -> Answers:
        """Answer prompts as every method does, without a progress bar."""

    def training(self, mode: bool) -> None:  # noqa: B027 - most have no dropout
        """Switch dropout."""

    def config(self) -> dict[str, object] | None:
        """Return settings that are kept beside the weights for other programs."""
        return None


class Lora(PrivateWeights):
    """A LoRA in the place of layers of a language model.

    Args:
        language_model: frozen; its layers are wrapped within the `with` block.
        processor: of the language model.
        shape: of the LoRA.

    Raises:
        MissingPackageError: peft is not installed.
        ConfigurationError: the language model has none of these layers.
    """

    file = "adapter_model.safetensors"

    def __init__(self, language_model: PreTrainedModel, processor: PPlugProcessor, shape: LoraShape):
        self.peft = require("peft", "rivals", "A LoRA per user")
        self.language_model, self.processor, self.shape = language_model, processor, shape
        self.wrapped: Any = None

    def __enter__(self) -> Lora:
        model, shape = self.language_model, self.shape
        layers = layers_of(model, shape.modules)
        config = self.peft.LoraConfig(
            r=shape.rank,
            lora_alpha=shape.alpha,
            lora_dropout=shape.dropout,
            target_modules=layers,
            fan_in_fan_out="c_attn" in (layers or ()),  # GPT-2 keeps weights the other way round
            task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        )
        try:
            # What peft draws is drawn again in `reset`; its warning is about a property of transformers that it reads.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore", category=FutureWarning):
                self.wrapped = self.peft.get_peft_model(model, config, adapter_name=ADAPTER)
        except ValueError as error:  # no such layers
            raise ConfigurationError(
                f"{type(model).__name__} cannot have a LoRA here ({str(error).splitlines()[0]}): choose another language "
                "model, or user-tokens."
            ) from error
        self.training(False)  # peft makes its dropout in training mode
        return self

    def __exit__(self, *error: object) -> None:
        self.wrapped.unload()  # hands the layers back as they were
        self.language_model.requires_grad_(False)
        self.wrapped = None

    def reset(self, seed: int, start: Mapping[str, Tensor] | None = None) -> None:
        if start is not None:
            return self.load(start)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, parameter in self._named():
                fresh = torch.zeros(parameter.shape)  # on the CPU: the same on every device
                if "lora_A" in name:
                    nn.init.kaiming_uniform_(fresh, a=5**0.5)
                parameter.copy_(fresh)
        return None

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._named()]

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone().contiguous() for name, p in self._named()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        own = dict(self._named())
        check_state(state, own)
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def loss(self, prompts: Sequence[str], answers: Sequence[str], max_length: int, max_answer_length: int) -> Tensor:
        model = self.language_model
        batch = self.processor(
            text=prompts, persona=None, labels=answers, max_length=max_length, max_target_length=max_answer_length
        ).to(device=model.device)
        targets: Tensor = batch.pop("labels")
        batch.pop("persona_position", None)
        if self.processor.is_encoder_decoder:
            return token_loss(model(**batch, labels=targets, use_cache=False).logits, targets)
        # Rows are padded in front, so answers end at the right edge: only there logits are needed, [B, L + 1, V].
        kept = int((targets != -100).sum(dim=1).max()) + 1
        ids, mask = batch["input_ids"], batch["attention_mask"]
        known, start = self._beginning(ids, mask, most=ids.shape[1] - kept)
        options = {"attention_mask": mask, "position_ids": position_ids(mask)[:, start:], **known, **self._last(kept)}
        logits = model(ids[:, start:], **options).logits[:, -kept:]
        return token_loss(logits[:, :-1], targets[:, -kept:][:, 1:])

    def _beginning(self, ids: Tensor, mask: Tensor, most: int) -> tuple[dict[str, Any], int]:
        """Read the tokens that all rows begin with, such as a system text and an instruction: once for all of them.

        Args:
            ids, mask: [B, T], padded in front.
            most: read no more tokens than this.

        Returns:
            Options of the call that reads the other columns, and the number of columns that it leaves out.
        """
        rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        pairs = zip(min(rows), max(rows), strict=False)
        common = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)][: max(most, 0)]
        n = len(common)
        # With dropout, every row computes something else.
        if len(rows) == 1 or n < WORTH_SHARING or self.shape.dropout or self._states is None:
            return {"use_cache": False}, 0
        model, text = self.language_model, ids.new_tensor([common])
        states = self._states.read(model, text, torch.ones_like(text), None)[0]  # [n, F]
        padding = mask.argmax(dim=1, keepdim=True)
        columns = (torch.arange(n, device=ids.device) - padding).clamp(min=0)  # [B, n]
        return {cache_argument(model): self._states.past(states[columns]), "use_cache": True}, n

    def _last(self, count: int) -> dict[str, int]:
        """Return the option of a call that needs the last logits alone, if there is one."""
        has_one = "logits_to_keep" in inspect.signature(self.language_model.forward).parameters
        return {"logits_to_keep": count} if has_one else {}

    @cached_property
    def _states(self) -> CausalStates | EncoderStates | None:
        """Keys and values of the language model; None if it remembers otherwise."""
        try:
            return find_states(self.language_model)
        except ValueError:
            return None

    def generate(self, inputs: ModelInputs, resources: Resources) -> Answers:
        return resources.generate(inputs, description="")

    def training(self, mode: bool) -> None:
        for name, module in self.language_model.named_modules():
            if ".lora_dropout." in name:
                module.train(mode)  # a frozen language model leaves its modules in eval mode

    def config(self) -> dict[str, object]:
        settings = self.wrapped.peft_config[ADAPTER].to_dict()
        settings |= {"base_model_name_or_path": None, "inference_mode": True}  # a path of this machine tells nobody
        return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}

    def merge(self) -> dict[nn.Parameter, Tensor]:
        """Add the LoRA to the language model's weights.

        Returns:
            The touched weights as they were before, to be copied back: subtracting would not be exact.
        """
        layers = [each for each in self.wrapped.modules() if isinstance(each, self.peft.tuners.lora.LoraLayer)]
        before = {layer.get_base_layer().weight: layer.get_base_layer().weight.detach().clone() for layer in layers}
        self.wrapped.merge_adapter([ADAPTER])
        return before

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights under the names that peft gives them in files."""
        for name, parameter in self.wrapped.named_parameters():
            if f".{ADAPTER}." in name and ".lora_" in name:
                yield name.replace(f".{ADAPTER}.", "."), parameter


@contextmanager
def merged(
    language_model: PreTrainedModel, processor: PPlugProcessor, shape: LoraShape, state: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add a LoRA to the weights of a language model within the block; then they are what they were, to the bit.

    Args:
        language_model: frozen.
        processor: of the language model.
        shape, state: of the LoRA.

    Raises:
        ConfigurationError: the weights are quantised.
    """
    if getattr(language_model, "is_quantized", False):
        raise ConfigurationError(
            "A LoRA of the task is added to the language model's weights, and these are quantised: load the language model "
            "as it is, or use ftp, which adds nothing."
        )
    with Lora(language_model, processor, shape) as lora:
        lora.load(state)
        before = lora.merge()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, values in before.items():
                weight.copy_(values)


def layers_of(language_model: PreTrainedModel, modules: Modules) -> list[str] | None:
    """Return the names of the layers that get a LoRA; None leaves the choice to peft."""
    names = {name.rpartition(".")[2] for name, module in language_model.named_modules() if hasattr(module, "weight")}
    for layers in _LAYERS:
        if names.issuperset(layers):
            return list(layers if modules == "qkv" else layers[::2])
    return [name for name in _FUSED if name in names] or None


def check_modules(language_model: PreTrainedModel, modules: Modules) -> None:
    """Raise a `ConfigurationError` if keys are to have no LoRA, and one layer computes them with queries and values."""
    layers = layers_of(language_model, "qkv")
    if modules == "qv" and layers and layers == layers_of(language_model, "qv"):
        raise ConfigurationError(
            f"{type(language_model).__name__} computes queries, keys and values in one layer ({', '.join(layers)}), so keys "
            "cannot be left without a LoRA as modules='qv' asks: pass modules='qkv'."
        )


def check_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise a `MismatchError` unless weights have the names and shapes of a model's own."""
    shapes = {name: list(value.shape) for name, value in state.items()}
    expected = {name: list(value.shape) for name, value in own.items()}
    if shapes == expected:
        return
    differing = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    raise MismatchError(
        f"These weights do not belong on this language model: {len(differing)} of {len(expected)} have other names or shapes "
        f"(first {differing[0]}: {shapes.get(differing[0], 'missing')} instead of "
        f"{expected.get(differing[0], 'nothing')})."
    )


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of [B, L] targets, -100 left out, under [B, L, V] logits."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
