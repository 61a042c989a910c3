"""A check of a language model before a plug is made for it: a soft prompt among its words must mean what words mean.

A few forward passes on a few tokens find out how the backbone takes a soft prompt, and refuse one that cannot: a plug
trained on it would be worth nothing. B rows, P soft tokens, T words, L = P + T, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..errors import ConfigurationError
from .backbone import freeze_backbone
from .prefix import Reading, generate_with_prefix, placeholders, position_ids, prefix_order, reorder, word_embeddings
from .substitution import reading_ids
from .weight_sample import weight_digests

logger = logging.getLogger(__name__)

B, P, T = 3, 2, 4


_known: dict[tuple[object, ...], Reading] = {}


@torch.no_grad()
def check_backbone(backbone: PreTrainedModel) -> Reading:
    """Find out how a backbone takes a soft prompt, and freeze it.

    Compared are the logits of embeddings and of ids, of a soft prompt of two words' embeddings and of these words, of
    padded rows and of themselves alone, of the model frozen, in training mode, and as it came; and `generate` has to take
    a soft prompt. What was found is remembered for backbones of the same class, configuration, weights and dtype.

    Args:
        backbone: a loaded language model.

    Raises:
        ConfigurationError: it cannot take a soft prompt; the message says what fails and what to do.
    """
    settings = backbone.config.to_json_string(use_diff=False) + repr(backbone) + str(weight_digests(backbone))
    key = type(backbone), backbone.dtype, hashlib.sha256(settings.encode()).digest(), vars(backbone).get("forward")
    if key not in _known:
        training = backbone.training
        with torch.random.fork_rng(devices=[]), _no_packing(backbone):
            try:
                _known[key] = _Check(backbone.eval()).run()
            finally:
                backbone.train(training)
    freeze_backbone(backbone)
    return _known[key]


class _Unfit(Exception):
    """One of the two ways to take a soft prompt does not work."""


class _Check:
    """The check of one backbone in eval mode."""

    def __init__(self, backbone: PreTrainedModel):
        self.backbone, self.seq2seq = backbone, bool(backbone.config.is_encoder_decoder)
        self.name = f"The backbone {type(backbone).__name__} ({backbone.config.model_type})"
        try:
            self.layer = word_embeddings(backbone)
            self.device = self.layer.weight.device
        except (AttributeError, NotImplementedError) as error:  # what get_input_embeddings raises
            raise self._refused("transformers does not say which module embeds its words") from error
        devices = (getattr(backbone, "hf_device_map", None) or {}).values()
        self.offloaded = bool({"cpu", "disk"} & set(map(str, devices))) and len(set(map(str, devices))) > 1
        self.tolerance = tolerance(backbone)

    def run(self) -> Reading:
        if self.device.type == "meta":
            logger.info("%s is not checked: its weights are not in memory.", self.name)
            return Reading()
        self.words = sample_words(self.backbone, self.layer).to(self.device)  # [B, L]
        try:
            own = self._read(None, torch.ones_like(self.words), self.words)  # [B, L, V]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise self._refused(f"it does not read a prompt of ids alone ({_first_line(error)})") from error
        try:
            reading = self._way(own, by_ids=False)
        except _Unfit as first:
            try:
                reading = self._way(own, by_ids=True)
            except _Unfit as second:
                raise self._refused(f"{first}; {second}") from second
        if self.offloaded:
            logger.info("%s is off-loaded: neither generating nor training mode is checked.", self.name)
            return reading
        freeze_backbone(self.backbone)
        for mode, how in ((False, "frozen, it answers otherwise"), (True, "it is noisy in training mode")):
            self.backbone.train(mode)
            if not self._equal(self._read(None, torch.ones_like(self.words), self.words), own):
                raise self._refused(how)
        return reading

    def _refused(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.name} cannot take a soft prompt: {reason}. Choose another backbone (the page about backbones in the "
            "documentation lists those that can), or its text model if it also reads images. To go on all the same, pass "
            "check_backbone=False."
        )

    def _way(self, own: Tensor, by_ids: bool) -> Reading:
        """Return what holds if soft prompts come in as embeddings, or in the places of ids.

        Raises:
            _Unfit: they cannot.
        """
        how = "put in the places of ids" if by_ids else "given as inputs_embeds"
        try:
            padded = plain = self._soft(by_ids, padding=2)
            if not (pure := self._equal(padded, own)):
                plain = self._soft(by_ids, padding=0)
                pure = self._equal(plain, own)
            if not pure and not by_ids:
                raise _Unfit(f"words {how} do not mean what they mean as ids")
            if not self.offloaded:
                embeds, mask, ids, text, text_mask = self._prompt(by_ids, padding=0)
                embeds[:, :P] = (embeds[:, :P] + embeds[:, P : 2 * P]) / 2  # of no word: some kinds look embeddings up
                config = GenerationConfig(max_new_tokens=2, do_sample=False, num_beams=1)
                with reading_ids(self.backbone, ids):
                    generate_with_prefix(self.backbone, embeds, mask, text, text_mask, config, {})
        except (_Unfit, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _Unfit(f"words {how} fail ({_first_line(error)})") from error
        return Reading(by_ids, self._equal(padded, plain if not pure else own), pure)

    def _soft(self, by_ids: bool, padding: int) -> Tensor:
        """Return the logits [B, L, V] of the words, the first of which come as a soft prompt."""
        return self._read(*self._prompt(by_ids, padding)[:3])

    def _prompt(self, by_ids: bool, padding: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Return embeddings [B, L + padding, H], their mask, the ids that are read, the text behind P and its mask."""
        words, pad = self.words[:, P:], self.words[:, :1].expand(-1, padding)
        text = torch.cat([words, pad] if self.seq2seq else [pad, words], dim=1)
        parts = [torch.ones_like(words), torch.zeros_like(pad)]
        text_mask = torch.cat(parts if self.seq2seq else parts[::-1], dim=1)
        shown = text_mask.new_ones(B, P)
        order = prefix_order(text_mask, text_mask.new_zeros(B), shown, pad_left=not self.seq2seq)
        embeds = reorder(order, self.layer(self.words[:, :P]), self.layer(text))
        ids = placeholders(order, text, text_mask) if by_ids else None
        return embeds, reorder(order, shown, text_mask), ids, text, text_mask

    def _read(self, embeds: Tensor | None, mask: Tensor, ids: Tensor | None) -> Tensor:
        """Return the logits [B, L, V] of a prompt; of its ids alone if there are no embeddings."""
        L = self.words.shape[1]
        options = {"decoder_input_ids": self.words[:, :T]} if self.seq2seq else {"position_ids": position_ids(mask)}
        if embeds is None:
            output = self.backbone(input_ids=ids, attention_mask=mask, **options)
        else:
            with reading_ids(self.backbone, ids):
                output = self.backbone(inputs_embeds=embeds, attention_mask=mask, **options)
        return output.logits[:, -L:].float().to(self.device)

    def _equal(self, got: Tensor, expected: Tensor) -> bool:
        return equal_logits(got, expected, self.tolerance)


def tolerance(backbone: PreTrainedModel) -> float:
    """Return the relative difference of logits that rounding in the backbone's data type explains."""
    exact = backbone.dtype in (torch.float32, torch.float64) and not getattr(backbone, "is_quantized", False)
    return 0.01 if exact else 0.15


def equal_logits(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether logits [B, L, V] agree to rounding in a row at least: in others, rounding may flip a router."""
    got, expected = got.float(), expected.float()
    said = expected.abs() < 1e6  # the rest are tokens that are never said
    difference = ((got - expected) * said).flatten(1).norm(dim=1)
    spread = ((expected - expected.mean(dim=-1, keepdim=True)) * said).flatten(1).norm(dim=1)
    return bool((difference <= tolerance * spread).any())


def sample_words(backbone: PreTrainedModel, layer: Any) -> Tensor:
    """Return [B, L] ids of ordinary words from all over the vocabulary."""
    configs = {id(c): c for m in backbone.modules() if (c := getattr(m, "config", None)) is not None}.values()
    named = {
        v for c in configs for k, v in vars(c).items() if k.endswith(("token_id", "token_index")) and type(v) is int
    }
    size = min(layer.weight.shape[0], backbone.config.get_text_config().vocab_size)
    free = [i for i in range(size) if i not in named] or [0]
    n = B * (P + T)
    return torch.tensor([free[i * len(free) // n] for i in range(n)]).view(P + T, B).T.contiguous()


@contextmanager
def _no_packing(backbone: PreTrainedModel) -> Iterator[None]:
    """Keep bitsandbytes from packing 4-bit weights for inference, after which no gradient passes."""
    layers = [m for m in backbone.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"
