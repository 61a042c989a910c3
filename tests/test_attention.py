"""Attention implementations: whatever the backbone supports is accepted, and reaches the backbone alone."""

from typing import Any

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from reference import close
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pplug_hf import PPlugModel
from pplug_hf.errors import ConfigurationError

QUERIES = ["a night sky", "a film", "the sea"]


def made(places, family, **backbone_kwargs):
    torch.manual_seed(0)
    model = tiny.from_backbone(str(places / family), str(places / "encoder"), backbone_kwargs=backbone_kwargs)
    tiny.randomise(model.plug)
    return model


def prompts(model):
    return model.tokenizer(tiny.PROMPTS, padding=True, return_tensors="pt") | {
        "persona": tiny.HISTORIES,
        "query": QUERIES,
    }


@torch.no_grad()
def logits(model):
    """Of the real tokens: what stands at padding is nobody's."""
    batch = prompts(model)
    labels = {"labels": batch["input_ids"]} if model.config.is_encoder_decoder else {}
    return model(**batch, **labels).logits[batch["attention_mask"].bool()]


def answers(model) -> Any:
    return model.generate(**prompts(model), max_new_tokens=6, do_sample=False)


def implementation(model):
    return {m.config._attn_implementation for m in model.backbone.modules() if isinstance(m, PreTrainedModel)}


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


def skip_old_t5(family):
    if family in ("t5", "flan-t5") and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("a T5 of transformers 5.19 keeps a choice from its encoder and decoder")


def test_eager_and_sdpa_are_accepted_and_agree(places, family):
    skip_old_t5(family)
    eager, sdpa = (made(places, family, attn_implementation=name) for name in ("eager", "sdpa"))
    assert (implementation(eager), implementation(sdpa)) == ({"eager"}, {"sdpa"})
    close(logits(eager), logits(sdpa))
    assert torch.equal(answers(eager), answers(sdpa))
    expected = logits(sdpa)
    sdpa.set_attn_implementation("eager")
    assert implementation(sdpa) == {"eager"}
    close(logits(sdpa), expected)


@pytest.fixture
def counted():
    """A registered implementation by the name of "counted", and the modules that called it."""
    callers = []

    def attend(module, *args, **kwargs):
        callers.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counted", attend)
    AttentionMaskInterface.register("counted", sdpa_mask)
    yield callers
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping["counted"]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_choice_reaches_the_backbone_on_every_way_and_no_encoder(places, family, counted, tmp_path):
    skip_old_t5(family)
    plain = made(places, family)
    plain.save_pretrained(tmp_path / "plug")
    switched = made(places, family)
    switched.set_attn_implementation("counted")
    chosen = {"attn_implementation": "counted"}
    for model in (
        made(places, family, **chosen),
        PPlugModel.from_pretrained(tmp_path / "plug", **chosen),
        PPlugModel.from_pretrained(tmp_path / "plug", backbone_kwargs=chosen),
        AutoModel.from_pretrained(tmp_path / "plug", **chosen),
        switched,
    ):
        counted.clear()
        close(logits(model), logits(plain))
        assert counted and set(counted) <= set(model.backbone.modules())


def outcome(call):
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "no such thing"])
def test_what_the_backbone_refuses_is_refused_in_its_own_words(family, name):
    skip_old_t5(family)
    model, alone = tiny.model(family), tiny.backbone(family)
    expected = outcome(lambda: alone.set_attn_implementation(name))
    assert outcome(lambda: model.set_attn_implementation(name)) == expected
    assert implementation(model) == {alone.config._attn_implementation}


# ---- flash attention, without its kernel ------------------------------------------------------------------------


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """As the package's: [B, T, heads, size], and causal rows end together."""
    T, S = q.shape[1], k.shape[1]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attended = scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=softmax_scale, enable_gqa=True)
    return attended.transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs):
    """As the package's: rows without padding, one behind the other."""
    lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
    rows = zip(*(x.split(n) for x, n in zip((q, k, v), lengths, strict=True)), strict=True)
    return torch.cat([flash_attn_func(*(x[None] for x in row), **kwargs)[0] for row in rows])


@pytest.fixture
def flash_attention(monkeypatch):
    """transformers believes that the package is there; its kernels are the functions above, on any device and dtype."""
    functions = flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: functions)
    requirements = flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(requirements, "general_availability_check", lambda: True)
    monkeypatch.setitem(requirements, "supported_devices", ((lambda: True, "cpu"),))


@pytest.mark.parametrize("family", ["bart", "gpt2", "llama", "qwen3"])
def test_flash_attention_is_accepted_and_computes_the_same(places, family, flash_attention):
    precise: Any = {"dtype": torch.float64}  # transformers casts single precision, which the kernels do not take
    expected, switched = (made(places, family, **precise) for _ in range(2))
    model = made(places, family, attn_implementation="flash_attention_2", **precise)
    switched.set_attn_implementation("flash_attention_2")
    for chosen in (model, switched):
        assert implementation(chosen) == {"flash_attention_2"}
        close(logits(chosen), logits(expected))
    assert torch.equal(answers(model), answers(expected))


def test_a_backbone_without_flash_attention_is_named(places, flash_attention):
    with pytest.raises(ConfigurationError, match="T5ForConditionalGeneration does not support Flash Attention 2"):
        made(places, "t5", attn_implementation="flash_attention_2")
