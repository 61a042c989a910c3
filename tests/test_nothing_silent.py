"""What a user may get wrong without noticing is refused, or said."""

import contextlib
import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_own_data import BACKBONE, ENCODER, SPLITS, TASK, make_rows

from pplug_hf import (
    ConfigurationError,
    DataError,
    MissingFileError,
    Persona,
    Personalizer,
    PPlugForConditionalGeneration,
    PPlugProcessor,
    PPlugTrainer,
    TrainSettings,
    train,
)
from pplug_hf.commands.encode import EncodeSettings, encode
from pplug_hf.commands.report import ReportSettings, report
from pplug_hf.commands.train import _RecordRun, choose_examples
from pplug_hf.data.histories import split_users
from pplug_hf.data.records import Example
from pplug_hf.modeling.encoders import load_encoder

SECRET = "my secret diary"


def quietly(function, *arguments, **options):
    """What a function prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        function(*arguments, **options)
    return out.getvalue()


# ---- the same output folder again -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Settings of a training that is complete."""
    root = tmp_path_factory.mktemp("trained")
    settings = TrainSettings(
        data="mine",
        output=str(root / "plug"),
        backbone=BACKBONE,
        encoder=ENCODER,
        vectors=str(root / "vectors"),
        epochs=2,
        batch_size=4,
        validation_users=0.3,
    )
    quietly(train, settings, TASK, SPLITS)
    return settings


def folder_of(settings):
    return {p: p.read_bytes() for p in sorted(Path(settings.output).rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "settings, task, rows, plug, message",
    [
        (
            {"learning_rate": 0.5, "epochs": 9},
            TASK,
            SPLITS,
            {},
            r"differ: epochs \(was 2, is 9\), learning_rate \(was 0.01, is 0.5\)\.",
        ),
        ({}, TASK, {"train": make_rows(7)}, {}, r"these differ: data\. Choose a new output folder, .* --resume False"),
        ({}, replace(TASK, query_marker="Which shelf? book:"), SPLITS, {}, r"these differ: task, data, query_marker"),
        ({}, TASK, SPLITS, {"num_persona_tokens": 3}, r"differ: num_persona_tokens \(was 4, is 3\)\."),
        ({"labelled_items": False}, TASK, SPLITS, {}, r"labelled_items \(was True, is False\), item_template"),
    ],
)
def test_a_training_of_something_else_is_not_resumed(trained, settings, task, rows, plug, message):
    before = folder_of(trained)
    with pytest.raises(ConfigurationError, match="is a checkpoint of another training.*" + message):
        quietly(train, replace(trained, **settings), task, rows, **plug)
    assert folder_of(trained) == before


def test_a_training_that_was_complete_is_named_so(trained):
    before = folder_of(trained)
    printed = quietly(train, trained, TASK, SPLITS)
    assert "Resuming from" in printed and "complete already: nothing was trained now" in printed
    after = folder_of(trained)
    assert all(after[path] == content for path, content in before.items() if path.name == "model.safetensors")
    (run,) = Path(trained.output).glob("*/train_run.json")
    assert not any(text in run.read_text() for text in ("/", "castle", trained.output))


def test_a_training_is_started_again_without_the_checkpoints_of_the_other(trained, tmp_path):
    output = tmp_path / "plug"
    settings = replace(trained, output=str(output), epochs=3)
    quietly(train, settings, TASK, SPLITS)
    (old,) = output.glob("checkpoint-*")
    printed = quietly(train, replace(settings, epochs=1, resume=False, learning_rate=0.01), TASK, SPLITS)
    (new,) = output.glob("checkpoint-*")
    assert "Resuming" not in printed and int(new.name[11:]) < int(old.name[11:])
    run = json.loads((new / "train_run.json").read_text())
    assert run["settings"]["learning_rate"] == 0.01
    (new / "train_run.json").unlink()
    with pytest.raises(ConfigurationError, match="does not record what it was trained on"):
        quietly(train, replace(settings, epochs=1, learning_rate=0.01), TASK, SPLITS)


def test_a_resumed_training_has_used_up_its_patience(trained, tmp_path, monkeypatch):
    settings = replace(trained, epochs=9, patience=3, learning_rate=1e-30)  # no evaluation is better than the first
    whole = quietly(train, replace(settings, output=str(tmp_path / "whole")), TASK, SPLITS)
    save, saved = _RecordRun.on_save, []

    def killed(self, args, state, control, **kwargs):
        save(self, args, state, control, **kwargs)
        saved.append(state.global_step)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_RecordRun, "on_save", killed)
    settings = replace(settings, output=str(tmp_path / "killed"))
    with pytest.raises(KeyboardInterrupt):
        quietly(train, settings, TASK, SPLITS)
    printed = quietly(train, settings, TASK, SPLITS)
    assert f"Resuming from {tmp_path / 'killed'}/checkpoint-{saved[2]}" in printed and len(saved) == 4
    for text in (whole, printed):
        assert f"Trained {saved[3]} steps in" in text


def test_a_checkpoint_that_was_not_completed_is_passed_over(trained, tmp_path, monkeypatch):
    settings = replace(trained, output=str(tmp_path / "plug"), epochs=3)
    save = PPlugTrainer._save_optimizer_and_scheduler

    def killed(self, folder):
        if self.state.epoch == 2:
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PPlugTrainer, "_save_optimizer_and_scheduler", killed)
        quietly(train, settings, TASK, SPLITS)
    old, half = sorted((tmp_path / "plug").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert (old / "train_run.json").is_file() and not (half / "train_run.json").exists()
    (half / "optimizer.pt").write_bytes(b"half")
    printed = quietly(train, settings, TASK, SPLITS)
    assert f"{half} is not complete" in printed and f"Resuming from {old}\n" in printed
    whole = replace(settings, output=str(tmp_path / "whole"))
    assert "is not complete" not in quietly(train, whole, TASK, SPLITS)
    one, other = (load_file(Path(each.output) / "model.safetensors") for each in (settings, whole))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name])


# ---- users to validate on ---------------------------------------------------------------------------------------


def rows_of(users):
    return [Example(f"{i}", f"u{i}", "", "", "", []) for i in range(users)]


def test_validation_takes_the_nearest_number_of_users():
    sizes = {len(split_users(rows_of(32), 0.1, seed, nearest=True)[1]) for seed in range(12)}
    assert sizes == {3} and len({len(split_users(rows_of(32), 0.1, seed)[1]) for seed in range(12)}) > 1
    settings = TrainSettings(data="mine", output="x", backbone="x", encoder="x")
    for seed in range(6):
        made = {}
        printed = quietly(lambda: made.update(v=choose_examples(replace(settings, split_seed=seed), TASK, SPLITS)))  # noqa: B023
        assert len({e.user for e in made["v"][2]}) == 1
        assert (
            "Only 1 held-out users choose the best checkpoint" in printed
            and "raise validation_users (now 0.1)" in printed
        )
    many = {"train": make_rows(3, users=100)}
    assert "held-out users choose" not in quietly(choose_examples, settings, TASK, many)


# ---- histories --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny.model("t5")


@pytest.fixture(scope="module")
def processor(model):
    return PPlugProcessor.from_model(model)


def test_any_sequence_of_texts_is_a_history(model, processor):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    texts = list(tiny.HISTORY)
    table = datasets.Dataset.from_dict({"text": texts})
    forms = {
        "array": lambda: np.array(texts),
        "array of objects": lambda: np.array(texts, dtype=object),
        "Series": lambda: pandas.Series(texts, index=range(5, 5 + len(texts))),
        "column": lambda: table["text"],
        "generator": lambda: (text for text in texts),
        "tuple": lambda: tuple(texts),
    }
    expected = model.encode_persona(texts).vectors
    prefix = model.soft_prompt(texts, query="sea")
    answer = model.generate(**processor(text="sea", persona=texts), max_new_tokens=3)
    for name, make in forms.items():
        made = model.encode_persona(make())
        assert isinstance(made, Persona) and torch.equal(made.vectors, expected), name
        both = model.encode_persona([make(), make()])
        assert len(both) == 2 and all(torch.equal(each.vectors, expected) for each in both), name
        assert torch.equal(model.soft_prompt(make(), query="sea"), prefix), name
        inputs = processor(text="sea", persona=make())
        assert inputs["persona"] == [texts if name != "tuple" else tuple(texts)], name
        assert torch.equal(model.generate(**inputs, max_new_tokens=3), answer), name
        assert len(processor(text=["sea", "sea"], persona=[make(), make()])["persona"]) == 2, name


def test_a_column_of_histories_is_one_for_each_prompt(processor):
    pandas = pytest.importorskip("pandas")
    column = pandas.Series([["a"], ["b", "c"]], index=[7, 8])
    assert processor(text=["sea", "moon"], persona=column)["persona"] == [["a"], ["b", "c"]]


@pytest.mark.parametrize(
    "history, message",
    [
        ({"anna": [SECRET]}, r"got a single dict.*of histories by user.*persona=\[histories\[user\], ...\]"),
        ([SECRET, ""], "History item 1 is an empty text"),
        (["", ""], "History item 0 is an empty text"),
        ([" \n"], "History item 0 is an empty text"),
        ([[None]], "History item 0 is a NoneType"),
        ([[SECRET], {"anna": [SECRET]}], "got a single dict"),
        (np.zeros((2, 12)), "History item 0 is a float64, not a text"),
    ],
)
def test_what_is_no_history(model, processor, history, message):
    def answer():
        rows = len(history) if isinstance(history, list) and not isinstance(history[0], str) else 1
        rows = 2 if isinstance(history, np.ndarray) else rows
        return model.generate(**processor(text=["sea"] * rows, persona=history), max_new_tokens=2)

    for call in (answer, lambda: model.encode_persona(history), lambda: model.soft_prompt(history, query="sea")):
        with pytest.raises(DataError, match=message) as raised:
            call()
        assert SECRET not in str(raised.value)


# ---- encoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_language_model_is_no_encoder(family, tmp_path):
    tiny.backbone(family).save_pretrained(tmp_path)
    tiny.tokenizer(family).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"is a language model \(\w+\), not a sentence encoder: name a"):
        load_encoder(tmp_path)


def test_items_longer_than_the_encoder_reads_are_counted(tmp_path):
    limit = load_encoder(ENCODER).max_seq_length
    long = {"text": "castle " * (limit + 5), "tag": "dark", "date": "2030"}
    short = {**long, "text": "castle " * (limit // 2)}
    rows = [{**row, "profile": [*row["profile"], long, short]} for row in make_rows(4, users=6)]
    message = re.compile(
        rf"1 of (\d+) items are longer than the {limit} tokens that the encoder reads and lose their end"
    )
    vectors = str(tmp_path / "vectors")
    settings = EncodeSettings(encoder=ENCODER, vectors=vectors)
    assert message.search(quietly(encode, settings, TASK, {"train": rows}))
    assert message.search(quietly(report, ReportSettings(data="mine", encoder=ENCODER), TASK, rows))
    assert "encoder" not in quietly(report, ReportSettings(data="mine"), TASK, rows)
    training = TrainSettings(
        data="mine", output=str(tmp_path / "plug"), backbone=BACKBONE, encoder=ENCODER, vectors=vectors, epochs=1
    )
    printed = quietly(train, training, TASK, {"train": rows}, train_input_encoder=False)
    assert message.search(printed)
    # Queries and items are encoded in the same way here, so they share a store, which counts once.
    texts = {TASK.item_text(item) for row in rows for item in row["profile"]} | {
        r["input"].split("book: ")[1] for r in rows
    }
    history = {item["text"] for row in rows for item in row["profile"]}
    stored = int(re.search(r"(\d+) in the vector store", printed)[1])
    assert stored <= len(texts | history) and stored >= len(texts) - 1


# ---- answers ----------------------------------------------------------------------------------------------------


def test_the_prompt_is_not_taken_for_the_answer(processor):
    causal = PPlugProcessor(tiny.tokenizer("gpt2"))
    ids = causal(text="the sea", labels="the moon")["input_ids"]
    with pytest.raises(ConfigurationError, match=r"pass prompt_length=inputs\['input_ids'\]\.shape\[1\], or 0"):
        causal.decode_answers(ids)
    assert causal.decode_answers(ids, 2) == ["the moon"] and causal.decode_answers(ids, 0) == ["the sea the moon"]
    assert processor.decode_answers(processor(text="the sea")["input_ids"]) == ["the sea"]


def test_a_prompt_that_is_cut_is_said_once(processor, caplog, monkeypatch):
    logging.Logger.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("pplug_hf"), "propagate", True)
    for text in ("the sea", "the sea and the moon", "the moon and the sea and the rain"):
        before = processor.tokenizer(text)["input_ids"]
        inputs = processor(text=text, max_length=4)["input_ids"][0].tolist()
        assert inputs == before if len(before) <= 4 else len(inputs) == 4
    said = [record.getMessage() for record in caplog.records if "loses the middle" in record.getMessage()]
    assert said == [
        "A prompt is longer than max_length=4 tokens and loses the middle of its text: raise max_length, or shorten the "
        "prompts."
    ]


def test_the_same_holds_for_a_personalizer(tmp_path):
    model = tiny.from_backbone(BACKBONE, ENCODER)
    model.save_pretrained(tmp_path)
    personalizer = Personalizer.from_pretrained(tmp_path, encoder=ENCODER)
    assert len(personalizer.encode(np.array(["a", "b"]))) == 2
    with pytest.raises(DataError, match="an empty text"):
        personalizer.encode(["a", ""])


# ---- mistakes, by kind ------------------------------------------------------------------------------------------

VECTORS = torch.zeros(2, 12)
WRAP = r"wrap finished vectors as Persona\(vectors, model.personalizer.spec\)"


@pytest.mark.parametrize(
    "persona, message",
    [
        ([1, 2], "History item 0 is an int, not a text"),
        ([VECTORS[0], VECTORS[1]], f"History item 0 is a Tensor, not a text.*{WRAP}"),
        (VECTORS.tolist(), f"History item 0 is a float, not a text.*{WRAP}"),
        (VECTORS.numpy(), f"History item 0 is a float32, not a text.*{WRAP}"),
        (VECTORS, r"got a single Tensor.*Persona\(vectors, model.personalizer.spec\) wraps finished vectors"),
        ([None, 3], "History item 1 is an int, not a text"),
    ],
    ids=["numbers", "tensors", "lists of numbers", "array", "tensor", "no history"],
)
def test_what_is_given_for_one_user_is_named_by_its_type(model, processor, persona, message):
    for call in (
        lambda: processor(text="sea", persona=persona),
        lambda: model.encode_persona(persona),
        lambda: model.soft_prompt(persona, query="sea"),
        lambda: model.generate(**{**processor(text="sea"), "persona": persona}, max_new_tokens=2),
    ):
        with pytest.raises(DataError, match=message):
            call()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"text": None}, "text must be a text or a list of texts, got a NoneType"),
        ({"text": 3}, "text must be a text or a list of texts, got an int"),
        ({"text": {"sea": "moon"}}, "text must be a text or a list of texts, got a dict"),
        ({"text": "sea", "persona": ["moon"], "query": 3}, "query must be a text or a list of texts, got an int"),
        ({"text": [{"role": "user", "content": "sea"}]}, "belongs to a chat: use processor.apply_chat_template"),
        ({"text": [[{"role": "user", "content": "sea"}]]}, "belongs to a chat: use processor.apply_chat_template"),
    ],
)
def test_what_is_no_prompt(processor, given, message):
    with pytest.raises(DataError, match=message):
        processor(**given)


def test_a_prompt_goes_through_the_processor_and_a_soft_prompt_needs_a_query(model):
    with pytest.raises(DataError, match=r"got str: pass a processor's batch as \*\*batch"):
        model.generate("hello", persona=["moon"])
    with pytest.raises(ConfigurationError, match="query= is missing: the items are weighted by it"):
        model.soft_prompt(["moon"])


def test_arguments_that_say_how_to_load_are_refused_for_what_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    parts = model.backbone, model.history_encoder
    given = {"backbone": parts[0], "encoder": parts[1]}
    for what, value in (("dtype", "bfloat16"), ("encodr", "x"), ("device_map", "cpu")):
        options = {what: value}
        with pytest.raises(ConfigurationError, match=f"The backbone is loaded already, and {what} would say"):
            PPlugForConditionalGeneration.from_pretrained(tmp_path, **given, **options)
        with pytest.raises(ConfigurationError, match=f"The backbone is loaded already, and {what} would say"):
            tiny.from_backbone(*parts, tokenizer=model.tokenizer, backbone_kwargs=options)
    with pytest.raises(ConfigurationError, match="The encoder is loaded already, and truncate_dim would say"):
        tiny.from_backbone(*parts, tokenizer=model.tokenizer, encoder_kwargs={"truncate_dim": 4})
    with pytest.raises(ConfigurationError, match=r"loaded already, and revison .* check its spelling"):
        model.load_plug(tmp_path, "late", encoder=parts[1], revison="v2")
    assert list(model.plugs) == ["default"]
    PPlugForConditionalGeneration.from_pretrained(
        tmp_path, **given, dtype="auto", device_map=None
    )  # as transformers' pipelines pass them


def test_how_to_load_the_backbone_is_no_option_of_a_plug():
    for name in ("dtype", "device_map", "revision"):
        with pytest.raises(ConfigurationError, match=rf"Unknown option {name};.*backbone_kwargs=\{{"):
            tiny.from_backbone(BACKBONE, ENCODER, **{name: "auto"})


def test_unknown_options_of_saving_are_refused_before_anything_is_written(model, processor, tmp_path):
    for save in (model.save_pretrained, processor.save_pretrained):
        for name in ("junk", "push_to_hub_", "variant"):
            with pytest.raises(
                ConfigurationError, match=f"save_pretrained got .* argument '{name}': .*commit_message"
            ):
                save(tmp_path / "plug", **{name: "fp16"})
    assert not list(tmp_path.iterdir())
    known = {"max_shard_size": "1GB", "safe_serialization": True, "save_function": torch.save, "variant": None}
    model.save_pretrained(tmp_path / "plug", **known, private=True, token=None)
    processor.save_pretrained(tmp_path / "plug", max_shard_size="1GB", repo_id="me/plug")


def test_an_unknown_dtype_names_the_choices():
    message = "dtype must be one of auto, float32, bfloat16, float16, float64, or a torch.dtype; got 'bf16'"
    with pytest.raises(ConfigurationError, match=message):
        tiny.from_backbone(BACKBONE, ENCODER, backbone_kwargs={"dtype": "bf16"})


@pytest.mark.parametrize(
    "device, message", [("xpu", "is not there: this machine.* has|have"), ("gpu", "as torch does")]
)
def test_an_unknown_device_names_those_that_are_there(model, tmp_path, device, message):
    with pytest.raises(ConfigurationError, match=message):
        model.to(device)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        Personalizer.from_pretrained(tmp_path, encoder=model.history_encoder, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_model_without_a_gpu_stays_where_it_is(model):
    for move in (lambda: model.to("cuda"), model.cuda, lambda: model.cuda(1)):
        with pytest.raises(ConfigurationError, match=r"The device 'cuda(:1)?' is not there: this machine"):
            move()
    assert model.device.type == "cpu" and model.to(torch.float32) is model


def test_a_folder_that_is_not_there():
    with pytest.raises(
        MissingFileError, match=r"the plug './plug-zz': there is no such folder, and it is not a Hub id"
    ):
        PPlugForConditionalGeneration.from_pretrained("./plug-zz")
    with pytest.raises(
        MissingFileError, match=r"'me/plug-zz': there is no such folder, .* HF_HUB_OFFLINE is set. Unset"
    ):
        PPlugForConditionalGeneration.from_pretrained("me/plug-zz")


@pytest.mark.parametrize("task", [None, TASK])
def test_a_table_is_no_data_set_yet(tmp_path, task):
    (tmp_path / "events.csv").write_text("user,text,answer\nann,the sea,yes\n")
    settings = TrainSettings(data=str(tmp_path / "events.csv"), output=str(tmp_path / "x"), backbone="x", encoder="x")
    with pytest.raises(
        DataError, match=r"is a table of events: .* pplug-hf prepare --source .*events.csv, or with from_"
    ):
        quietly(choose_examples, settings, task)
    (tmp_path / "lines.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"pass task=, a .json file with one of your own \(pplug-hf prepare makes it"):
        quietly(choose_examples, replace(settings, data=str(tmp_path / "lines.jsonl")))
