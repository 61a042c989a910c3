"""Private weights on a frozen language model: what they compute, and that the language model is left as it was."""

import sys

import families
import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from pplug_hf import PPlugProcessor
from pplug_hf.errors import ConfigurationError, MismatchError, MissingPackageError
from pplug_hf.methods import private_weights
from pplug_hf.methods.pair_training import PairTraining, eager_attention, train_on_pairs
from pplug_hf.methods.private_prompt import PROMPT, PrivatePrompt
from pplug_hf.methods.private_weights import Lora, LoraShape, check_modules, layers_of, merged
from pplug_hf.modeling.backbone import freeze_backbone

PAIRS = list(zip(tiny.PROMPTS, tiny.ANSWERS, strict=True))


def language_model(family):
    model = tiny.backbone(family)
    freeze_backbone(model)
    tokenizer = tiny.tokenizer(family)
    return model, PPlugProcessor(tokenizer, is_encoder_decoder=model.config.is_encoder_decoder)


def random_state(lora, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in lora.state().items()}


def logits_of(model):
    ids = torch.arange(5, 14)[None]
    options = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_language_model_is_what_it_was_to_the_bit(family):
    model, processor = language_model(family)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modules, attributes, config = dict(model.named_modules()), set(vars(model)), model.config.to_dict()
    bare, attention = logits_of(model), model.config._attn_implementation
    with eager_attention(model), Lora(model, processor, LoraShape(rank=2)) as lora:
        train_on_pairs(lora, PAIRS, PairTraining(epochs=1, learning_rate=0.1), seed=0, max_length=64)
        assert lora.wrapped.get_base_model() is model and not torch.equal(logits_of(model), bare)
        state = lora.state()
    with pytest.raises(KeyboardInterrupt), merged(model, processor, LoraShape(rank=2), state):
        assert not torch.equal(logits_of(model), bare)
        raise KeyboardInterrupt
    assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == attributes and model.config.to_dict() == config
    assert model.config._attn_implementation == attention
    assert torch.equal(logits_of(model), bare) and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_layer_computes_w_and_alpha_over_r_times_b_a(family):
    model, processor = language_model(family)
    shape = LoraShape(rank=3, alpha=6)
    name = {"llama": "model.layers.1.self_attn.v_proj", "gpt2": "transformer.h.1.attn.c_attn"}.get(
        family, "encoder.block.1.layer.0.SelfAttention.k"
    )
    base = model.get_submodule(name)
    weight = base.weight.detach().double().numpy()
    W = weight.T if family == "gpt2" else weight  # [out, in]
    x = np.random.default_rng(0).normal(size=(4, W.shape[1]))
    bias = 0 if getattr(base, "bias", None) is None else base.bias.detach().double().numpy()
    with Lora(model, processor, shape) as lora:
        state = random_state(lora)
        lora.load(state)
        A, B = (state[f"base_model.model.{name}.lora_{which}.weight"].double().numpy() for which in "AB")
        expected = x @ (W + 6 / 3 * B @ A).T + bias
        got = model.get_submodule(name)(torch.tensor(x, dtype=torch.float32)).detach().numpy()
        np.testing.assert_allclose(got, expected, atol=1e-4)
    with merged(model, processor, shape, state):
        now = model.get_submodule(name).weight.detach().double().numpy()
        np.testing.assert_allclose(now.T if family == "gpt2" else now, W + 6 / 3 * B @ A, atol=1e-5)


def test_fresh_weights_change_nothing_and_depend_on_the_seed_alone():
    model, processor = language_model("llama")
    bare = logits_of(model)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with Lora(model, processor, LoraShape()) as lora:
        lora.reset(1)
        first = lora.state()
        assert torch.equal(logits_of(model), bare)
        train_on_pairs(lora, PAIRS, PairTraining(epochs=1), seed=9, max_length=64)
        lora.reset(2)
        assert any(not torch.equal(value, first[name]) for name, value in lora.state().items())
        lora.reset(1)
        assert all(torch.equal(value, first[name]) for name, value in lora.state().items())
        spread = torch.cat([v.flatten() for n, v in first.items() if "lora_A" in n])
        assert spread.abs().max() <= 16**-0.5 + 1e-6 and all(not v.any() for n, v in first.items() if "lora_B" in n)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_the_loss_is_the_mean_over_the_answers_tokens(family):
    model, processor = language_model(family)
    with Lora(model, processor, LoraShape(rank=2)) as lora, torch.no_grad():
        lora.load(random_state(lora))
        total, count = 0.0, 0
        for prompt, answer in PAIRS:  # one by one, without padding, with all logits
            batch = processor(text=[prompt], labels=[answer])
            labels = batch.pop("labels")
            if processor.is_encoder_decoder:
                logits = model(**batch, labels=labels).logits[0]
                targets = labels[0]
            else:
                logits, targets = model(**batch).logits[0, :-1], labels[0, 1:]
            log_probs = F.log_softmax(logits.double(), dim=-1)
            wanted = [(row, int(target)) for row, target in enumerate(targets) if target != -100]
            total -= sum(float(log_probs[row, target]) for row, target in wanted)
            count += len(wanted)
        assert lora.loss(*zip(*PAIRS, strict=True), 64, 64).item() == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gemma3_text", "mistral", "jamba"])
def test_what_prompts_begin_with_in_common_is_read_once(name, monkeypatch):
    model = families.backbone(name, "causal")  # the sliding windows of Gemma and Mistral are 8 tokens wide
    freeze_backbone(model)
    processor = PPlugProcessor(tiny.tokenizer("llama"), is_encoder_decoder=False)
    prompts = ["what is the best of all films for a long winter night by the sea " + end for end in tiny.PROMPTS]
    with Lora(model, processor, LoraShape(rank=2)) as lora:
        lora.load(random_state(lora))
        assert (lora._states is None) == (name == "jamba")  # some of its layers keep no keys and values
        read = []
        model.register_forward_pre_hook(
            lambda module, args, options: read.append((options.get("input_ids", *args)).shape), with_kwargs=True
        )
        found = {}
        for least in (10, 1000):
            monkeypatch.setattr(private_weights, "WORTH_SHARING", least)
            read.clear()
            loss = lora.loss(prompts, tiny.ANSWERS, 64, 64)
            loss.backward()
            found[least] = loss.item(), [parameter.grad for parameter in lora.parameters()], list(read)
            model.zero_grad()
    (one, its, read), (other, expected, read_all) = found.values()
    ((rows, columns),) = read_all
    assert read == (read_all if name == "jamba" else [(1, 16), (rows, columns - 16)])
    assert one == pytest.approx(other, abs=1e-5)
    for mine, wanted in zip(its, expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-3)
        assert wanted.abs().max() > 0


def test_answers_and_what_dropout_changes_are_read_for_each_row(monkeypatch):
    model, processor = language_model("llama")
    monkeypatch.setattr(private_weights, "WORTH_SHARING", 1)
    prompt, answer = tiny.PROMPTS[0], tiny.ANSWERS[0]
    with Lora(model, processor, LoraShape(rank=2)) as lora:
        twice, once = lora.loss([prompt] * 2, [answer] * 2, 64, 64), lora.loss([prompt], [answer], 64, 64)
        assert twice.item() == pytest.approx(once.item(), abs=1e-6)
        assert lora.loss([prompt] * 2, [answer] * 2, 1, 64).isfinite()
    with Lora(model, processor, LoraShape(rank=2, dropout=0.5)) as lora:
        ids = torch.arange(5, 15).expand(2, -1)
        assert lora._beginning(ids, torch.ones_like(ids), most=9) == ({"use_cache": False}, 0)


def test_training_lowers_the_loss_and_dropout_is_on_only_then():
    model, processor = language_model("llama")
    with Lora(model, processor, LoraShape(dropout=0.5)) as lora:
        modes = []
        loss = lora.loss
        lora.loss = lambda *args: modes.append(_dropouts(model)) or loss(*args)
        record = train_on_pairs(lora, PAIRS, PairTraining(epochs=20, learning_rate=0.02), seed=0, max_length=64)
        assert record.last_loss < record.first_loss - 0.5 and record.steps == 20
        assert modes[0] == {True} and _dropouts(model) == {False}
        once = lora.state()
        train_on_pairs(lora, PAIRS, PairTraining(epochs=20, learning_rate=0.02), seed=0, max_length=64)
        assert all(torch.equal(value, once[name]) for name, value in lora.state().items())  # dropout is seeded too
        early = train_on_pairs(
            lora, PAIRS, PairTraining(epochs=20, learning_rate=0.02, stop_below=99), seed=0, max_length=64
        )
        assert early.passes == 1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_loaded_weights_answer_without_dropout(family):
    model, processor = language_model(family)
    with Lora(model, processor, LoraShape(rank=2, dropout=0.5)) as lora:
        assert _dropouts(model) == {False}
        lora.load(random_state(lora))
        first, again = logits_of(model), logits_of(model)
        assert torch.equal(first, again)


def _dropouts(model):
    return {m.training for n, m in model.named_modules() if n.endswith("lora_dropout.user")}


def test_the_learning_rate_rises_and_falls():
    from pplug_hf.methods.pair_training import _rate

    linear = PairTraining(epochs=2, schedule="linear", warmup=0.2)
    rates = [_rate(linear, step, 5) for step in range(11)]
    assert rates[0] == pytest.approx(1 / 3) and rates[2] == 1.0 and rates[6] == 0.5 and rates[10] == 0.0
    assert {_rate(PairTraining(), step, 5) for step in range(30)} == {1.0}


def test_weights_of_other_layers_or_shapes_are_refused():
    model, processor = language_model("llama")
    with Lora(model, processor, LoraShape(modules="qv")) as lora:
        smaller = lora.state()
    with Lora(model, processor, LoraShape()) as lora:
        with pytest.raises(MismatchError, match="4 of 12 have other names or shapes"):
            lora.load(smaller)
        other = lora.state()
        name = next(iter(other))
        with pytest.raises(MismatchError, match=r"first base_model.*instead of \[8, 16\]"):
            lora.load(other | {name: other[name][:2]})


def test_layers_are_found_by_their_names():
    found = {family: layers_of(tiny.backbone(family), "qkv") for family in tiny.FAMILIES}
    assert found["gpt2"] == ["c_attn"] and found["t5"] == ["q", "k", "v"]
    assert found["llama"] == found["bart"] == ["q_proj", "k_proj", "v_proj"]
    assert layers_of(tiny.backbone("qwen3"), "qv") == ["q_proj", "v_proj"]
    assert layers_of(torch.nn.Linear(2, 2), "qkv") is None


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keys_cannot_be_left_out_of_a_layer_that_computes_them_with_others(family):
    model = tiny.backbone(family)
    check_modules(model, "qkv")
    if family != "gpt2":
        return check_modules(model, "qv")
    with pytest.raises(ConfigurationError, match=r"in one layer \(c_attn\), .* pass modules='qkv'"):
        check_modules(model, "qv")


def test_without_peft_there_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"A LoRA per user needs peft; install .*pplug-hf\[rivals\]"):
        Lora(*language_model("llama"), LoraShape())


def test_a_quantised_language_model_takes_no_lora_of_the_task():
    model, processor = language_model("llama")
    model.is_quantized = True
    with pytest.raises(ConfigurationError, match="these are quantised"), merged(model, processor, LoraShape(), {}):
        pass


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("placement", ["prompt", "answer"])
def test_a_private_prompt_stands_where_the_plugs_does(family, placement):
    plug = tiny.model(family, placement=placement, num_persona_tokens=2)
    S = plug.soft_prompt([tiny.HISTORY], query=["the film"])[0]  # [3, H]
    prompt = PrivatePrompt(plug.backbone, plug.tokenizer, PrivatePrompt.of_plug(plug.config), S.shape)
    batch = PPlugProcessor.from_model(plug)(
        text=tiny.PROMPTS, labels=tiny.ANSWERS, persona=[tiny.HISTORY] * 3, query=["the film"] * 3, max_length=64
    )
    with prompt, torch.no_grad():
        prompt.reset(0, {PROMPT: S})
        torch.testing.assert_close(prompt.state()[PROMPT], S)
        expected = plug(**batch).loss
        loss = prompt.loss(tiny.PROMPTS, tiny.ANSWERS, 64, 64)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    with prompt:
        record = train_on_pairs(
            prompt, PAIRS, PairTraining(epochs=30, learning_rate=0.3), seed=0, max_length=64, start={PROMPT: S}
        )
        assert record.last_loss < record.first_loss
    assert not prompt.model.prompt.requires_grad
