"""Several plugs on one backbone give what each gives alone, whole batches and row by row."""

import pytest
import tiny
import torch
from safetensors.torch import load_file

from pplug_hf import PPlugModel
from pplug_hf.errors import ConfigurationError, MismatchError

OTHER_ENCODER = {"width": 8, "seed": 5}
CHOICES = {
    "default": {"attention_temperature": 0.2},
    "wide": {"num_persona_tokens": 3, "projector_size": 5},
    "bare": {"instruction": False, "aggregator": "mean"},
    "other": {"attention_temperature": 0.2},  # with another sentence encoder
}


@pytest.fixture(scope="module", params=["t5", "bart", "gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    """Four plugs of one backbone on disk, and each alone on a backbone of its own."""
    root = tmp_path_factory.mktemp(family)
    made = {}
    for seed, (name, choices) in enumerate(CHOICES.items()):
        encoder = tiny.encoder(**OTHER_ENCODER) if name == "other" else tiny.shared_encoder()
        model = tiny.from_backbone(tiny.backbone(family), encoder, tokenizer=tiny.tokenizer(family), **choices)
        tiny.randomise(model.plug, seed)
        model.save_pretrained(root / name)
        made[name] = (root / name, encoder, model)
    return made


@pytest.fixture
def model(family, folders):
    """All four on one backbone."""
    folder, encoder, _ = folders["default"]
    model = PPlugModel.from_pretrained(folder, backbone=tiny.backbone(family), encoder=encoder)
    for name in list(CHOICES)[1:]:
        folder, encoder, _ = folders[name]
        model.load_plug(folder, name, **({"encoder": encoder} if name == "other" else {}))
    return model


def inputs_of(family, prompts=tiny.PROMPTS):
    """A padded batch."""
    tokenizer = tiny.tokenizer(family)
    tokenizer.padding_side = "left" if family in tiny.CAUSAL else "right"
    return tokenizer(prompts, padding=True, return_tensors="pt")


def row_of(family, prompt):
    return inputs_of(family, [prompt])


def test_names_and_configurations(model, folders):
    assert list(model.plugs) == list(CHOICES) and model.active_plug == "default"
    assert model.plugs["wide"].num_persona_tokens == 3 and model.plugs["default"] is model.config
    assert model.plugs["bare"].aggregator == "mean"


def test_the_backbone_and_a_shared_encoder_are_in_memory_once(model, family):
    backbones = {id(model.backbone)} | {id(p) for p in model.backbone.parameters()}
    parts = [*model.personalizers.values()]
    assert all(not hasattr(part, "backbone") or id(part.backbone) in backbones for part in parts)
    encoders = [part.history_encoder for part in parts]
    assert encoders[0] is encoders[1] is encoders[2] and encoders[3] is not encoders[0]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in model.plug.parameters() if p.requires_grad)  # of the active plug alone


@pytest.mark.parametrize("name", CHOICES)
def test_each_answers_as_it_does_alone(model, folders, family, name):
    inputs, (_, _, alone) = inputs_of(family), folders[name]
    expected = alone(**inputs, persona=tiny.HISTORIES, query=tiny.PROMPTS, **decoder(family)).logits
    named = model(**inputs, persona=tiny.HISTORIES, query=tiny.PROMPTS, plug=name, **decoder(family)).logits
    real = inputs["attention_mask"].bool() if family in tiny.CAUSAL else ...
    torch.testing.assert_close(named[real], expected[real])
    assert model.active_plug == "default"
    model.set_plug(name)
    assert model.active_plug == name and model.config is model.plugs[name]
    switched = model(**inputs, persona=tiny.HISTORIES, query=tiny.PROMPTS, **decoder(family)).logits
    assert torch.equal(switched, named)
    history = tiny.HISTORY
    torch.testing.assert_close(
        model.soft_prompt(history, query="rain"), alone.soft_prompt(history, query="rain"), rtol=0, atol=0
    )


def decoder(family):
    """What an encoder-decoder model needs beside the prompt."""
    return {} if family in tiny.CAUSAL else {"decoder_input_ids": torch.tensor([[0, 9, 12]] * len(tiny.PROMPTS))}


MIXES = [
    ["default", "wide", "bare"],
    ["other", None, "wide"],
    [None, None, None],
    ["bare", "bare", None],
    ["other", "other", "other"],
]


def test_each_generates_by_its_own_settings(model, family):
    names, inputs = [*model.plugs][:2], inputs_of(family)
    for length, name in enumerate(names, 3):
        model.set_plug(name)
        model.generation_config.max_new_tokens = length
    asked = {"persona": [tiny.HISTORY] * len(tiny.PROMPTS), "query": tiny.PROMPTS, "min_new_tokens": 3}
    start = inputs["input_ids"].shape[1] if family in tiny.CAUSAL else 1
    for active in names:
        model.set_plug(active)
        for length, name in enumerate(names, 3):
            for given in (name, [name] * len(tiny.PROMPTS), [None, *[name] * (len(tiny.PROMPTS) - 1)]):
                assert model.generate(**inputs, **asked, plug=given).shape[1] <= start + length
        long = model.generate(**inputs, **asked | {"min_new_tokens": 4}, plug=names[1])
        assert long.shape[1] == start + 4, "those of the plug that is named"


@pytest.mark.parametrize("names", MIXES, ids=str)
def test_rows_with_plugs_of_their_own_equal_one_by_one(model, folders, family, names):
    """Generation and loss, with vectors and texts as requests; None is the bare backbone."""
    inputs = inputs_of(family)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(**inputs, persona=tiny.HISTORIES, query=tiny.PROMPTS, plug=names, **options)
    for i, name in enumerate(names):
        row = row_of(family, tiny.PROMPTS[i])
        if name is None:
            single = model.backbone.generate(**row, **options)
        else:
            single = folders[name][2].generate(**row, persona=[tiny.HISTORIES[i]], query=[tiny.PROMPTS[i]], **options)
        assert together[i, -6:].tolist() == single[0, -6:].tolist()


def test_gradients_reach_the_plug_of_the_row_alone(model, family):
    inputs = inputs_of(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    loss = model(
        **inputs, labels=labels, persona=tiny.HISTORIES, query=tiny.PROMPTS, plug=["wide", "default", None]
    ).loss
    loss.backward()
    wide, bare = model.personalizers["wide"].plug, model.personalizers["bare"].plug
    assert wide.projector.output.weight.grad.abs().sum() > 0
    assert model.plug.projector.output.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in bare.parameters())
    for plug in (wide, model.plug):
        plug.zero_grad()


def test_saving_writes_the_active_plug(model, folders, tmp_path):
    model.set_plug("wide")
    model.save_pretrained(tmp_path / "again")
    weights = [load_file(place / "model.safetensors") for place in (folders["wide"][0], tmp_path / "again")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_deleting(model):
    model.delete_plug("wide")
    assert list(model.plugs) == ["default", "bare", "other"]
    with pytest.raises(ConfigurationError, match="'default' is active: call set_plug first, with one of bare, other"):
        model.delete_plug("default")
    model.set_plug("bare")
    model.delete_plug("default")
    model.delete_plug("other")
    with pytest.raises(ConfigurationError, match=r"'bare' is the only plug; the backbone alone is model\.backbone"):
        model.delete_plug("bare")


def test_unknown_names(model, family):
    inputs = inputs_of(family)
    for call in (
        lambda: model.set_plug("films"),
        lambda: model.delete_plug("films"),
        lambda: model.generate(**inputs, persona=None, plug="films"),
        lambda: model.generate(**inputs, persona=None, plug=["default", "films", None]),
    ):
        with pytest.raises(ConfigurationError, match="no plug 'films'; loaded are default, wide, bare, other"):
            call()


def test_names_per_row(model, family):
    with pytest.raises(MismatchError, match="Got 2 plugs for 3 prompts"):
        model.generate(**inputs_of(family), persona=None, plug=["default", None])
    with pytest.raises(MismatchError, match="Got 2 personas for 3 prompts"):
        model.generate(**inputs_of(family), persona=tiny.HISTORIES[:2], plug=["default", None, None])
    with pytest.raises(MismatchError, match="Got 1 queries for 3 prompts"):
        model.generate(**inputs_of(family), persona=None, query="rain", plug=["default", None, None])


@pytest.mark.parametrize("name", ["default", "", 3])
def test_names_that_cannot_be_given(model, folders, name):
    with pytest.raises(ConfigurationError, match=f"a name that is not taken, got {name!r}; taken are default, wide"):
        model.load_plug(folders["wide"][0], name)


def test_a_plug_for_another_backbone(model, family, tmp_path):
    other = "gpt2" if family != "gpt2" else "t5"
    tiny.model(other).save_pretrained(tmp_path / "foreign")
    with pytest.raises(MismatchError, match="made for the backbone"):
        model.load_plug(tmp_path / "foreign", "foreign")
    with pytest.raises(ConfigurationError, match="leave backbone= out"):
        model.load_plug(tmp_path / "foreign", "foreign", backbone=model.backbone)
    assert "foreign" not in model.plugs


def test_a_persona_of_another_encoder_is_refused_by_the_plug_it_is_given_to(model, family):
    persona = model.encode_persona(tiny.HISTORY)
    inputs = row_of(family, tiny.PROMPTS[0])
    model.generate(**inputs, persona=persona, plug="wide", max_new_tokens=2)
    with pytest.raises(MismatchError, match="encoded by"):
        model.generate(**inputs, persona=persona, plug="other", max_new_tokens=2)
