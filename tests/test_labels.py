"""Constrained decoding against loops written by hand, and against the log-probabilities of whole labels."""

import contextlib
import io
import json
from dataclasses import replace

import pytest
import reference
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close
from test_cli import BACKBONE, ENCODER, fails, write_data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pplug_hf.cli import main
from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.methods.constrained import LabelsOnly, label_ids, only_labels
from pplug_hf.methods.decoding import ModelInputs, answer
from pplug_hf.methods.likelihood import label_log_probs, plug_label_log_probs
from pplug_hf.modeling.prompt_cache import PromptCache
from pplug_hf.processing import PPlugProcessor
from pplug_hf.tasks.task import TASKS

# Of one to three tokens; one begins another, two share their first token.
LABELS = ["sea", "the dark", "the dark moon", "the cat", "rain and snow", "book"]
PROMPTS = [*tiny.PROMPTS, "like rain", "write a long story about two fish in the cold sea", "what is it like"]
PERSONAS = [*tiny.HISTORIES, None, tiny.HISTORY[1:], tiny.HISTORY[:1]]


@pytest.fixture(scope="module")
def processor(model):
    return PPlugProcessor.from_model(model)


def tokens(model, label):
    """What the label is for this family, written out."""
    words = [tiny.VOCABULARY.index(word) for word in label.split()]
    return [*([tiny.BOS] if model.backbone.config.model_type == "bart" else []), *words, tiny.EOS]


@torch.no_grad()
def bare_step(backbone, ids):
    """The bare backbone's logits behind the tokens so far, from its forward on one row."""

    def step(so_far):
        if backbone.config.is_encoder_decoder:
            decoder = torch.tensor([[backbone.config.decoder_start_token_id, *so_far]])
            return backbone(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits[0, -1].detach()
        return backbone(input_ids=torch.tensor([[*ids, *so_far]]), use_cache=False).logits[0, -1].detach()

    return step


def step_of(model, prompt, persona):
    """The reference for a row: with a plug, or None for the bare backbone."""
    ids = reference.row(model, prompt)
    if persona is None:
        return bare_step(model.backbone, ids)
    soft = reference.soft_prompt(model, persona, prompt)
    return lambda so_far: reference.next_logits(model, soft, ids, so_far)


def greedy_label(model, step):
    """The definition: at each step the best of the tokens that go on to a label."""
    written = {tuple(tokens(model, label)): label for label in LABELS}

    def rule(said, logits):
        allowed = {row[len(said)] for row in written if list(row[: len(said)]) == said and len(row) > len(said)}
        return torch.tensor([value if i in allowed else -torch.inf for i, value in enumerate(logits.tolist())])

    return written[tuple(reference.greedy(step, 5, tiny.EOS, rule))]


def log_prob(model, step, label):
    row = tokens(model, label)
    return sum(step(row[:t]).log_softmax(-1)[token].item() for t, token in enumerate(row))


def padded(model, side):
    batch = model.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def decoded(processor, generated, batch):
    return processor.decode_answers(generated, batch["input_ids"].shape[1])


# ---- what is said -----------------------------------------------------------------------------------------------


def test_labels_are_tokenised_as_in_training(model, processor):
    expected = [tokens(model, label) for label in LABELS]
    assert label_ids(processor, LABELS) == expected
    trained_on = processor(text=["sea"] * len(LABELS), labels=LABELS)["labels"].tolist()
    assert [[token for token in row if token != -100] for row in trained_on] == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_is_the_best_token_at_each_step(model, processor, side):
    personas = [history or [] for history in PERSONAS]
    batch = padded(model, side)
    said = model.generate(**batch, persona=personas, **only_labels(model, processor, LABELS, batch["input_ids"]))
    steps = [step_of(model, prompt, persona) for prompt, persona in zip(PROMPTS, personas, strict=True)]
    expected = [greedy_label(model, step) for step in steps]
    assert decoded(processor, said, batch) == expected


def test_greedy_of_a_bare_backbone(model, processor):
    batch = padded(model, "right" if model.config.is_encoder_decoder else "left")
    options = only_labels(model.backbone, processor, LABELS, batch["input_ids"])
    said = model.backbone.generate(**batch, **options)
    expected = [greedy_label(model, step_of(model, prompt, None)) for prompt in PROMPTS]
    assert decoded(processor, said, batch) == expected
    assert len(set(expected)) > 1  # else the test would prove nothing


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_beams", [2, 3])
def test_few_beams_say_labels_too(model, processor, side, num_beams):
    batch = padded(model, side)
    for owner, more in ((model, {"persona": PERSONAS}), (model.backbone, {})):
        options = only_labels(owner, processor, LABELS, batch["input_ids"], num_beams)
        several = owner.generate(**batch, **more, **options, num_return_sequences=2)
        said = decoded(processor, several, batch)
        assert len(said) == 2 * len(PROMPTS) and set(said) <= set(LABELS)
        assert all(first != second for first, second in zip(said[::2], said[1::2], strict=True))


@pytest.mark.parametrize("num_beams", [len(LABELS), 10])
def test_enough_beams_rank_the_labels(model, processor, num_beams):
    """Each of them, by its log-probability, whatever its length."""
    batch = padded(model, "right" if model.config.is_encoder_decoder else "left")
    options = only_labels(model.backbone, processor, LABELS, batch["input_ids"], num_beams)
    said = decoded(processor, model.backbone.generate(**batch, **options, num_return_sequences=len(LABELS)), batch)
    log_probs = label_log_probs(model.backbone, processor, PROMPTS, LABELS)
    assert said == [LABELS[i] for row in log_probs for i in row.argsort(descending=True).tolist()]
    assert len({LABELS[i] for i in log_probs.argmax(dim=1)}) > 1


def test_enough_beams_find_a_plugs_most_likely_label(model, processor):
    personas = [history or [] for history in PERSONAS]
    said = answer(
        model.generate,
        processor,
        PROMPTS,
        personas=personas,
        labels=LABELS,
        num_beams=len(LABELS),
        max_new_tokens=6,
        batch_size=4,
    )
    for prompt, persona, label in zip(PROMPTS, personas, said, strict=True):
        step = step_of(model, prompt, persona)
        assert label == max(LABELS, key=lambda each: log_prob(model, step, each))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("placement", ["prompt", "answer"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_plugs_label_scores_are_those_of_a_loop(family, placement, cache):
    model = tiny.model(family, placement=placement)
    model.prompt_cache = PromptCache() if cache and placement == "answer" else None
    personas = [history or [] for history in PERSONAS]
    scores = plug_label_log_probs(model, ModelInputs(PROMPTS, personas), LABELS, batch_size=9)
    processor, model.prompt_cache = PPlugProcessor.from_model(model), None
    for prompt, persona, row in zip(PROMPTS, personas, scores, strict=True):
        pairs = [processor(prompt, persona=persona, labels=label) for label in LABELS]
        losses = [-model(**pair).loss.item() * int((pair["labels"] != -100).sum()) for pair in pairs]
        assert row.tolist() == pytest.approx(losses, abs=2e-4)
        if placement == "prompt":
            step = step_of(model, prompt, persona)
            assert losses == pytest.approx([log_prob(model, step, label) for label in LABELS], abs=2e-4)
    nobody = plug_label_log_probs(model, ModelInputs(PROMPTS, personas, strength=0.0), LABELS)
    close(nobody, plug_label_log_probs(model, ModelInputs(PROMPTS, [[]] * len(PROMPTS)), LABELS))


def test_sampling_says_labels(model, processor):
    batch = padded(model, "right" if model.config.is_encoder_decoder else "left")
    torch.manual_seed(0)
    options = only_labels(model, processor, LABELS, batch["input_ids"])
    several = model.generate(
        **batch, persona=PERSONAS, **options, do_sample=True, temperature=5.0, num_return_sequences=20
    )
    said = set(decoded(processor, several, batch))
    assert said <= set(LABELS) and len(said) > 2


def test_a_single_label_is_always_said(model, processor):
    for num_beams in (1, 4):
        options = {"labels": ["rain and snow"], "num_beams": num_beams, "max_new_tokens": 5}
        assert answer(model.generate, processor, PROMPTS, **options) == ["rain and snow"] * len(PROMPTS)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_answers_of_a_bare_backbone_and_of_a_plug(model, processor, num_beams):
    options = {"max_new_tokens": 6, "num_beams": num_beams, "batch_size": 4}
    free = answer(model.backbone.generate, processor, PROMPTS, **options)
    bare = answer(model.backbone.generate, processor, PROMPTS, labels=LABELS, **options)
    plug = answer(model.generate, processor, PROMPTS, personas=PERSONAS, labels=LABELS, **options)
    assert set(bare) | set(plug) <= set(LABELS)
    assert not set(free) & set(LABELS)
    assert answer(model.backbone.generate, processor, PROMPTS, **options) == free  # nothing is left behind


# ---- any vocabulary ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(1, 3), max_size=4).map(tuple), min_size=1, max_size=6, unique=True),
    st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_what_may_follow(labels, rows, length, start):
    """Token 0 is the end. Against the definition, for answers that are on the way, have ended, or never were."""
    ids = [[*label, 0] for label in labels]
    said = torch.tensor([[9] * start + row[:length] for row in rows]).view(len(rows), start + length)
    scores = torch.randn(len(rows), 6)
    kept = LabelsOnly(ids, start)(said, scores.clone())
    for row, before, after in zip(rows, scores, kept, strict=True):
        follow = {label[length] for label in ids if label[:length] == row[:length] and len(label) > length}
        expected = [value if token in follow else -torch.inf for token, value in enumerate(before.tolist())]
        assert after.tolist() == (expected if follow else [0.0, *[-torch.inf] * 5])


@pytest.fixture(scope="module")
def letters():
    """A GPT-2 whose tokens are bytes, which can write anything."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(["<eos>", *alphabet])}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    config = GPT2Config(vocab_size=257, eos_token_id=0, bos_token_id=0, pad_token_id=0, initializer_range=0.5, **size)
    return GPT2LMHeadModel(config).eval(), PPlugProcessor(tokenizer)


@pytest.mark.parametrize(
    "labels", [["1", "10", "100", "1000"], [" a", " a book", " b"], ["müde", "★★★", "日本", "[1]"]]
)
def test_labels_within_labels_leading_spaces_and_other_scripts(letters, labels):
    backbone, processor = letters
    prompts = [f"prompt {i}: " for i in range(12)]
    log_probs = label_log_probs(backbone, processor, prompts, labels)
    beams = answer(backbone.generate, processor, prompts, labels=labels, num_beams=4, max_new_tokens=10)
    assert beams == [labels[i].strip() for i in log_probs.argmax(dim=1).tolist()]
    greedy = answer(backbone.generate, processor, prompts, labels=labels, max_new_tokens=10)
    assert set(greedy) <= {label.strip() for label in labels}


def test_all_of_lamps_labels(letters):
    backbone, processor = letters
    for task in TASKS.values():
        if task.labels:
            said = answer(backbone.generate, processor, ["a", "b"], labels=task.labels, max_new_tokens=30)
            assert set(said) <= set(task.labels)


# ---- what cannot work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[], "sea", ["sea", 3]])
def test_what_are_no_labels(processor, labels):
    with pytest.raises(DataError, match="give a list of texts"):
        label_ids(processor, labels)


def test_labels_that_cannot_be_told_apart(processor):
    with pytest.raises(DataError, match="same tokens"):
        label_ids(processor, ["sea", "sea "])
    with pytest.raises(ConfigurationError, match=r"cannot write 2 of 3 labels, such as \['sci-fi', 'action'\]"):
        label_ids(processor, ["sea", "sci-fi", "action"])


def test_a_vocabulary_without_an_end():
    tokenizer = tiny.tokenizer("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(ConfigurationError, match="eos_token_id is None"):
        label_ids(PPlugProcessor(tokenizer), ["sea"])


def test_too_few_tokens(model, processor):
    longest = max(len(tokens(model, label)) for label in LABELS)
    answer(model.generate, processor, PROMPTS, labels=LABELS, max_new_tokens=longest)
    with pytest.raises(ConfigurationError, match=f"max_new_tokens is {longest - 1}, and the longest label has"):
        answer(model.generate, processor, PROMPTS, labels=LABELS, max_new_tokens=longest - 1)


def test_another_rule_that_leaves_no_label(model, processor):
    batch = padded(model, "left")
    options = only_labels(model, processor, LABELS, batch["input_ids"])
    with pytest.raises(ConfigurationError, match="forbids every label"):
        model.generate(**batch, persona=PERSONAS, **options, min_new_tokens=4 + (tokens(model, "sea")[0] == tiny.BOS))


def test_whose_generate_it_is_must_be_known(gpt2):
    with pytest.raises(ConfigurationError, match="bound method"):
        answer(lambda **batch: None, PPlugProcessor.from_model(gpt2), PROMPTS, labels=LABELS, max_new_tokens=6)


# ---- on the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data of the demo's readers and a plug that knows nothing."""
    root = tmp_path_factory.mktemp("labels")
    write_data(root / "data")
    tiny.from_backbone(BACKBONE, ENCODER, item_template="{text}").save_pretrained(root / "plug")
    return root


def shelves(place):
    golds = json.loads((place / "data" / "dev_outputs.json").read_text())["golds"]
    return tuple(sorted({gold["output"] for gold in golds}))


def test_evaluate_with_labels_only(place, monkeypatch):
    monkeypatch.setitem(TASKS, "demo", replace(TASKS["demo"], labels=shelves(place)))
    arguments = ["evaluate", "--plug", place / "plug", "--data", place / "data", "--vectors", place / "vectors"]
    counts = {}
    for constrained in ("True", "False"):
        out = place / constrained
        with contextlib.redirect_stdout(io.StringIO()):
            more = ["--output", out, "--constrained", constrained, "--frequencies", "False"]
            assert main([str(a) for a in [*arguments, *more]]) == 0
        counts[constrained] = [row["unparsed"] for row in json.loads((out / "results.json").read_text())["rows"]]
    assert counts["True"] == [0, 0, 0] and sum(counts["False"]) > 0


def test_evaluate_of_a_task_without_labels(place, capsys):
    arguments = ["--plug", place / "plug", "--data", place / "data", "--constrained", "True"]
    fails(capsys, 1, "constrained needs a task with a list of labels, and demo has none", "evaluate", *arguments)


def test_generate_with_labels_only(place, capsys):
    label = shelves(place)[0]
    arguments = ["generate", "--plug", place / "plug", "--prompt", "book: a castle", "--max_new_tokens", "8"]
    assert main([str(a) for a in [*arguments, "--labels", label]]) == 0
    assert capsys.readouterr().out == f"{label}\n"
