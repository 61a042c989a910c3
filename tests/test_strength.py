"""Strength: P moves along the line from nobody's embedding through the user's, everywhere in the same way."""

import numpy as np
import pytest
import reference
import tiny
import torch
from reference import close
from test_plugs import inputs_of
from transformers import pipeline

from pplug_hf import PPlugProcessor, PromptCache, answer
from pplug_hf.cli import main
from pplug_hf.errors import DataError, MismatchError
from pplug_hf.methods.names import canonical, method_of, name_of
from pplug_hf.methods.persona import Plug

FAMILIES = ("gpt2", "llama", "t5", "bart")
STRENGTHS = [0.0, 0.4, 2.5]
PLUGS = {
    "paper": {},
    "several tokens": {"num_persona_tokens": 3, "projector_size": 5, "attention_temperature": 0.1},
    "mean": {"aggregator": "mean", "instruction": False},
    "answer": {"placement": "answer", "train_input_encoder": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=PLUGS)
def model(request, family):
    return tiny.model(family, **PLUGS[request.param])


def test_the_equation(model):
    P = model.persona_embedding(tiny.HISTORIES, query=tiny.PROMPTS)  # [B, K, H]
    P_0 = model.persona_embedding([None] * 3, query=tiny.PROMPTS)
    made = model.persona_embedding(tiny.HISTORIES, query=tiny.PROMPTS, strength=STRENGTHS)
    for a, row, nobody, result in zip(STRENGTHS, P, P_0, made, strict=True):
        close(result, nobody + a * (row - nobody), 1e-6)
    prompts = model.soft_prompt(tiny.HISTORIES, query=tiny.PROMPTS, strength=STRENGTHS)
    assert torch.equal(prompts[:, -P.shape[1] :], made)
    if model.config.instruction:  # which stays as it is
        assert torch.equal(prompts[:, 0], model.soft_prompt(None, query=["a"])[:, 0].expand(3, -1))


@pytest.mark.parametrize("one", [1, 1.0, [1, 1, 1], np.ones(3), torch.ones(3), torch.tensor(1.0), None])
def test_at_1_everything_is_bit_for_bit_as_trained(model, one):
    plain = model.soft_prompt(tiny.HISTORIES, query=tiny.PROMPTS)
    assert torch.equal(model.soft_prompt(tiny.HISTORIES, query=tiny.PROMPTS, strength=one), plain)


def test_at_0_everybody_is_nobody_bit_for_bit(model):
    nobody = model.soft_prompt([None] * 3, query=tiny.PROMPTS)
    assert torch.equal(model.soft_prompt(tiny.HISTORIES, query=tiny.PROMPTS, strength=0), nobody)


def test_one_strength_per_row_in_forward_and_generate(model, family):
    inputs = inputs_of(family)
    rows = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(3)]
    decoder = {} if family in tiny.CAUSAL else {"decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)}
    together = model(**inputs, persona=tiny.HISTORIES, query=tiny.PROMPTS, persona_strength=STRENGTHS, **decoder)
    answers = model.generate(
        **inputs, persona=tiny.HISTORIES, query=tiny.PROMPTS, persona_strength=STRENGTHS, max_new_tokens=5
    )
    plain = model.generate(**inputs, persona=tiny.HISTORIES, query=tiny.PROMPTS, max_new_tokens=5)
    for i, row in enumerate(rows):
        of_row = {"persona": [tiny.HISTORIES[i]], "query": [tiny.PROMPTS[i]], "persona_strength": STRENGTHS[i]}
        own = {key: value[:1] for key, value in decoder.items()}
        logits = model(**row, **of_row, **own).logits[0, -1]
        close(together.logits[i, -1], logits, 1e-4)
        alone = model.generate(**row, **of_row, max_new_tokens=5)[0]
        assert answers[i][: len(alone)].tolist() == alone.tolist()
    again = model.generate(**inputs, persona=tiny.HISTORIES, query=tiny.PROMPTS, persona_strength=1, max_new_tokens=5)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_in_beams(model, family, options):
    inputs = inputs_of(family)
    users = {"query": tiny.PROMPTS, "max_new_tokens": 4} | options
    nobody = model.generate(**inputs, persona=[None] * 3, **users)
    assert torch.equal(model.generate(**inputs, persona=tiny.HISTORIES, persona_strength=0, **users), nobody)
    n = options.get("num_return_sequences", 1)
    mixed = model.generate(**inputs, persona=tiny.HISTORIES, persona_strength=[0, 1, 1], **users)
    plain = model.generate(**inputs, persona=tiny.HISTORIES, **users)
    L = min(mixed.shape[1], nobody.shape[1], plain.shape[1])
    assert torch.equal(mixed[:n, :L], nobody[:n, :L]) and torch.equal(mixed[n:, :L], plain[n:, :L])


def test_against_the_plain_reference():
    model = tiny.model("gpt2", attention_temperature=0.2)
    ids = tiny.tokenizer("gpt2")(tiny.PROMPTS[0])["input_ids"]
    own, nobody = (reference.soft_prompt(model, history, "sea") for history in (tiny.HISTORY, []))
    soft = nobody + 2 * (own - nobody)
    expected = reference.greedy(lambda so_far: reference.next_logits(model, soft, ids, so_far), 6, tiny.EOS)
    made = model.generate(torch.tensor([ids]), persona=tiny.HISTORY, query="sea", persona_strength=2, max_new_tokens=6)
    assert made[0, len(ids) :].tolist() == expected


def test_with_several_plugs_row_by_row(tmp_path):
    model = tiny.model("gpt2")
    other = tiny.from_backbone(
        tiny.backbone(), tiny.shared_encoder(), tokenizer=tiny.tokenizer(), num_persona_tokens=2
    )
    tiny.randomise(other.plug, 3)
    other.save_pretrained(tmp_path)
    model.load_plug(tmp_path, "other", encoder=tiny.shared_encoder())
    inputs, names = inputs_of("gpt2"), ["other", "default", None]
    together = model.generate(
        **inputs, persona=[tiny.HISTORY] * 3, plug=names, persona_strength=[2, 0.5, 3], max_new_tokens=4
    )
    for i, (name, a) in enumerate(zip(names, [2, 0.5, 3], strict=True)):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        alone = model.generate(**row, persona=[tiny.HISTORY], plug=[name], persona_strength=a, max_new_tokens=4)
        assert together[i].tolist() == alone[0].tolist()


@pytest.mark.parametrize("of", ["gpt2", "t5"])
def test_with_a_prompt_cache(of):
    model = tiny.model(of, placement="answer")
    inputs = inputs_of(of)
    options = {"persona": tiny.HISTORIES, "query": tiny.PROMPTS, "persona_strength": STRENGTHS, "max_new_tokens": 5}
    plain, cache = model.generate(**inputs, **options), PromptCache()
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **options, prompt_cache=cache), plain)


def test_gradients_reach_both_ends_of_the_line():
    model = tiny.model("gpt2").train()
    ids = inputs_of("gpt2")
    users = {"persona": [tiny.HISTORY] * 3, "query": tiny.PROMPTS, "persona_strength": 0.5}
    model(**ids, labels=ids["input_ids"], **users).loss.backward()
    assert model.plug.no_persona.grad.abs().sum() > 0 and model.plug.projector.output.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "strength, error, message",
    [
        (-0.5, DataError, r"finite and at least 0, got -0.5: 0 answers as for nobody, 1 as trained"),
        (float("nan"), DataError, "got nan"),
        ([1, float("inf"), 1], DataError, r"got \[1.0, inf, 1.0\]"),
        ("2", DataError, "is a number, or a list with one per prompt; got a str"),
        (True, DataError, "got a bool"),
        ([[1.0], [1.0], [1.0]], DataError, "got a list"),
        ([1, None, 2], DataError, "got a list"),
        ([1, 2], MismatchError, "Got 2 strengths for 3 prompts"),
    ],
)
def test_what_is_refused(strength, error, message):
    model = tiny.model("gpt2")
    users = {"persona": tiny.HISTORIES, "query": tiny.PROMPTS}
    for plug in (None, ["default", "default", None]):
        with pytest.raises(error, match=message):
            model.generate(**inputs_of("gpt2"), **users, plug=plug, persona_strength=strength)
    with pytest.raises(error, match=message):
        model.soft_prompt(tiny.HISTORIES, query=tiny.PROMPTS, strength=strength)
    with pytest.raises(error, match=message):
        model.persona_embedding(tiny.HISTORIES, query=tiny.PROMPTS, strength=strength)


# ---- the pipeline, the command line, the bench -------------------------------------------------------------------


def test_in_the_pipeline():
    model = tiny.model("gpt2", attention_temperature=0.2)
    pipe = pipeline("personalized-text-generation", model=model)

    def by_hand(prompt, a):
        inputs = PPlugProcessor.from_model(model)([prompt])
        ids = model.generate(**inputs, persona=[tiny.HISTORY], persona_strength=a, query=["sea"], max_new_tokens=5)
        return model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    options = {"persona": tiny.HISTORY, "query": "sea", "max_new_tokens": 5, "return_full_text": False}
    expected = [by_hand(prompt, a) for prompt, a in zip(tiny.PROMPTS, STRENGTHS, strict=True)]
    for batch_size in (1, 3):
        made = pipe(tiny.PROMPTS, persona_strength=STRENGTHS, batch_size=batch_size, **options)
        assert [records[0]["generated_text"] for records in made] == expected
    assert pipe(tiny.PROMPTS[0], persona_strength=2.5, **options) == pipe(
        {"text": tiny.PROMPTS[0], "persona_strength": 2.5}, **options
    )
    assert pipe(tiny.PROMPTS[0], persona_strength=1, **options) == pipe(tiny.PROMPTS[0], **options)
    with pytest.raises(MismatchError, match="Got 2 for persona_strength and 3 prompts"):
        pipe(tiny.PROMPTS, persona_strength=[1, 2], **options)


@pytest.mark.parametrize("labels", [[], ["--labels", *tiny.WORDS]])
def test_on_the_command_line(tmp_path, capsys, labels):
    model = tiny.model("gpt2", attention_temperature=0.2)
    model.backbone.save_pretrained(tmp_path / "backbone")
    model.history_encoder.save(str(tmp_path / "encoder"))
    model.config.backbone, model.config.encoder = str(tmp_path / "backbone"), str(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "plug")
    (tmp_path / "history.txt").write_text("\n".join(tiny.HISTORY))
    (tmp_path / "nobody.json").write_text("[]")
    common = [
        "generate",
        "--plug",
        str(tmp_path / "plug"),
        "--prompt",
        tiny.PROMPTS[0],
        "--max_new_tokens",
        "5",
        *labels,
    ]

    def run(*options):
        assert main([*common, *options]) == 0
        return capsys.readouterr().out

    own = ["--history", str(tmp_path / "history.txt")]
    assert run(*own, "--persona_strength", "0") == run("--history", str(tmp_path / "nobody.json"))
    assert run(*own, "--persona_strength", "1") == run(*own) != run(*own, "--persona_strength", "0")
    for wrong, message in {
        "-1": "--persona_strength must be at least 0",
        "nan": "finite and at least 0, got nan",
    }.items():
        assert main([*common, *own, "--persona_strength", wrong]) == 1
        assert message in capsys.readouterr().err


def test_as_a_row_of_a_bench():
    method = method_of("pplug:strength-1.5+bm25@1", {"pplug": ["runs/pplug"]})
    assert isinstance(method, Plug) and method.strength == 1.5 and method.is_variant
    assert name_of(method) == "pplug:strength-1.5+bm25@1"
    assert name_of(method_of("pplug:strength-0", {"pplug": ["x"]})) == "pplug:strength-0"
    assert name_of(method_of("pplug:strength-1.0", {"pplug": ["x"]})) == "pplug"
    names = ["pplug", "pplug:strength-2", "pplug:strength-0.5"]
    assert canonical(names) == ["pplug:strength-0.5", "pplug:strength-2", "pplug"]


def test_answers_in_batches():
    model = tiny.model("gpt2", attention_temperature=0.2)
    processor, options = PPlugProcessor.from_model(model), {"max_new_tokens": 4, "batch_size": 2}
    nobody = answer(model.generate, processor, tiny.PROMPTS, personas=[None] * 3, **options)
    none = answer(model.generate, processor, tiny.PROMPTS, personas=[tiny.HISTORY] * 3, persona_strength=0, **options)
    assert none == nobody != answer(model.generate, processor, tiny.PROMPTS, personas=[tiny.HISTORY] * 3, **options)
