"""Two processes train what one would: the same losses, the same plug, written once."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import tiny
import torch
from reference import close
from safetensors.torch import load_file
from test_training import make_examples, make_model, make_trainer, plug_of, sentence

from pplug_hf import PPlugProcessor
from pplug_hf.cli import main
from pplug_hf.commands.train import TrainSettings, train
from pplug_hf.data.histories import split_users
from pplug_hf.data.lamp import Example
from pplug_hf.errors import ConfigurationError

TESTS = Path(__file__).parent
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 3}
GROUPED = {"train_sampling_strategy": "group_by_length"}
IN_ORDER = {"train_sampling_strategy": "sequential"}
RUNS = {
    "in any order": {"predict": True, **CHECKPOINTS},
    "resumed": {"resume": "in any order/checkpoint-3"},
    "grouped": {"family": "gpt2", "accumulated": 2, **GROUPED},
    "all of one process are new": {"new": "none", **IN_ORDER},
    "all of one process are new, checkpointing": {"new": "none", "gradient_checkpointing": True, **IN_ORDER},
    "everybody is new": {"new": "nobody"},
}


def launch(*arguments, kind=("--multi_gpu",)):
    """Two processes on the CPU, one thread each; a hang is an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port {port}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, kind), *options.split()]
    run = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=TESTS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of all runs, by two processes together and by one."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    launch(TESTS / "processes.py", two, json.dumps(RUNS))
    for name, options in RUNS.items():
        processes.train(one / name, **options)
    return one, two


def seen(folder, rank=0):
    return json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8"))


def plug(folder, rank=0):
    return load_file(folder / f"plug-{rank}.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(name, runs):
    one, two = (folder / name for folder in runs)
    losses = seen(one)["losses"]
    assert len(set(losses)) == len(losses) == 6
    for rank in (0, 1):
        assert seen(two, rank)["losses"] == pytest.approx(losses, rel=1e-5)
    start = plug_of(make_model(RUNS[name].get("family", "t5"), seed=0))
    moved = set()
    for key, tensor in plug(one).items():
        assert torch.equal(plug(two)[key], plug(two, rank=1)[key])
        close(plug(two)[key] - start[key], tensor - start[key], 1e-3)
        if not torch.equal(tensor, start[key]):
            moved.add(key.split(".")[1])
    # Where nobody has a history, all that learns is the instruction and what stands in for a persona.
    learns = {"instruction", "no_persona"} | (set() if name == "everybody is new" else {"projector", "input_encoder"})
    assert moved == learns


def test_a_resumed_training_of_two_ends_as_theirs_would_have(runs):
    _, two = runs
    for key, tensor in plug(two / "in any order").items():
        close(plug(two / "resumed")[key], tensor, 1e-5)


def test_predictions_come_in_the_order_of_the_questions(runs):
    one, two = (folder / "in any order" for folder in runs)
    assert seen(two)["answers"] == seen(one)["answers"] and len(set(seen(one)["answers"])) > 1


def test_checkpoints_hold_the_plug_and_one_process_writes_them(runs):
    one, two = (folder / "in any order" for folder in runs)
    assert (seen(two)["saves"], seen(two, rank=1)["saves"]) == (2, 0)
    names = {path.name for path in (one / "checkpoint-6").iterdir()} - {"rng_state.pth"}
    assert {path.name for path in (two / "checkpoint-6").iterdir()} == names | {"rng_state_0.pth", "rng_state_1.pth"}
    weights = load_file(two / "checkpoint-6" / "model.safetensors")
    assert set(weights) == set(plug(two)) and all(key.startswith("plug.") for key in weights)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in plug(two).items())
    sizes = [(folder / "checkpoint-6" / "optimizer.pt").stat().st_size for folder in (one, two)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_a_text_is_encoded_by_one_process(runs):
    _, two = runs
    texts = {text for e in make_examples(16, items=12) for text in e.history}
    assert seen(two / "in any order")["encoded"] + seen(two / "in any order", rank=1)["encoded"] == len(texts)
    hashes = [
        tuple(row)
        for path in two.glob("in any order/vectors/*/*.safetensors")
        for row in load_file(path)["sha256"].tolist()
    ]
    assert len(hashes) == len(set(hashes)) == len(texts)


# ---- weights that processes share -----------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [{}, {"aggregator": "mean"}])
def test_a_plug_that_syncs_its_query_encoder_uses_every_weight_and_answers_as_before(choices):
    model = make_model("llama", **choices).train()
    batch = PPlugProcessor.from_model(model)(
        tiny.PROMPTS, persona=[[], [], []], query=tiny.PROMPTS, labels=tiny.ANSWERS
    )
    loss = model(**batch).loss
    model.plug.sync_query_encoder = True
    asked = model(**batch).loss
    asked.backward()
    assert torch.equal(asked, loss)
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert not p.requires_grad or p.grad.any() == (name in ("plug.instruction", "plug.no_persona")), name


def test_embeddings_are_found_where_transformers_looks_for_them():
    model = make_model("t5")
    assert model.get_input_embeddings() is model.backbone.get_input_embeddings()
    assert model.get_output_embeddings() is model.backbone.get_output_embeddings()
    bare = type(model)(model.config)
    assert bare.get_input_embeddings() is None and bare.get_output_embeddings() is None


def test_frozen_weights_are_not_sent_about(tmp_path):
    model = make_model("t5")
    make_trainer(model, tmp_path)
    synced = {name for name, _ in model.named_parameters()} - set(model._ddp_params_and_buffers_to_ignore)
    assert synced == {f"plug.{name}" for name, _ in model.plug.named_parameters()}
    assert {name for name, _ in model.named_buffers()} & set(model._ddp_params_and_buffers_to_ignore)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(stage, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    settings = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    settings |= {"gradient_clipping": "auto", "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    (tmp_path / "zero.json").write_text(json.dumps(settings), encoding="utf-8")
    run = {"family": "llama", "new": "none", **IN_ORDER, **CHECKPOINTS}
    kind = ["--use_deepspeed", "--deepspeed_config_file", tmp_path / "zero.json"]
    launch(TESTS / "processes.py", tmp_path / "two", json.dumps({"run": run}), kind=kind)
    processes.train(tmp_path / "one", **run)
    one, two = tmp_path / "one", tmp_path / "two" / "run"
    assert seen(two)["losses"] == pytest.approx(seen(one)["losses"], rel=1e-5)
    weights = load_file(two / "checkpoint-6" / "model.safetensors")
    for key, tensor in load_file(one / "checkpoint-6" / "model.safetensors").items():
        close(weights.pop(key), tensor, 1e-5)
    assert not weights
    for path in two.glob("checkpoint-6/*/*model_states.pt"):
        state = torch.load(path, weights_only=False)
        assert state["module"] and all(key.startswith("plug.") for key in state["module"])
        assert not state.get("frozen_param_fragments")


# ---- pplug-hf train -----------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(places, tmp_path):
    """Of `pplug-hf train`: 32 users to learn from, one step for each eight, and some to validate on."""
    rng, rows = random.Random(0), []
    while True:
        text, shelf = sentence(rng, 2, 5), rng.choice(["sea", "moon"])
        profile = [{"text": sentence(rng, 2, 5), "shelf": shelf} for _ in range(rng.randint(1, 5))]
        name = str(len(rows))
        rows.append({"id": name, "user": name, "input": f"book {text}", "output": shelf, "profile": profile})
        learning, validating = split_users(
            [Example(r["id"], r["user"], "", "", "", []) for r in rows], 0.1, 1, nearest=True
        )
        if len(learning) == 32 and validating:
            break
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {"name": "shelves", "query_marker": "book", "query_field": "text", "answer_field": "shelf"}
    task |= {"item_template": "{shelf} {text}", "item_template_unlabelled": "{text}"}
    task |= {"labels": ["sea", "moon"], "metric": "accuracy", "max_new_tokens": 3}
    (tmp_path / "task.json").write_text(json.dumps(task), encoding="utf-8")
    given = {"task": tmp_path / "task.json", "data": tmp_path / "data.jsonl", "backbone": places / "t5"}
    given |= {"encoder": places / "encoder", "train_on_histories": False, "train_input_encoder": False}
    given |= {"epochs": 1, "batch_size": 8, "vectors": tmp_path / "vectors"}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def test_the_command_trains_the_same_plug_and_speaks_once(arguments, tmp_path, capsys):
    run = launch("-m", "pplug_hf", "train", *arguments, "--output", tmp_path / "two")
    assert main(["train", *arguments, "--output", str(tmp_path / "one"), "--vectors", str(tmp_path / "again")]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, tensor in one.items():
        close(two[key], tensor, 1e-5)
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1] and "train_settings.json" in names[0]
    said = capsys.readouterr().out
    for line in ("32 questions", "trainable params", "Plug saved", ": validation loss", "Trained ", "Next: "):
        assert run.stdout.count(line) == said.count(line) == 1, line
    # Backbone and encoder, once each: a bar shows 0% once, but 100% twice where a step took long.
    assert run.stderr.count("Loading weights:   0%") == 2


def test_a_batch_that_cannot_be_shared_evenly_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("accelerate.PartialState", lambda **_: SimpleNamespace(num_processes=2, is_main_process=True))
    settings = TrainSettings(data="x", output=str(tmp_path / "plug"), backbone="x", encoder="x", batch_size=9)
    with pytest.raises(ConfigurationError, match=r"batch_size 9 .* 2 processes"):
        train(settings)
    assert not (tmp_path / "plug").exists()
