"""A backbone is tried before a plug is made for it: what cannot work is refused at once, what can is made right."""

import copy
import logging

import families
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GPT2LMHeadModel, LlavaConfig

from pplug_hf import PPlugModel, PPlugProcessor
from pplug_hf.errors import ConfigurationError
from pplug_hf.modeling import backbone_check
from pplug_hf.modeling.backbone import freeze_backbone
from pplug_hf.modeling.backbone_check import Reading, check_backbone
from pplug_hf.modeling.weight_sample import weight_digests

IDS = torch.tensor([[12, 13, 14, 15, 16]])
ASKED = {"persona": tiny.HISTORY, "query": "sea"}


def plug(backbone, **choices):
    made = tiny.from_backbone(backbone, tiny.shared_encoder(), tokenizer=tiny.tokenizer("llama"), **choices)
    tiny.randomise(made.plug)
    return made


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pplug_hf"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---- embeddings that mean something else than ids ---------------------------------------------------------------


class ScaledGPT2(GPT2LMHeadModel):
    """Multiplies the embeddings of ids in its forward, not in the module, and leaves `inputs_embeds` alone."""

    factor = 3.7

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids) * self.factor
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


def scaled():
    model = tiny.backbone("gpt2")
    model.__class__ = ScaledGPT2
    return model


@torch.no_grad()
@pytest.mark.parametrize("make", [scaled, lambda: families.backbone("pegasus", "encoder-decoder")])
def test_words_and_soft_prompts_are_scaled_as_ids(make, monkeypatch):
    """A soft prompt that is two words' embeddings is these two words, in one forward pass and in generate."""
    bare = make()
    model = plug(copy.deepcopy(bare), instruction=False, num_persona_tokens=2)
    assert check_backbone(model.backbone) == Reading(by_ids=True)
    inner = {"decoder_input_ids": IDS[:, :3]} if bare.config.is_encoder_decoder else {}
    words = backbone_check.word_embeddings(model.backbone)(IDS[:, :2])
    monkeypatch.setattr(model.plug, "forward", lambda *_: words)
    own = bare(input_ids=IDS, attention_mask=torch.ones_like(IDS), **inner).logits
    got = model(IDS[:, 2:], **ASKED, **inner).logits
    torch.testing.assert_close(got, own[:, -got.shape[1] :], atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False}
    for beams in (1, 3):
        answer = bare.generate(IDS, num_beams=beams, **options)
        ours = model.generate(IDS[:, 2:], **ASKED, num_beams=beams, **options)
        assert torch.equal(ours[:, -4:], answer[:, -4:])


def test_a_plug_learns_through_ids():
    model = plug(scaled()).train()
    batch = PPlugProcessor.from_model(model)(
        tiny.PROMPTS, persona=tiny.HISTORIES, query=tiny.PROMPTS, labels=tiny.ANSWERS
    )
    model(**batch).loss.backward()
    assert model.plug.projector.output.weight.grad.any() and not model.backbone._forward_pre_hooks


@torch.no_grad()
def test_layers_that_embed_ids_again_get_those_of_the_words():
    bare = families.backbone("gemma3n_text", "causal")
    model = plug(copy.deepcopy(bare))
    assert model._reading == Reading(by_ids=True, pure=False)
    torch.testing.assert_close(model(IDS, plug=[None]).logits, bare(input_ids=IDS).logits)
    assert not torch.equal(model(IDS, **ASKED).logits, bare(input_ids=IDS).logits)


def test_rows_of_another_length_are_refused_where_padding_is_read():
    model = plug(families.backbone("rwkv", "causal"))
    padded = torch.cat([torch.zeros_like(IDS[:, :1]), IDS[:, 1:]], dim=1)
    assert model(IDS, **ASKED).logits.isfinite().all()
    for call in (model, model.generate):
        with pytest.raises(ConfigurationError, match="Padding changes the answers of the backbone RwkvForCausalLM"):
            call(padded, attention_mask=(padded != 0).long(), **ASKED)


# ---- freezing ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type, kind", [("phimoe", "causal"), ("falcon", "causal"), ("persimmon", "causal")])
def test_freezing_changes_no_answer_and_leaves_no_noise(model_type, kind):
    model = families.backbone(model_type, kind)
    ids = torch.randint(4, families.V, (4, 40), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    freeze_backbone(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    torch.testing.assert_close(model.train()(input_ids=ids).logits, before)


def test_a_layer_that_reads_its_rate_in_the_configuration_is_quiet_while_it_checkpoints():
    model = plug(families.backbone("falcon", "causal"), train_input_encoder=False).train()
    model.gradient_checkpointing_enable()
    batch = {"input_ids": IDS, "labels": IDS, **ASKED}
    assert model(**batch).loss == model(**batch).loss
    assert model.backbone.config.hidden_dropout == 0.2  # as it was


# ---- refused at once --------------------------------------------------------------------------------------------


def test_a_model_that_cannot_generate_from_embeddings_is_refused_before_training():
    model = families.backbone("gemma3", "causal")
    with pytest.raises(
        ConfigurationError, match=r"Gemma3ForConditionalGeneration \(gemma3\) cannot take a soft prompt"
    ):
        plug(model)
    assert plug(model, check_backbone=False)


class Noisy(GPT2LMHeadModel):
    """Noise of its own, at no rate that could be found."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["logits"] = output.logits + torch.randn_like(output.logits) * self.training
        return output


def test_noise_that_stays_is_refused():
    model = tiny.backbone("gpt2")
    model.__class__ = Noisy
    state = torch.get_rng_state()
    with pytest.raises(ConfigurationError, match="it is noisy in training mode"):
        plug(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_check_is_remembered(monkeypatch):
    plug(tiny.backbone("llama"))
    monkeypatch.setattr(backbone_check, "_Check", None)
    plug(tiny.backbone("llama"))


def test_a_vision_language_model_is_loaded_by_its_record(tmp_path):
    text = dict(model_type="llama", vocab_size=families.V, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8)
    vision |= dict(model_type="clip_vision_model", patch_size=4, projection_dim=16)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=6)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "both")
    model = plug(AutoModelForImageTextToText.from_pretrained(tmp_path / "both"))
    model.save_pretrained(tmp_path / "plug")
    again = PPlugModel.from_pretrained(tmp_path / "plug", encoder=tiny.shared_encoder())
    assert torch.equal(again(IDS, **ASKED).logits, model(IDS, **ASKED).logits)
    assert model.generate(IDS, **ASKED, max_new_tokens=3).shape[1] > 5  # the images' few positions are no limit


def test_labels_are_shifted_as_the_backbone_shifts_them():
    model = plug(families.backbone("m2m_100", "encoder-decoder"))
    assert not hasattr(model.backbone, "prepare_decoder_input_ids_from_labels")
    words = backbone_check.word_embeddings(model.backbone)(IDS)
    embeds = torch.cat([model.soft_prompt(**ASKED), words], dim=1)
    torch.testing.assert_close(
        model(IDS, labels=IDS[:, 1:4], **ASKED).loss,
        model.backbone(inputs_embeds=embeds, labels=IDS[:, 1:4].contiguous()).loss,
    )


# ---- provenance -------------------------------------------------------------------------------------------------


def test_a_backbone_that_was_changed_in_memory_is_reported(places, tmp_path, warned):
    backbone = AutoModelForCausalLM.from_pretrained(places / "llama")
    plug(backbone).save_pretrained(tmp_path / "plain")
    PPlugModel.from_pretrained(tmp_path / "plain", encoder=tiny.shared_encoder())
    for dtype in (torch.bfloat16, torch.float16):
        PPlugModel.from_pretrained(tmp_path / "plain", encoder=tiny.shared_encoder(), dtype=dtype)
    assert not warned()

    with torch.no_grad():  # one layer, as a merged adapter changes it
        backbone.model.layers[1].self_attn.q_proj.weight.add_(0.05)
    changed = plug(backbone)
    assert "it was changed in memory" in warned()[0] and len(warned()) == 1
    changed.save_pretrained(tmp_path / "changed")
    PPlugModel.from_pretrained(tmp_path / "changed", encoder=tiny.shared_encoder(), backbone=backbone)
    assert len(warned()) == 1
    PPlugModel.from_pretrained(tmp_path / "changed", encoder=tiny.shared_encoder())
    assert "has other weights than the one that the plug was trained on" in warned()[1]


def test_weights_that_cannot_be_read_have_no_digest():
    with torch.device("meta"):
        assert weight_digests(torch.nn.Linear(2, 2)) == {}
