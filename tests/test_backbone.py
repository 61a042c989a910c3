"""What a plug needs to know about a language model."""

import pytest
import reference
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification, BertModel, ViTConfig, ViTModel

from pplug_hf.errors import ConfigurationError, MissingFileError
from pplug_hf.modeling.backbone import (
    embedding_norm,
    fingerprint,
    freeze_backbone,
    hidden_size,
    load_backbone,
    origin,
)
from pplug_hf.modeling.prefix import default_position, prefix_order, reorder


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


# ---- loading ----------------------------------------------------------------------------------------------------


def test_a_folder_loads_as_the_model_it_holds(family, places):
    loaded = load_backbone(str(places / family))
    assert type(loaded) is type(tiny.backbone(family))
    for name, weight in tiny.backbone(family).state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert origin(loaded) == (str(places / family), None)


def test_arguments_reach_the_loader(places):
    loaded = load_backbone(str(places / "llama"), dtype="bfloat16", attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16 and loaded.config._attn_implementation == "eager"


def test_a_loaded_model_is_used_as_it_is():
    model = tiny.backbone("gpt2")
    assert load_backbone(model) is model


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "./no/such/folder", "/no/such/folder"])
def test_unknown_names_give_one_clear_error(name):
    with pytest.raises(MissingFileError, match="Cannot load the backbone") as error:
        load_backbone(name)
    remedy = (
        "it is not a Hub id (owner/name). Check the path" if name[0] in "./" else "HF_HUB_OFFLINE is set. Unset it"
    )
    assert name in str(error.value) and "no such folder" in str(error.value) and remedy in str(error.value)
    assert isinstance(error.value, FileNotFoundError) and isinstance(error.value, ValueError)


def test_a_folder_without_weights_is_no_complete_model(tmp_path):
    tiny.backbone("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(MissingFileError, match="not a complete model folder"):
        load_backbone(str(tmp_path))


def test_a_model_that_generates_no_text_is_refused(tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**small, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigurationError, match=r"'vit'.*Options are e.g. t5, bart, gpt2"):
        load_backbone(str(tmp_path / "vit"))
    with pytest.raises(ConfigurationError, match="BertForSequenceClassification"):
        load_backbone(BertForSequenceClassification(BertConfig(**small, vocab_size=9)))
    with pytest.raises(ConfigurationError, match="got int"):
        load_backbone(3)


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ConfigurationError, match=r"is of no type that transformers knows .*nonsense"):
        load_backbone(str(tmp_path))


def test_weights_without_a_language_model_head_are_refused(tmp_path):
    """Loading them would draw a random head without a word."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(**small, vocab_size=9)).save_pretrained(tmp_path / "bert")
    tiny.backbone("llama").model.save_pretrained(tmp_path / "llama")
    for folder, head in (("bert", "cls"), ("llama", "lm_head")):
        with pytest.raises(ConfigurationError, match=f"first {head}.*would stay random"):
            load_backbone(str(tmp_path / folder))


# ---- freezing, measuring ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_frozen_in_training_mode_is_deterministic(family):
    model = tiny.backbone(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    quiet = model(**inputs).logits
    assert not torch.equal(model.train()(**inputs).logits, quiet)  # there was dropout to remove
    freeze_backbone(model)
    assert model.training and torch.equal(model(**inputs).logits, quiet)
    assert not any(p.requires_grad for p in model.parameters())


def test_freezing_leaves_the_configuration_alone(family):
    model = tiny.backbone(family)
    before = model.config.to_dict(), model.generation_config.to_dict()
    freeze_backbone(model)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before


def test_measures(family):
    model = tiny.backbone(family)
    assert hidden_size(model) == 16
    assert embedding_norm(model) / 4 == pytest.approx(reference.scale(model), rel=1e-5)
    assert fingerprint(model) == {
        "model_type": family.removeprefix("flan-"),
        "is_encoder_decoder": family not in tiny.CAUSAL,
        "hidden_size": 16,
        "vocab_size": len(tiny.VOCABULARY),
    }


def test_the_norm_counts_what_the_module_does_to_its_table():
    plain, scaled = tiny.backbone("gpt2"), tiny.backbone("bart")
    for model, factor in ((plain, 1), (scaled, 4)):  # BART multiplies by the root of its width inside the module
        torch.nn.init.constant_(reference.word_table(model).weight, 0.5)
        assert embedding_norm(model) == pytest.approx(factor * 0.5 * 4)


def test_the_norm_leaves_out_rows_that_are_no_tokens():
    model = tiny.backbone("gpt2")
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:10] = 1.0
        table[3] = 0.0  # a padding row
        table[10:] = 100.0  # rows behind the vocabulary
    assert embedding_norm(model, 10) == pytest.approx(4.0)
    assert embedding_norm(model, 10**9) > 100


# ---- where the prefix goes --------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_prefix_order_puts_the_prefix_among_the_real_tokens_and_padding_aside(data):
    P, T, B = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    mask = data.draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B))
    position = [data.draw(st.integers(0, sum(row))) for row in mask]
    pad_left = data.draw(st.booleans())
    shown = data.draw(st.lists(st.lists(st.booleans(), min_size=P, max_size=P), min_size=B, max_size=B))
    expected = []
    for row, own, p in zip(mask, shown, position, strict=True):
        real = [P + t for t in range(T) if row[t]]
        padding = [t for t in range(P) if not own[t]] + [P + t for t in range(T) if not row[t]]
        line = [*real[:p], *(t for t in range(P) if own[t]), *real[p:]]
        expected.append(padding + line if pad_left else line + padding)
    masks = torch.tensor(mask).long(), torch.tensor(position), torch.tensor(shown).view(B, P)
    assert prefix_order(*masks, pad_left).tolist() == expected


def test_reorder_moves_vectors_as_it_moves_numbers():
    order = torch.tensor([[2, 0, 1, 3], [3, 2, 1, 0]])
    prefix, text = torch.tensor([[10], [20]]), torch.tensor([[11, 12, 13], [21, 22, 23]])
    moved = reorder(order, prefix, text)
    assert moved.tolist() == [[12, 10, 11, 13], [23, 22, 21, 20]]
    wide = reorder(order, prefix[..., None].expand(-1, -1, 5), text[..., None].expand(-1, -1, 5))
    assert torch.equal(wide, moved[..., None].expand(-1, -1, 5))


def test_only_a_leading_bos_of_a_causal_model_stays_in_front():
    ids = torch.tensor([[tiny.BOS, 9, 9], [tiny.PAD, tiny.BOS, 9], [9, tiny.BOS, 9], [tiny.PAD] * 3])
    real = (ids != tiny.PAD).long()
    assert default_position(tiny.backbone("llama").config, ids, real).tolist() == [1, 1, 0, 0]
    assert default_position(tiny.backbone("qwen3").config, ids, real).tolist() == [0, 0, 0, 0]  # has no BOS
    assert default_position(tiny.backbone("bart").config, ids, real).tolist() == [0, 0, 0, 0]  # equation (5)
