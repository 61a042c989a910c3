"""Frozen means frozen: what training may change, and what it may not."""

from collections import Counter

import pytest
import tiny
import torch
from reference import close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_layers import GradientCheckpointingLayer

from pplug_hf import PPlugModel, PPlugProcessor
from pplug_hf.errors import ConfigurationError
from pplug_hf.modeling.backbone import word_embeddings


def batch_of(model):
    return PPlugProcessor.from_model(model)(
        tiny.PROMPTS, persona=tiny.HISTORIES, query=tiny.PROMPTS, labels=tiny.ANSWERS
    )


def steps(model, n=3):
    """Train a little; gives the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(n):
        loss = model(**batch_of(model)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def frozen_state(model):
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("backbone", "history_encoder")
        for name, tensor in getattr(model, part).state_dict().items()
    }


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def fresh(family):
    """A model of its own for every test, to train."""
    return tiny.from_backbone(
        tiny.backbone(family), tiny.encoder(), tokenizer=tiny.tokenizer(family), learn_temperature=True
    )


def test_training_changes_every_trainable_parameter_and_nothing_else(fresh):
    before, plug = frozen_state(fresh), {name: p.clone() for name, p in fresh.named_parameters() if p.requires_grad}
    configs = fresh.backbone.config.to_dict(), fresh.backbone.generation_config.to_dict()
    losses = steps(fresh.train(), 10)
    assert losses[-1] < losses[0]
    for name, tensor in frozen_state(fresh).items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in [*fresh.backbone.parameters(), *fresh.history_encoder.parameters()])
    for name, old in plug.items():
        assert not torch.equal(fresh.get_parameter(name), old), name
    assert (fresh.backbone.config.to_dict(), fresh.backbone.generation_config.to_dict()) == configs


def test_what_is_trained_is_exactly_the_plug(fresh):
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in fresh.named_parameters() if name.startswith("plug.") and ".pooler." not in name
    }
    assert trained == set(fresh.state_dict())
    fresh(**batch_of(fresh)).loss.backward()
    for name, parameter in fresh.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "choices, absent",
    [
        ({"aggregator": "mean"}, "input_encoder"),
        ({"train_input_encoder": False}, "input_encoder"),
        ({"instruction": False}, "instruction"),
        ({}, "log_temperature"),
    ],
    ids=str,
)
def test_what_is_not_there_is_not_trained(choices, absent):
    names = [name for name, p in tiny.model("gpt2", **choices).named_parameters() if p.requires_grad]
    assert names and not any(absent in name for name in names)


@torch.no_grad()
def test_backbone_and_history_encoder_have_no_dropout_in_training(fresh):
    persona = fresh.encode_persona(tiny.HISTORIES)
    vectors = fresh.plug.input_encoder.encode(tiny.PROMPTS, convert_to_tensor=True)
    batch = batch_of(fresh) | {"query": vectors}
    quiet = fresh(**batch).logits
    fresh.train()
    assert fresh.training and fresh.backbone.training and not fresh.history_encoder.training
    for one, two in zip(fresh.encode_persona(tiny.HISTORIES), persona, strict=True):
        assert torch.equal(one.vectors, two.vectors)
    close(fresh(**batch).logits, quiet)
    assert fresh.plug.input_encoder.training  # what is trained keeps its dropout
    assert not torch.equal(fresh(**batch_of(fresh)).logits, fresh(**batch_of(fresh)).logits)
    assert torch.equal(fresh.eval()(**batch_of(fresh)).logits, fresh(**batch_of(fresh)).logits)


def test_the_backbone_stays_usable_and_savable_alone(family, fresh, tmp_path):
    untouched = tiny.backbone(family)
    steps(fresh.train(), 1)
    fresh.eval()
    ids = torch.tensor([[9, 10, 11]])
    assert torch.equal(fresh.backbone.generate(ids, max_new_tokens=6), untouched.generate(ids, max_new_tokens=6))
    fresh.backbone.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if untouched.config.is_encoder_decoder else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path)
    for name, tensor in untouched.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ours, theirs = again.config.to_dict(), untouched.config.to_dict()
    assert {key for key in theirs if ours.get(key) != theirs[key]} <= {"_name_or_path", "architectures", "dtype"}
    assert any("drop" in key and value for key, value in ours.items())  # of a backbone trained on later


# ---- the vocabulary ---------------------------------------------------------------------------------------------


def tables(model):
    """The word embeddings and the output layer, by the memory they are in."""
    backbone = model.backbone
    layers = backbone.get_input_embeddings(), word_embeddings(backbone), backbone.get_output_embeddings()
    return [layer.weight.data_ptr() for layer in layers]


def test_tying_weights_leaves_an_untied_backbone_untied(fresh):
    """accelerate and transformers call it, e.g. under FSDP and on TPUs."""
    before, where = frozen_state(fresh), tables(fresh)
    for options in ({}, {"recompute_mapping": True}, {"recompute_mapping": False}):
        fresh.tie_weights(**options)
    assert tables(fresh) == where
    for name, tensor in frozen_state(fresh).items():
        assert torch.equal(tensor, before[name]), name


def test_tying_weights_ties_again_what_came_apart():
    model = tiny.model("t5")
    head = model.backbone.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.tie_weights()
    assert head.weight is model.backbone.shared.weight


@pytest.mark.parametrize("family, tied", [("t5", True), ("flan-t5", False), ("bart", False)])
def test_a_loaded_backbone_is_tied_as_its_checkpoint(family, tied, places):
    model = tiny.from_backbone(str(places / family), str(places / "encoder"))
    model.tie_weights()
    where = tables(model)
    assert (where[1] == where[2]) == tied
    assert torch.equal(model.get_output_embeddings().weight, tiny.backbone(family).get_output_embeddings().weight)


def test_the_vocabulary_cannot_be_resized(fresh):
    assert fresh.resize_token_embeddings() is fresh.backbone.get_input_embeddings()
    before, where = frozen_state(fresh), tables(fresh)
    for options in ({"new_num_tokens": 90}, {"pad_to_multiple_of": 8}):
        with pytest.raises(ConfigurationError, match="resize and save the backbone alone"):
            fresh.resize_token_embeddings(**options)
    assert tables(fresh) == where
    for name, tensor in frozen_state(fresh).items():
        assert torch.equal(tensor, before[name]), name


# ---- activation checkpointing -----------------------------------------------------------------------------------


def gradients(model):
    """Gradients of one step, and how often each layer of the backbone ran (seen by its innermost modules)."""
    layers = [layer for layer in model.backbone.modules() if isinstance(layer, GradientCheckpointingLayer)]
    runs = [Counter() for _ in layers]
    hooks = [
        module.register_forward_hook(lambda module, *_, own=own: own.update([module]))
        for layer, own in zip(layers, runs, strict=True)
        for module in layer.modules()
        if not list(module.children())
    ]
    model.zero_grad()
    model(**batch_of(model) | {"query": tiny.vectors(3)}).loss.backward()
    for hook in hooks:
        hook.remove()
    # The second run of a layer may stop before its last modules, whose results nobody needs.
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, [
        max(r.values()) for r in runs
    ]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
@pytest.mark.parametrize("how", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_computes_twice_and_changes_no_gradient(fresh, how):
    if not hasattr(fresh, f"{how}_enable"):
        pytest.skip("this version of transformers has it under its other name only")
    fresh.train()
    expected, runs = gradients(fresh)
    assert set(runs) == {1}
    getattr(fresh, f"{how}_enable")()
    got, runs = gradients(fresh)
    assert set(runs) == {2}
    assert got.keys() == expected.keys() and "plug.projector.hidden.weight" in got
    for name in expected:
        close(got[name], expected[name])
    getattr(fresh, f"{how}_disable")()
    assert set(gradients(fresh)[1]) == {1}


# ---- half precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_full_precision_plug_on_a_half_precision_backbone(family, places, tmp_path):
    model = tiny.from_backbone(str(places / family), str(places / "encoder"), backbone_kwargs={"dtype": "bfloat16"})
    steps(model.train())
    model.eval()
    assert model.backbone.dtype == torch.bfloat16
    assert {p.dtype for p in model.plug.parameters()} == {torch.float32}
    assert model(**batch_of(model)).loss.dtype == torch.float32
    assert model.generate(torch.tensor([[9, 10]]), persona=tiny.HISTORY, max_new_tokens=3).shape[0] == 1
    model.save_pretrained(tmp_path)
    for dtype in ({"dtype": "bfloat16"}, {}):
        again = PPlugModel.from_pretrained(tmp_path, **dtype)
        assert again.backbone.dtype == (torch.bfloat16 if dtype else torch.float32)
        assert {p.dtype for p in again.plug.parameters()} == {torch.float32}
        asked = {"persona": tiny.HISTORIES, "query": tiny.PROMPTS}
        assert torch.equal(again.soft_prompt(**asked), model.soft_prompt(**asked))
