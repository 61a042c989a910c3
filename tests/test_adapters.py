"""One LoRA per user, on a LoRA of the task or without, and private soft tokens: trained, kept, and answered with."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from bench_data import SHELVES, predictions, quietly, save_plug
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pplug_hf.commands.bench import BenchSettings
from pplug_hf.commands.fit import fit
from pplug_hf.commands.options import FitSettings
from pplug_hf.data.examples import read_examples
from pplug_hf.errors import (
    ConfigurationError,
    DataError,
    MismatchError,
    MissingFileError,
    MissingPackageError,
    StoreError,
)
from pplug_hf.methods import adapter_fit, pair_training
from pplug_hf.methods.adapter_folder import delete_user, open_weights, user_hash
from pplug_hf.methods.artefacts import read_artefact
from pplug_hf.methods.base import Plain, Retrieval
from pplug_hf.methods.names import default_rows, methods_of, name_of
from pplug_hf.methods.persona import Plug
from pplug_hf.methods.resources import Resources
from pplug_hf.methods.user_pairs import Asked

# Of peft, when it loads an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SECRETS = [f"secret{n}" for n in range(16)]


def rows(users, questions=2, start=0):
    """Questions whose histories are nested; the first user has none."""
    made = []
    for number, user in enumerate(users):
        items = [
            {
                "id": f"{user}-{n}",
                "text": f"{tiny.WORDS[n + 10]} {SECRETS[n]}",
                "tag": SHELVES.labels[(n + number) % 3],
            }
            for n in range(2 * number + questions)
        ]
        for q in range(questions):
            history = items[: 2 * number + q] if number else []
            text = f"what is best for the book: {tiny.WORDS[30 + q]} {tiny.WORDS[20 + number]}"
            row = {"id": f"{user}{q}", "user": user, "input": text, "profile": history, "output": SHELVES.labels[q]}
            made.append(row)
    return made


DATA = {"train": rows(["t0", "t1", "t2", "t3", "t4", "t5", "u2"]), "dev": rows(["u0", "u1", "u2", "u3"])}
EXAMPLES = read_examples(DATA, "dev", SHELVES)[1]
FAST = {"epochs": 3, "learning_rate": 0.03, "stop_below": 0.0}
DATA_OF_ONE = {**DATA, "dev": [row for row in DATA["dev"] if row["user"] == "u2"]}


def train(places, output, method="ftp", data=DATA, seed=0, resume=True, backbone="llama", **options):
    if method == "oppu":
        options = {"task_loras": str(Path(output).parent / "task-loras")} | options
    settings = FitSettings(
        method=method,
        data="",
        output=str(output),
        backbone=str(places / backbone),
        seed=seed,
        resume=resume,
        max_length=64,
    )
    made, _ = quietly(settings, fit, task=SHELVES, data=data, **(FAST | options))
    return made


def digests(folder, file="adapter_model.safetensors"):
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob(file)}


def resources(places, backbone="llama", **trained):
    return Resources(SHELVES, backbone=str(places / backbone), trained={k: [str(v)] for k, v in trained.items()})


def rows_of(shared, *names):
    """Answers of rows, in order; checked as a bench does it."""
    found = methods_of(names, shared.plugs, shared.trained)
    answers = []
    for method, *_ in found.values():
        method.check(EXAMPLES, shared)
        method.key(shared)
        answers.append(method.answer(EXAMPLES, shared).texts)
    return answers


@pytest.fixture(scope="module")
def ftp(places, tmp_path_factory):
    """An artefact, and the logits that each user's weights gave when they were trained."""
    folder, logits = tmp_path_factory.mktemp("ftp") / "artefact", {}
    with pytest.MonkeyPatch.context() as patch:
        save = adapter_fit.save_folder

        def saving(place, weights, *rest):
            logits[place.name] = logits_of(weights.language_model)
            save(place, weights, *rest)

        patch.setattr(adapter_fit, "save_folder", saving)
        train(places, folder)
    return folder, logits


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 14)[None]).logits


RELOAD = """
import sys, torch
from peft import PeftModel
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
logits = {}
for place in Path(sys.argv[2]).iterdir():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
    model = PeftModel.from_pretrained(model, place)
    with torch.no_grad():
        logits[place.name] = model(input_ids=torch.arange(5, 14)[None]).logits
save_file(logits, sys.argv[3])
"""


def test_weights_of_all_users_reloaded_in_a_new_process_give_the_logits_they_had(places, ftp, tmp_path):
    """In the released code, all users but the first of a run are answered by the bare model; peft alone loads ours."""
    folder, trained = ftp
    assert set(trained) == {user_hash(user) for user in ("u1", "u2", "u3")}
    command = [sys.executable, "-c", RELOAD, str(places / "llama"), str(folder / "users"), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    reloaded = load_file(tmp_path / "logits")
    bare = logits_of(AutoModelForCausalLM.from_pretrained(places / "llama", attn_implementation="eager").eval())
    assert all(torch.equal(reloaded[user], trained[user]) for user in trained)
    assert all(not torch.equal(reloaded[user], bare) for user in trained)
    first, second, third = trained.values()
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_one_users_weights_after_anothers_are_those_freshly_loaded(places, ftp):
    folder, _ = ftp
    shared = resources(places)
    found = [load_file(path) for path in sorted((folder / "users").glob("*/adapter_model.safetensors"))]
    with open_weights(folder, "ftp", shared, read_artefact(folder).settings) as weights:
        swapped = []
        for state in (*found, found[0]):
            weights.load(state)
            swapped.append(logits_of(shared.language_model))
    for path, logits in zip(sorted((folder / "users").iterdir()), swapped, strict=False):
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(places / "llama").eval(), path)
        assert torch.equal(logits_of(alone), logits)
    assert torch.equal(swapped[0], swapped[3]) and not torch.equal(swapped[0], swapped[1])


def test_files_depend_on_the_user_alone(places, ftp, tmp_path):
    folder, _ = ftp
    expected = digests(folder)
    assert len(expected) == 3
    reversed_users = {**DATA, "dev": DATA["dev"][::-1]}
    train(places, tmp_path / "reversed", data=reversed_users)
    assert digests(tmp_path / "reversed") == expected
    train(places, tmp_path / "alone", data=DATA_OF_ONE)  # in the released code of OPPU, after u1 means: with u1's data
    assert digests(tmp_path / "alone") == {user_hash("u2"): expected[user_hash("u2")]}
    assert train(places, tmp_path / "shards", shard="1/2") is None
    assert len(digests(tmp_path / "shards")) == 1
    with pytest.raises(DataError, match="is not complete"):
        read_artefact(tmp_path / "shards")
    assert train(places, tmp_path / "shards", shard="0/2") is not None
    assert digests(tmp_path / "shards") == expected
    train(places, tmp_path / "seed", seed=1)
    assert not set(digests(tmp_path / "seed").values()) & set(expected.values())


def test_a_killed_training_goes_on_with_the_next_user(places, ftp, tmp_path, monkeypatch):
    folder, _ = ftp
    calls = []

    def killed(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return pair_training.train_on_pairs(*args, **kwargs)

    monkeypatch.setattr(adapter_fit, "train_on_pairs", killed)
    with pytest.raises(KeyboardInterrupt):
        train(places, tmp_path / "killed")
    there = digests(tmp_path / "killed")
    assert len(there) == 1
    torn = tmp_path / "killed" / "users" / ".torn-1f"  # as a kill while writing leaves it
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    train(places, tmp_path / "killed")
    assert len(calls) == 4 and len(set(calls)) == 3  # the second one twice
    assert digests(tmp_path / "killed") == digests(folder)
    assert read_artefact(tmp_path / "killed").digest == read_artefact(folder).digest and not torn.exists()
    train(places, tmp_path / "killed")
    assert len(calls) == 4  # complete
    with pytest.raises(ConfigurationError, match=r"another training; these differ: options.epochs"):
        train(places, tmp_path / "killed", epochs=4)
    train(places, tmp_path / "killed", epochs=1, resume=False)
    assert len(calls) == 7


def test_rows(places, ftp):
    folder, _ = ftp
    shared = resources(places, ftp=folder)
    before = {name: value.clone() for name, value in shared.language_model.state_dict().items()}
    bare, own, other, nobody = rows_of(shared, "no-persona", "ftp", "ftp:wrong-user", "ftp:no-history")
    assert nobody == bare
    assert own[:2] == bare[:2]  # u0 has no items
    assert own[2:] != bare[2:] and own != other
    alone = []
    for e in EXAMPLES[2:]:  # each question by its user's weights, loaded afresh by peft
        model = AutoModelForCausalLM.from_pretrained(places / "llama").eval()
        single = Resources(SHELVES, backbone=model)
        single.processor = shared.processor
        with_weights = PeftModel.from_pretrained(single.language_model, folder / "users" / user_hash(e.user))
        alone += Plain().answer([e], single).texts
        del with_weights
    assert own[2:] == alone
    assert all(torch.equal(value, before[name]) for name, value in shared.language_model.state_dict().items())
    method = methods_of(["ftp"], {}, shared.trained)["ftp"][0]
    assert method.answer(EXAMPLES, shared).counts["without_own_weights"] == 2
    about = method.about(shared)["adapters"]
    assert about["users"] == 3 and about["pairs"] == 2 + 4 + 6 and about["items"] == "common"
    assert about["trained_examples"] == 3 * about["pairs"] and about["weights_per_user"] == 2 * (8 * 3 * 16 + 8 * 32)
    assert about["bytes_per_user"] > 4 * about["weights_per_user"] and about["seconds_per_user"] > 0


def test_nothing_of_the_users_but_weights_is_kept(ftp):
    folder, _ = ftp
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert not any(secret.encode() in kept for secret in SECRETS) and b"u2-1" not in kept
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
        *("method.json", "adapter_model.safetensors", "adapter_config.json", "training.json", ".seconds")
    }
    for path in folder.rglob("adapter_config.json"):
        assert json.loads(path.read_text())["base_model_name_or_path"] is None
        assert str(folder.parent) not in path.read_text()
    record = json.loads((folder / "users" / user_hash("u1") / "training.json").read_text())
    assert record["pairs"] == len(record["items"]) == 2 and record["steps"] == 3


def test_a_user_can_be_deleted(places, ftp, tmp_path):
    folder = shutil.copytree(ftp[0], tmp_path / "ftp")
    before, torn = read_artefact(folder).digest, folder / "users" / f".{user_hash('u2')}-1f"
    torn.mkdir()  # half written
    assert delete_user(folder, "u2") and not delete_user(folder, "u2") and not delete_user(folder, "nobody")
    assert set(digests(folder)) == {user_hash("u1"), user_hash("u3")} and read_artefact(folder).digest != before
    shared = resources(places, ftp=folder)
    bare, own = rows_of(shared, "no-persona", "ftp")
    assert own[4:6] == bare[4:6] and own[2:4] != bare[2:4] and not torn.exists()


def test_a_deletion_that_fails_says_so_and_can_be_repeated(places, ftp, tmp_path, monkeypatch):
    folder = shutil.copytree(ftp[0], tmp_path / "ftp")
    place, unlink = folder / "users" / user_hash("u2"), os.unlink

    def busy(path, **where):
        if str(path).endswith("adapter_model.safetensors"):
            raise PermissionError(13, "in use", path)
        unlink(path, **where)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        with pytest.raises(StoreError, match=rf"{place}' cannot be deleted \(in use\), so they are still there"):
            delete_user(folder, "u2")
    assert (place / "adapter_model.safetensors").is_file()
    shared = resources(places, ftp=folder)
    bare, own = rows_of(shared, "no-persona", "ftp")
    assert own[4:6] == bare[4:6], "they do not count any more"
    assert delete_user(folder, "u2") and not place.exists() and not delete_user(folder, "u2")


def refused(places, name, error, match, examples=EXAMPLES, task=SHELVES, backbone="llama", **trained):
    shared = resources(places, backbone, **trained)
    shared.task = task
    method = methods_of([name], {}, shared.trained)[name][0]
    with pytest.raises(error, match=match):
        method.check(examples, shared)
        method.key(shared)


def test_what_does_not_belong_together_is_refused(places, ftp, tmp_path, monkeypatch):
    folder, _ = ftp
    refused(places, "ftp", MismatchError, "trained on another language model", backbone="qwen3", ftp=folder)
    refused(
        places, "ftp+bm25@1", MismatchError, r"no retrieved items in its prompts.*name the row ftp, or", ftp=folder
    )
    refused(places, "ftp+bm25@1:turns", MismatchError, r"asked with bm25@1:turns: name the row ftp\.$", ftp=folder)
    renamed = replace(SHELVES, max_new_tokens=2)
    refused(places, "ftp", MismatchError, "was trained on the task 'shelves'", task=renamed, ftp=folder)
    fewer = [replace(e, history=e.history[:1]) for e in EXAMPLES]
    refused(places, "ftp", DataError, r"items that these questions do not have.*'u10'", examples=fewer, ftp=folder)
    strangers = [replace(e, user=f"new {e.user}") for e in EXAMPLES]
    for row in ("ftp", "ftp:wrong-user"):
        refused(places, row, DataError, "weights for none of the 4 users", examples=strangers, ftp=folder)
    with pytest.raises(ConfigurationError, match="a ftp takes wrong-user, no-history here"):
        methods_of(["ftp:top-4"], {}, {"ftp": [str(folder)]})

    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    place = torn / "users" / user_hash("u2") / "adapter_model.safetensors"
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged"):
        rows_of(resources(places, ftp=torn), "ftp")
    place.unlink()
    with pytest.raises(DataError, match="is missing"):
        rows_of(resources(places, ftp=torn), "ftp")

    shared = resources(places, ftp=folder)
    shared.chat, shared.system = "never", None
    shared.processor.system = "be brief"
    with pytest.raises(MismatchError, match="pass the same chat and system"):
        methods_of(["ftp"], {}, shared.trained)["ftp"][0].key(shared)
    chats = shutil.copytree(folder, tmp_path / "chats")
    content = json.loads((chats / "method.json").read_text())
    content["settings"]["chat"], content["run"]["chat"] = [True, None], ["one template", None]
    (chats / "method.json").write_text(json.dumps(content))
    shared = resources(places, ftp=chats)
    shared.processor.chat = True
    (method,) = methods_of(["ftp"], {}, shared.trained)["ftp"]
    shared.processor.tokenizer.chat_template = "one template"
    method.key(shared)
    shared.processor.tokenizer.chat_template = "another"
    with pytest.raises(MismatchError, match="trained with another chat template"):
        method.key(shared)
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(places, "ftp", MissingPackageError, r"The row ftp needs peft; .*pplug-hf\[rivals\]", ftp=folder)
    with pytest.raises(MissingPackageError, match="The method ftp needs peft"):
        train(places, tmp_path / "new")


def test_options_that_cannot_work_are_refused(places, tmp_path):
    out = tmp_path / "out"
    for shard in ("2/2", "0", "a/b", "-1/2"):
        with pytest.raises(ConfigurationError, match="write I/N"):
            train(places, out, shard=shard)
    for retrieval in ("bm25", "dense@1", "bm25@0"):
        with pytest.raises(ConfigurationError, match="write RANKER@K"):
            train(places, out, retrieval=retrieval)
    for name in ("epochs", "rank", "items_per_user", "learning_rate"):
        with pytest.raises(ConfigurationError, match=f"{name} is 0; give more than 0"):
            train(places, out, **{name: 0})
    with pytest.raises(ConfigurationError, match=r"in one layer .* as modules='qv' asks: pass modules='qkv'"):
        train(places, out, backbone="gpt2", modules="qv")
    with pytest.raises(MissingFileError, match="no split 'test', whose users"):
        train(places, out, split="test")
    with pytest.raises(DataError, match="No user has an item"):
        train(places, out, data={**DATA, "dev": rows(["u0"])})
    with pytest.raises(DataError, match="No question is left for the LoRA of the task"):
        train(
            places,
            out,
            "oppu",
            data={"train": [r for r in DATA["train"] if r["user"] == "u2"] + rows(["u3"]), "dev": DATA["dev"]},
        )
    assert not out.exists()


def test_rows_without_a_user_are_strangers_to_those_of_another_split():
    """Without ids, too, rows of both splits are numbered from 0."""
    train, dev = (
        [{name: value for name, value in row.items() if name not in ("id", "user")} for row in DATA[split][::step]]
        for split, step in (("train", -1), ("dev", 1))
    )
    data = {"train": train, "dev": dev}
    (_, others), (_, asked) = (read_examples(data, split, SHELVES) for split in data)
    assert {e.user for e in asked} < {e.user for e in others} and not any(e.named for e in (*others, *asked))
    found = adapter_fit._other_questions(others, asked, Asked.of(asked, SHELVES))
    assert found == others
    named = [replace(e, named=True) for e in others]
    assert adapter_fit._other_questions(named, asked, Asked.of(asked, SHELVES)) == named
    both = [replace(e, named=True) for e in asked]
    assert adapter_fit._other_questions(named, both, Asked.of(both, SHELVES)) == named[len(asked) :]


def test_the_union_of_items_leaks_on_request_alone(places, tmp_path):
    artefact = train(places, tmp_path / "leaky", items="union")
    assert artefact.settings["items"] == "union" and artefact.about["pairs"] == 3 + 5 + 7
    rows_of(resources(places, leaky=tmp_path / "leaky"), "leaky")  # not refused, and named so in the results
    assert train(places, tmp_path / "few", items_per_user=1).about["pairs"] == 3


def test_passes_are_chosen_on_held_out_users_of_the_train_split(places, tmp_path):
    artefact = train(places, tmp_path / "held", split="held", epochs=4)
    curve = artefact.about["held_loss_by_pass"]
    assert len(curve) == 5 and len(set(curve)) == 5 and artefact.about["users"] == 1
    assert artefact.run["split"]["held_users"] == 0.1


def test_questions_of_a_held_out_user_are_read_in_batches():
    questions, read = EXAMPLES[:5], []
    fit = adapter_fit.AdapterFit(kind="ftp", private=pair_training.PairTraining(batch_size=2))
    fitting = adapter_fit._Fitting(fit, Path(), SimpleNamespace(task=SHELVES), "", {})

    def loss(prompts, answers, *_):
        read.append((list(prompts), list(answers)))
        return torch.tensor(float(len(read)))

    assert fitting._question_loss(SimpleNamespace(loss=loss), questions) == pytest.approx((2 * 1 + 2 * 2 + 1 * 3) / 5)
    assert [len(prompts) for prompts, _ in read] == [2, 2, 1]
    assert [each for prompts, _ in read for each in prompts] == [e.prompt for e in questions]
    assert [each for _, answers in read for each in answers] == [e.target for e in questions]


# ---- on a LoRA of the task ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oppu(places, tmp_path_factory):
    """An artefact, and the pairs of each training in it."""
    folder, pairs = tmp_path_factory.mktemp("oppu") / "artefact", []
    with pytest.MonkeyPatch.context() as patch:

        def recorded(weights, found, *args, **kwargs):
            pairs.append(list(found))
            return pair_training.train_on_pairs(weights, found, *args, **kwargs)

        patch.setattr(adapter_fit, "train_on_pairs", recorded)
        train(places, folder, "oppu", task_learning_rate=0.02, retrieval="recency@1")
    return folder, pairs


def test_the_lora_of_the_task_learns_from_other_users_alone(oppu):
    _, (task, *private) = oppu
    asked = [row["input"].partition("book: ")[2] for row in DATA["dev"]]
    assert task and len(private) == 3
    train_users = {row["input"].partition("book: ")[2]: row["user"] for row in DATA["train"]}
    assert all(train_users[prompt.rpartition("book: ")[2]] != "u2" for prompt, _ in task)
    assert not any(question in prompt for prompt, _ in private[0] + private[1] + private[2] for question in asked)


def test_prompts_of_another_form_than_in_training_are_refused(places, oppu):
    told = "asked with none: name the row oppu[+]recency@1, or train another artefact without --retrieval"
    refused(places, "oppu", MismatchError, told, oppu=oppu[0])
    told = r"asked with recency@1:turns: name the row oppu[+]recency@1\.$"
    refused(places, "oppu+recency@1:turns", MismatchError, told, oppu=oppu[0])
    shared = resources(places, oppu=oppu[0])
    (control,) = methods_of(["oppu+recency@1:wrong-user"], {}, shared.trained).values()
    control[0].check(EXAMPLES, shared)


def test_the_usual_rows_show_what_the_training_showed(ftp, oppu):
    trained = {"ftp": [str(ftp[0])], "oppu": [str(oppu[0])]}
    rows = default_rows(SHELVES, [], users=3, frequencies=False, dense=False, trained=trained)
    own = [row for row in rows if row.startswith(("ftp", "oppu"))]
    behind = [f"oppu{change}+recency@1" for change in (":wrong-user", ":no-history", "")]
    assert own == ["ftp:wrong-user", "ftp:no-history", "ftp", *behind]
    assert list(methods_of(own, {}, trained)) == own


def test_training_prompts_show_items_before_their_own_place_alone(oppu):
    _, (task, *private) = oppu
    shown = 0
    for pairs in private:
        for prompt, _ in pairs:
            before, _, own = prompt.rpartition("what is best for the book: ")
            place = tiny.WORDS.index(own.split()[0]) - 10
            assert before.split(" in ")[0] == (tiny.WORDS[place + 9] if place else "")  # the newest one before it
            shown += bool(before)
    assert shown == (2 + 4 + 6) - 3
    assert any(" in " in prompt for prompt, _ in task)


def test_the_private_lora_stands_on_the_lora_of_the_task(places, oppu, tmp_path):
    folder, _ = oppu
    shared = resources(places, oppu=folder)
    before = {name: value.clone() for name, value in shared.language_model.state_dict().items()}
    task, own, other = rows_of(shared, "oppu:no-history+recency@1", "oppu+recency@1", "oppu:wrong-user+recency@1")
    assert all(torch.equal(value, before[name]) for name, value in shared.language_model.state_dict().items())
    assert own != task and own != other and own[:2] == task[:2]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(places / "llama").eval(), folder / "shared")
    by_peft = Resources(SHELVES, backbone=model.merge_and_unload())
    by_peft.processor = shared.processor
    assert task == Retrieval("recency", 1).answer(EXAMPLES, by_peft).texts
    (bare,) = rows_of(shared, "recency@1")
    assert task != bare
    refused(places, "oppu", MismatchError, r"recency@1 in its prompts.*name the row oppu\+recency@1", oppu=folder)
    torn = shutil.copytree(folder, tmp_path / "torn")
    (torn / "shared" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"'shared/adapter_model\.safetensors' of the artefact .* is damaged"):
        rows_of(resources(places, oppu=torn), "oppu+recency@1")
    refused(places, "oppu+recency@2", MismatchError, "trained with recency@1", oppu=folder)


def test_private_weights_on_a_task_lora_know_nothing_of_other_users(places, oppu, tmp_path):
    folder, _ = oppu
    options = {"task_learning_rate": 0.02, "retrieval": "recency@1"}
    train(places, tmp_path / "new", "oppu", data=DATA_OF_ONE, **options)
    assert digests(tmp_path / "new") == {name: digests(folder)[name] for name in ("shared", user_hash("u2"))}


def test_trainings_share_the_lora_of_the_task(places, oppu, tmp_path, monkeypatch):
    folder, (task, *_) = oppu
    seen = []

    def recorded(weights, found, *args, **kwargs):
        seen.append(list(found))
        return pair_training.train_on_pairs(weights, found, *args, **kwargs)

    monkeypatch.setattr(adapter_fit, "train_on_pairs", recorded)
    options = {"task_learning_rate": 0.02, "retrieval": "recency@1", "task_loras": str(folder.parent / "task-loras")}
    train(places, tmp_path / "rate", "oppu", learning_rate=0.01, **options)
    assert len(seen) == 3 and task not in seen
    assert digests(tmp_path / "rate")["shared"] == digests(folder)["shared"]
    assert digests(tmp_path / "rate")[user_hash("u2")] != digests(folder)[user_hash("u2")]
    assert json.loads((tmp_path / "rate" / "shared" / "training.json").read_text())["pairs"] == len(task)
    for name, other in (("seed", {"seed": 1}), ("task", {"task_learning_rate": 0.01}), ("data", {"retrieval": None})):
        seen.clear()
        train(places, tmp_path / name, "oppu", **options | other)
        assert len(seen) == 4 and digests(tmp_path / name)["shared"] != digests(folder)["shared"]

    template = "{% for m in messages %}{{ m.content }} NAME {% endfor %}"
    for name in ("tell", "show"):  # the same prompts in another template
        model = shutil.copytree(places / "llama", tmp_path / f"llama-{name}")
        (model / "chat_template.jinja").write_text(template.replace("NAME", name))
        seen.clear()
        train(places, tmp_path / f"chat-{name}", "oppu", backbone=model, **options)
        assert len(seen) == 4


# ---- soft tokens ----------------------------------------------------------------------------------------------------


def test_soft_tokens_start_as_the_plugs_and_become_the_users(places, tmp_path):
    plug = save_plug(places, tmp_path / "plug", family="llama", item_template="{tag} {text}", num_persona_tokens=2)
    options = {"plug": plug, "epochs": 1, "learning_rate": 1e-9}
    with pytest.raises(ConfigurationError, match=r"user-tokens cannot be trained with these options: .*plug"):
        train(places, tmp_path / "none", "user-tokens")
    train(places, tmp_path / "start", "user-tokens", **options)
    shared = Resources(
        SHELVES, {"plug": [plug]}, trained={"start": [str(tmp_path / "start")]}, vectors=str(tmp_path / "vectors")
    )
    prompt = load_file(tmp_path / "start" / "users" / user_hash("u2") / "prompt.safetensors")["prompt"]
    own = next(e for e in EXAMPLES if e.user == "u2").history
    model = shared.plug(plug)
    expected = model.soft_prompt([own] * len(own), query=[item["text"] for item in own]).mean(dim=0)
    torch.testing.assert_close(prompt, expected, atol=1e-4, rtol=1e-4)
    nobody = Plug("plug", plug, history="no-history").answer(EXAMPLES, shared).texts
    (start,) = rows_of(shared, "start:no-history")
    assert start == nobody

    kept = shutil.copytree(plug, tmp_path / "kept")
    save_plug(places, plug, seed=1, family="llama", item_template="{tag} {text}", num_persona_tokens=2)
    with pytest.raises(ConfigurationError, match="another training; these differ: plug"):
        train(places, tmp_path / "start", "user-tokens", **options)  # other weights, the same settings
    shutil.copytree(kept, plug, dirs_exist_ok=True)
    train(places, tmp_path / "tokens", "user-tokens", **options | {"epochs": 5, "learning_rate": 0.3})
    shutil.rmtree(plug)  # not needed any more
    shared = resources(places, tokens=tmp_path / "tokens", start=tmp_path / "start")
    trained, other, fresh = rows_of(shared, "tokens", "tokens:wrong-user", "start")
    assert trained[:2] == nobody[:2] and trained != fresh and trained != other
    assert read_artefact(tmp_path / "tokens").about["weights_per_user"] == 3 * 16
    expected = digests(tmp_path / "tokens", "prompt.safetensors")
    assert set(expected) == {"shared", *map(user_hash, ("u1", "u2", "u3"))}


# ---- in a bench -----------------------------------------------------------------------------------------------------


def test_costs_have_the_lora_of_the_task_and_no_history_costs_nothing_of_a_users_own(places, ftp, oppu):
    (_, (task, *private)), own = oppu, sum(FAST["epochs"] * record["pairs"] for record in records_of(ftp[0]))
    shared = resources(places, ftp=ftp[0], oppu=oppu[0])
    names = ["ftp", "ftp:no-history", "oppu+recency@1", "oppu:no-history+recency@1"]
    methods = methods_of(names, {}, shared.trained)
    cost = {name: method.about(shared)["cost"] for name, (method,) in methods.items()}
    passes = {name: one.get("language_model_passes") for name, one in cost.items()}
    # Three passes over the questions of others are the default of oppu.
    assert passes == {
        "ftp": own,
        "ftp:no-history": None,
        "oppu+recency@1": 3 * len(task) + 3 * sum(map(len, private)),
        "oppu:no-history+recency@1": 3 * len(task),
    }
    weights = [(one.get("trained_weights"), one.get("weights_per_user")) for one in cost.values()]
    each = cost["ftp"]["weights_per_user"]
    assert weights == [(None, each), (None, None), (each, each), (each, None)]
    assert sum(value.numel() for value in load_file(oppu[0] / "shared" / "adapter_model.safetensors").values()) == each


def records_of(folder):
    return [json.loads(path.read_text()) for path in Path(folder).glob("users/*/training.json")]


def test_a_bench_checks_every_seed(places, ftp, tmp_path):
    other = shutil.copytree(ftp[0], tmp_path / "other")
    content = json.loads((other / "method.json").read_text())
    content["settings"]["task"]["digest"] = "of another task"
    (other / "method.json").write_text(json.dumps(content))
    for folders in (f"{ftp[0]},{other}", f"{other},{ftp[0]}"):
        given = {"backbone": str(places / "llama"), "trained": [f"ftp={folders}"], "rows": ["no-persona", "ftp"]}
        with pytest.raises(MismatchError, match="other' was trained on the task"):
            quietly(BenchSettings(data="", output=str(tmp_path / "bench"), **given), task=SHELVES, data=DATA)


def test_a_bench_has_their_rows(places, ftp, tmp_path):
    folder, _ = ftp
    settings = BenchSettings(
        data="", output=str(tmp_path / "bench"), backbone=str(places / "llama"), trained=[f"ftp={folder}"], seed=0,
        rows=["no-persona", "ftp:wrong-user", "ftp:no-history", "ftp"],
    )  # fmt: skip
    comparison, printed = quietly(settings, task=SHELVES, data=DATA)
    assert [record["row"] for record in comparison.rows()] == settings.rows and "| ftp:wrong-user " in printed
    assert "Questions of users who have no weights of their own: ftp 2 of 8." in printed
    saved = predictions(tmp_path / "bench")["ftp,0.json"]
    assert saved["about"]["adapters"]["users"] == 3 and saved["about"]["prompts"]["without_own_weights"] == 2
    assert saved["key"]["artefact"] == read_artefact(folder).digest
    _, printed = quietly(settings, task=SHELVES, data=DATA)
    assert "4 of 4 runs are there already." in printed
    assert name_of(methods_of(["ftp:wrong-user"], {}, {"ftp": [str(folder)]})["ftp:wrong-user"][0]) == "ftp:wrong-user"
