"""Backbones loaded through `quantization_config`: only they are quantised, and a plug learns through them."""

import math

import pytest
import tiny
import torch
from reference import close
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, TorchAoConfig

from pplug_hf import PPlugForConditionalGeneration, PPlugModel, PPlugProcessor
from pplug_hf.data.dataset import PersonaDataset
from pplug_hf.data.lamp import Example
from pplug_hf.data.vectors import VectorStore
from pplug_hf.errors import ConfigurationError
from pplug_hf.training import PPlugCollator, PPlugTrainer, PPlugTrainingArguments

FAMILIES = ("llama", "t5")
every_family = pytest.mark.parametrize("family", FAMILIES)


def torchao(name="Int8WeightOnlyConfig", *args, **options):
    return TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)(*args), **options)


def bitsandbytes():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


LIBRARIES = {"torchao": torchao, "bitsandbytes": bitsandbytes}
every_library = pytest.mark.parametrize("library", LIBRARIES)


@pytest.fixture
def encoder(places):
    return str(places / "encoder")


def make(places, family, encoder, config, **options):
    """A plug whose every weight matters, on a quantised backbone, in eval mode."""
    model = tiny.from_backbone(
        str(places / family), encoder, backbone_kwargs={"quantization_config": config, **options}
    )
    tiny.randomise(model.plug)
    return model


def batch_of(model):
    return PPlugProcessor.from_model(model)(
        tiny.PROMPTS, persona=tiny.HISTORIES, query=tiny.PROMPTS, labels=tiny.ANSWERS
    )


def layers(model):
    """(name, weight) of what torchao quantised."""
    return [
        (name, p)
        for name, p in model.backbone.named_parameters()
        if hasattr(p, "dequantize") and type(p.data) is not torch.Tensor
    ]


def rounded(model, places, family):
    """The same plug on an ordinary backbone whose weights are the quantised ones, multiplied out."""
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    backbone = auto.from_pretrained(places / family, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in layers(model):
            backbone.get_parameter(name).copy_(weight.dequantize())
    plain = PPlugForConditionalGeneration(model.config)
    plain.attach(backbone, model.history_encoder, model.tokenizer)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def outputs(model):
    """Logits, loss, and the gradient of every trained tensor by name."""
    model.zero_grad()
    output = model(**batch_of(model))
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return output.logits.detach(), output.loss.item(), gradients


@every_library
@every_family
def test_the_backbone_is_quantised_and_the_plug_is_not(family, library, places, encoder):
    model = make(places, family, encoder, LIBRARIES[library](), dtype="bfloat16")
    assert {p.dtype for p in model.plug.parameters()} == {torch.float32}
    assert {p.dtype for p in model.history_encoder.parameters()} == {torch.float32}
    ordinary = [p for p in model.backbone.parameters() if type(p) is torch.nn.Parameter and p.is_floating_point()]
    assert {p.dtype for p in ordinary} == {torch.bfloat16} and not any(
        p.requires_grad for p in model.backbone.parameters()
    )
    assert 0 < len(ordinary) < len(list(model.backbone.parameters()))
    table = tiny.backbone(family).get_input_embeddings().weight[: len(tiny.VOCABULARY)]
    assert model.config.embedding_norm == pytest.approx(table.norm(dim=1).mean().item(), rel=2e-3)
    # Prefix and words meet in the dtype of the backbone's embeddings.
    seen = []
    model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].dtype), with_kwargs=True
    )
    model(**batch_of(model))
    assert seen == [torch.bfloat16]


@every_family
def test_loss_and_gradients_are_those_of_the_multiplied_out_weights(family, places, encoder):
    model = make(places, family, encoder, torchao())
    assert len(layers(model)) > 10
    logits, loss, gradients = outputs(model)
    expected_logits, expected_loss, expected = outputs(rounded(model, places, family))
    close(logits, expected_logits, 1e-4)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients and all(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        close(gradient, expected[name], 1e-3)


@every_family
def test_quantised_embeddings_are_measured_as_they_are(family, places, encoder):
    table = "shared" if family == "t5" else "model.embed_tokens"
    quantization = pytest.importorskip("torchao.quantization")
    int8 = quantization.IntxWeightOnlyConfig(torch.int8)
    config = torchao("FqnToConfig", {table: int8}, include_input_output_embeddings=True)
    model = make(places, family, encoder, config)
    weight = model.backbone.get_input_embeddings().weight
    assert type(weight) is not torch.nn.Parameter
    rows = weight.dequantize()[: len(tiny.VOCABULARY)].norm(dim=1)
    assert model.config.embedding_norm == pytest.approx(rows.mean().item(), rel=1e-5)
    assert math.isfinite(outputs(model)[1])


@every_library
@every_family
def test_training_saving_and_loading(family, library, places, encoder, tmp_path):
    model = make(places, family, encoder, LIBRARIES[library]())
    frozen = {name: p.clone() for name, p in model.backbone.state_dict().items() if isinstance(p, torch.Tensor)}
    examples = [
        Example(id=str(i), user=str(i), prompt=prompt, query=prompt, target=answer, history=history)
        for i, (prompt, answer, history) in enumerate(zip(tiny.PROMPTS, tiny.ANSWERS, tiny.HISTORIES, strict=True))
    ]
    data = PersonaDataset(examples, VectorStore(model.history_encoder, folder=tmp_path / "vectors"))
    processor = PPlugProcessor.from_model(model)
    arguments = PPlugTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        per_device_train_batch_size=3,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = PPlugTrainer(
        model=model,
        args=arguments,
        data_collator=PPlugCollator(processor),
        processing_class=processor,
        train_dataset=data,
        eval_dataset=data,
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [first, *(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)]
    assert losses == sorted(losses, reverse=True)
    for name, before in frozen.items():
        assert torch.equal(_plain(model.backbone.state_dict()[name]), _plain(before)), name
    assert {p.dtype for p in model.plug.parameters()} == {torch.float32}

    model.save_pretrained(tmp_path / "plug")
    for folder in (tmp_path / "plug", tmp_path / "out" / "checkpoint-12"):
        weights = load_file(folder / "model.safetensors")
        assert set(weights) == set(model.state_dict()) and all(name.startswith("plug.") for name in weights)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert "quant" not in (tmp_path / "plug" / "config.json").read_text(encoding="utf-8")

    model.eval()
    batch = batch_of(model)
    prompts = {"attention_mask": batch["attention_mask"], "persona": tiny.HISTORIES, "query": tiny.PROMPTS}
    answers = model.generate(batch["input_ids"], **prompts, max_new_tokens=5)
    for options in (
        {"quantization_config": LIBRARIES[library]()},
        {"backbone_kwargs": {"quantization_config": LIBRARIES[library]()}},
    ):
        again = PPlugModel.from_pretrained(tmp_path / "plug", **options)
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        assert torch.equal(again.generate(batch["input_ids"], **prompts, max_new_tokens=5), answers)
    # A plug belongs to a backbone, however it is stored.
    whole = PPlugModel.from_pretrained(tmp_path / "plug")
    difference = (whole(**batch).logits - model(**batch).logits).abs()
    assert 0 < difference.max() < 0.2 * model(**batch).logits.abs().max()


def _plain(tensor):
    return tensor.dequantize() if type(tensor) is not torch.Tensor and hasattr(tensor, "dequantize") else tensor


@every_family
def test_a_backbone_that_passes_no_gradient_is_not_trained_on(family, places, encoder, tmp_path):
    model = make(places, family, encoder, torchao("Int8DynamicActivationInt8WeightConfig"))
    trainer = PPlugTrainer(model=model, args=PPlugTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ConfigurationError, match=r"layer '.*[qo]\w*' .* passes no gradient"):
        trainer.create_optimizer()
    ids = torch.tensor([[9, 10]])  # to answer it is good
    assert model.generate(ids, persona=tiny.HISTORY, query="sea", max_new_tokens=3).shape[0] == 1


def test_evaluating_four_bits_does_not_end_the_training(places, encoder, tmp_path):
    """On CPUs with bf16 instructions, bitsandbytes packs such a layer for inference at its first evaluation."""
    config = bitsandbytes()
    layer = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64).to("cpu").requires_grad_(False)
    model = make(places, "llama", encoder, config)
    model.backbone.one_more = layer
    PPlugTrainer(model=model, args=PPlugTrainingArguments(output_dir=str(tmp_path), use_cpu=True)).create_optimizer()
    with torch.no_grad():
        layer.eval()(torch.ones(1, 64))
    x = torch.ones(1, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    assert x.grad is not None and x.grad.any()
