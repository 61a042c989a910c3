"""The experiment of benchmarks/llm: plugs in step equal plugs alone, and a small run from data to results."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from reference import close

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "llm"))

from corpus import SPLITS, Corpus, Sizes
from lockstep import Reader, compile_parts
from mixture import Mixture
from parts import by_history, by_seen
from plan import Group, Setting, groups, instruction, short, tuned
from run import Board
from training import Personas, Schedule, Trained, batches_of, run, train

from pplug_hf import FitSettings, get_task
from pplug_hf.data.examples import read_examples
from pplug_hf.data.histories import three_way_split
from pplug_hf.data.records import Example
from pplug_hf.modeling.encoders import item_texts

AFTER = [[5, 6], [5, 16, 6], [6]]
ANSWERS = [[20, 21, 1], [22, 1], [23, 24, 1]]


@pytest.fixture(params=["llama", "qwen3", "llama with compiled parts"])
def reader(request):
    backbone = tiny.backbone(request.param.split()[0]).requires_grad_(False)
    if "compiled" in request.param:
        compile_parts(backbone, backend="eager")  # traced as ever, without a minute of C++
    return Reader(backbone, pad=0, budget=40)


@pytest.fixture(params=["apart", "with a common beginning"])
def before(request):
    """Prompts, of which one may be the beginning of the others."""
    return [[7, 8, 9, 10], [11, 12], [13, 14, 15]] if request.param == "apart" else [[7, 8, 9, 10], [7, 8], [7, 8, 9]]


def softs(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, P, 16, generator=generator) for P in (2, 0, 5, 3)[:count]]


def alone(reader, before, soft, row, answer):
    """Log-probability of an answer by a pass of its own."""
    words = reader.embed(torch.tensor([*before[row], *AFTER[row], *answer]))
    at = len(before[row])
    embeds = torch.cat([words[:at], soft, words[at:]])[None]
    logits = reader.backbone(inputs_embeds=embeds).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
    return logits[torch.arange(len(answer)), torch.tensor(answer)].sum()


def test_plugs_in_step_are_plugs_alone(reader, before):
    made = [soft.requires_grad_() for soft in softs(4)]
    context = reader.read(before)
    nll = torch.cat([reader.nll(context, [made[j] for j in c], AFTER, ANSWERS) for c in reader.chunks(made, AFTER, 3)])
    expected = torch.stack(
        [torch.stack([-alone(reader, before, s[b], b, ANSWERS[b]) for b in range(3)]) for s in made]
    )
    close(nll, expected)
    found, wanted = torch.autograd.grad(nll.sum(), made[2])[0], torch.autograd.grad(expected.sum(), made[2])[0]
    close(found, wanted)


def test_labels_are_scored_as_if_alone(reader, before):
    labels = [[20, 21, 1], [20, 1], [25, 1], [30, 31, 32, 1], [1]]
    scores = reader.label_log_probs(reader.read(before), softs(3), AFTER, labels)
    expected = [[[alone(reader, before, s[b], b, label) for label in labels] for b in range(3)] for s in softs(3)]
    close(scores, torch.tensor(expected))


def test_greedy_answers_are_those_of_single_steps(reader, before):
    made = reader.greedy(reader.read(before), softs(1)[0], AFTER, end=1, most=5)
    for b in range(3):
        answer: list[int] = []
        for _ in range(5):
            best = max(
                range(len(tiny.VOCABULARY)),
                key=lambda t: alone(reader, before, softs(1)[0][b], b, [*answer, t]).item(),
            )
            if best == 1:
                break
            answer.append(best)
        assert made[b] == answer


def test_batches_are_all_examples_of_a_pass():
    import numpy as np

    schedule = Schedule(steps=5, batch_size=4)
    batches = batches_of(list(range(20)), schedule, np.random.default_rng(0))
    assert sorted(i for batch in batches for i in batch) == list(range(20))
    assert batches == batches_of(list(range(20)), schedule, np.random.default_rng(0))


# ---- from data to results -------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture
def tokenizer():
    made = tiny.tokenizer("qwen3")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def data(tmp_path):
    """Eight users whose titles begin with a word of their own."""
    words = tiny.WORDS
    for split, count in (("train", 8), ("dev", 3), ("test", 3)):
        questions, golds = [], []
        for u in range(count):
            for q in range(2):
                name = f"{split}{u}{q}"
                items = [
                    {
                        "id": f"{name}{i}",
                        "title": f"{words[u]} {words[20 + i]}",
                        "text": f"the {words[20 + i]} is {words[i]}",
                    }
                    for i in range(3)
                ]
                text = f"the {words[10 + q]} of {words[30 + u]}"
                questions.append({"id": name, "input": f"article: {text}", "profile": items, "user_id": f"{split}{u}"})
                golds.append({"id": name, "output": f"{words[u]} {words[10 + q]}"})
        folder = tmp_path / "lamp" / "LaMP_4"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}_questions.json").write_text(json.dumps(questions))
        (folder / f"{split}_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": golds}))
    return tmp_path / "lamp"


def test_a_small_run(data, tokenizer, tmp_path):
    corpus = Corpus(data, "LaMP_4", tiny.shared_encoder(), tokenizer, tmp_path / "work", Sizes(30, 4, 6))
    corpus.rank()
    reader = Reader(tiny.backbone("qwen3").requires_grad_(False), pad=0)
    own = Setting("pplug", "pplug", {"projector_size": 8}, ablations=True, greedy=True)
    bare = instruction("instruction-only", projector_size=8)
    group = Group("LaMP_4", "bm25@1", 0, (own, bare), form="bm25@1")
    schedule = Schedule(steps=60, batch_size=8, validations=2)
    kept = []
    (result,) = run(group, [corpus], reader, tiny.shared_encoder(), lambda _: 3e-2, schedule, 4, kept.append)
    assert set(result["answers"]) == set(SPLITS)
    rows = result["answers"]["test"]
    assert set(rows) == {"pplug", "instruction-only"} | {
        f"pplug:{change}" for change in ("wrong-user", "nearest-user", "no-history", "top-4", "last-4")
    }
    assert rows["pplug"]["nll"] == rows["pplug:top-4"]["nll"] == rows["pplug:last-4"]["nll"]  # three items each
    assert rows["pplug"]["nll"] != rows["pplug:wrong-user"]["nll"]
    assert len(rows["pplug"]["answers"]) == len(corpus.examples("test")) == 6
    for plug in result["plugs"].values():
        assert len(plug["curve"]) == 2 and plug["loss"] == pytest.approx(min(plug["curve"]), abs=1e-5)

    # What the package answers with the plug of the experiment is what the experiment says.
    model = kept[0].model
    examples, dataset = corpus.examples("test"), corpus.dataset("test")
    prompt = corpus.rows("test", "bm25@1")
    for i in (0, 3):
        ids = torch.tensor([prompt.before[i] + prompt.after[i] + prompt.answers[i]])
        labels = ids.clone()
        labels[:, : -len(prompt.answers[i])] = -100
        where = torch.tensor([len(prompt.before[i])])
        inputs = {"persona": [dataset.persona(i)], "query": [examples[i].query], "persona_position": where}
        loss = model(input_ids=ids, labels=labels, **inputs).loss
        assert abs(loss.item() * len(prompt.answers[i]) - rows["pplug"]["nll"][i]) < 1e-3


def test_a_stopped_training_goes_on(data, tokenizer, tmp_path, monkeypatch):
    corpus = Corpus(data, "LaMP_4", tiny.shared_encoder(), tokenizer, tmp_path / "work", Sizes(30, 4, 6))
    reader = Reader(tiny.backbone("qwen3").requires_grad_(False), pad=0)
    settings = Setting("pplug", "pplug", {"projector_size": 8}), instruction("instruction-only", projector_size=8)
    group, kept = Group("LaMP_4", "short", 0, settings, seeds=(0, 1)), tmp_path / "unfinished" / "x.safetensors"

    def trained(steps=12, kept=None):
        schedule = Schedule(steps=steps, batch_size=8, validations=3)
        return train(group, corpus, reader, tiny.shared_encoder(), lambda setting: 3e-2, schedule, kept)

    expected, steps, step = trained(), [], Trained.step

    def stopped(self, done, warmup):
        if len(steps) == 4 * 10:
            raise InterruptedError
        steps.append(done)
        step(self, done, warmup)

    monkeypatch.setattr(Trained, "step", stopped)
    with pytest.raises(InterruptedError):
        trained(kept=kept)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    steps.clear()
    found = trained(kept=kept)
    assert len(steps) == 4 * 4  # of four plugs, from the eighth step on
    for one, other in zip(found, expected, strict=True):
        assert one.curve == other.curve and one.best == pytest.approx(other.best, abs=1e-5)
        for name, weight in other.plug.state_dict().items():
            assert torch.equal(one.plug.state_dict()[name], weight), name
    steps.clear()
    trained(steps=6, kept=kept)  # another training begins anew
    assert len(steps) == 4 * 6


def test_a_plug_for_all_tasks_and_one_that_goes_on_from_it(data, tokenizer, tmp_path):
    folder = data / "LaMP_5"
    folder.mkdir()
    for path in (data / "LaMP_4").iterdir():
        text = path.read_text().replace("LaMP_4", "LaMP_5").replace('"text"', '"abstract"')
        (folder / path.name).write_text(text.replace("article:", "paper:").replace("the ", "a "))
    work, encoder = tmp_path / "work", tiny.shared_encoder()
    corpora = [Corpus(data, name, encoder, tokenizer, work, Sizes(30, 4, 6)) for name in ("LaMP_4", "LaMP_5")]
    both = Mixture(corpora, checks=1)
    for split, count in (("all", 2 * len(corpora[0].examples("all"))), ("val", 2)):
        personas, first = Personas(both, split, "cpu"), count // 2
        assert len(personas.texts) == len(personas.queries) == len(both.rows(split).before) == count
        for i in (0, first - 1, first, count - 1):
            own = Personas(corpora[i // first], split, "cpu")
            histories = [p.batch("main", p.own("main", [at])) for p, at in ((personas, i), (own, i % first))]
            assert torch.equal(*(of[0].items.vectors for of in histories))
            assert both.rows(split).after[i] == corpora[i // first].rows(split).after[i % first]
            assert torch.equal(personas.queries[i], own.queries[i % first])

    board = Board(tmp_path / "out", ("LaMP_4", "LaMP_5"), seeds=(0, 1))
    (together,) = [g for g in board.groups if g.together]
    (later,) = [g for g in board.groups if g.starts and g.task == "LaMP_5"]
    reader = Reader(tiny.backbone("qwen3").requires_grad_(False), pad=0)
    schedule, kept = Schedule(steps=4, batch_size=8, validations=2, validate_on=3), []

    def keep(plug):
        kept.append(plug)
        plug.model.save_pretrained(board.plug(plug.setting.name, plug.seed))

    def asked(group, corpora, rate, keep=kept.append):
        return run(group, corpora, reader, encoder, lambda _: rate, schedule, 4, keep, started=board.plug)

    for task in board.tasks:
        board.claim(f"ready-{task}")
    rates = next(g for g in board.groups if g.name == "rates")
    finished(board, rates, [(family, 0.1, 1.0) for family in ("pplug", "instruction-only-mlp")])
    taken = [board.next("LaMP_5") for _ in range(len(board.groups))]
    assert together in taken and later not in taken  # there is nothing to go on from
    results = asked(together, corpora, 3e-2, keep)
    assert [r["group"] for r in results] == [f"LaMP_{n}-together-{seed}" for n in (4, 5) for seed in (0, 1)]
    assert [r["task"] for r in results] == ["LaMP-4"] * 2 + ["LaMP-5"] * 2
    assert results[0]["answers"]["test"] != results[2]["answers"]["test"]
    for plug in kept:  # asked with what was trained: the mean item of both tasks
        if plug.setting.persona == "everybody":
            (history,) = Personas(corpora[0], "test", "cpu", both).everybody("main", 2)
            torch.testing.assert_close(history.items.vectors, both.mean_item())
    trained = {(plug.setting.name, plug.seed): plug.plug.state_dict() for plug in kept}
    kept.clear()
    asked(later, corpora[1:], 0.0)
    assert len(kept) == 4
    for plug in kept:  # with a learning rate of 0
        before = trained[plug.setting.start, plug.seed]
        assert all(torch.equal(before[name], value) for name, value in plug.plug.state_dict().items())
    assert board.next("LaMP_5").name == "from-together"


def test_prompts_are_the_processors(data, tokenizer, tmp_path):
    corpus = Corpus(data, "LaMP_4", tiny.shared_encoder(), tokenizer, tmp_path, Sizes(30, 4, 6))
    model = tiny.model("qwen3", placement="answer", chat="never")
    model.config.chat, model.tokenizer = True, tokenizer
    from pplug_hf import PPlugProcessor

    e, rows = corpus.examples("dev")[1], corpus.rows("dev")
    batch = PPlugProcessor.from_model(model)(text=[e.prompt], persona=[None], labels=[e.target])
    assert batch["input_ids"][0].tolist() == rows.before[1] + rows.after[1] + rows.answers[1]
    assert batch["persona_position"].tolist() == [len(rows.before[1])]
    assert corpus.rows("dev", "bm25@1").before[1] != rows.before[1]
    assert len(corpus.rows("dev", "bm25@4:turns").before[1]) > len(rows.before[1])


def test_one_history_for_everybody_is_that_of_the_training_in_every_split(data, tokenizer, tmp_path):
    corpus = Corpus(data, "LaMP_4", tiny.shared_encoder(), tokenizer, tmp_path, Sizes(30, 4, 6))
    texts = {text for e in corpus.examples("all") for text in item_texts(e.history, corpus.template("main"))}
    mean = corpus.store(sorted(texts), show_progress=False).mean(dim=0)  # of unit vectors
    for split in ("all", "val", "test"):
        (history,) = Personas(corpus, split, "cpu").everybody("main", 5)
        torch.testing.assert_close(history.items.vectors[0], mean)
        assert history.items.mask.tolist() == [[True]] * 5


def test_plugs_for_selectors_know_none_of_the_users_whom_selectors_learn_from(data, tokenizer, tmp_path):
    _, train = read_examples(data / "LaMP_4", "train")
    shares = three_way_split(train, FitSettings.select_users, FitSettings.held_users, FitSettings.split_seed)
    encoder, sizes = tiny.shared_encoder(), Sizes(1000, 1000, 6)
    corpus = Corpus(data, "LaMP_4", encoder, tokenizer, tmp_path, sizes, for_selectors=True)
    assert set(corpus.users("all")) == {e.user for e in shares.fit}
    assert set(corpus.users("val")) == {e.user for e in shares.held}
    usual = Corpus(data, "LaMP_4", encoder, tokenizer, tmp_path, sizes)
    assert {e.user for e in shares.select} & set(usual.users("all"))


def test_questions_are_divided_by_what_training_had_and_by_history():
    task = get_task("LaMP-4")

    def example(user, text, items):
        history = [{"title": "t", "text": words} for words in items]
        return Example(id=text, user=user, prompt=f"article: {text}", query=text, target="t", history=history)

    train = [example("a", "Asked  before", ["In a history"])]
    users, texts = "bcdb", ("asked before", "in a history", "new", "newer")
    examples = [example(u, text, ["x"] * {"b": 9, "c": 1, "d": 5}[u]) for u, text in zip(users, texts, strict=True)]
    seen = by_seen(task, train, examples)
    assert seen["seen"].tolist() == [True, True, False, False] and seen["unseen"].tolist() == [
        False,
        False,
        True,
        True,
    ]
    parts = by_history(task, train, examples)
    assert {name: np.flatnonzero(mask).tolist() for name, mask in parts.items()} == {
        "1 to 1 items": [1],
        "5 to 5 items": [2],
        "9 to 9 items": [0, 3],
    }


# ---- who does what ---------------------------------------------------------------------------------------------------


def finished(board, group, losses):
    plugs = {f"{family}/{rate}": {"family": family, "rate": rate, "loss": loss} for family, rate, loss in losses}
    board.path(group.key).parent.mkdir(exist_ok=True)
    board.path(group.key).write_bytes(gzip.compress(json.dumps({"plugs": plugs}).encode()))


def test_groups_wait_for_their_learning_rates(tmp_path):
    board = Board(tmp_path, ("LaMP_2",))
    assert board.next("LaMP_2") is None  # nothing is encoded
    board.claim("ready-LaMP_2")
    tune = board.next("LaMP_2")
    assert tune.name == "tune"
    taken = {board.next("LaMP_2").name for _ in range(3)}
    assert taken == {"untrained-plain", "untrained-dense@1", "untrained-dense@4"}
    families = {setting.family for setting in tune.settings}
    finished(board, tune, [(family, rate, abs(rate - 0.01)) for family in families for rate in (0.003, 0.01)])
    assert board.rate("LaMP_2", "pplug") == 0.01
    assert board.next("LaMP_2").name == "main"
    again = Board(tmp_path, ("LaMP_2",))
    again.clear()  # of a run that was stopped: what is finished stays
    assert again.claim(tune.key) is False
    again.claim("ready-LaMP_2")
    assert {again.next("LaMP_2").name for _ in range(2)} == {"untrained-plain", "main"}


def test_a_process_waits_for_what_others_do_and_for_nothing_else(tmp_path):
    board = Board(tmp_path, ("LaMP_5",), seeds=(0,))  # takes the learning rates of LaMP-4
    assert not board.is_busy() and board.next("LaMP_5") is None
    board.claim("ready-LaMP_5-begun")
    assert board.is_busy()
    (board.claims / "ready-LaMP_5-begun").unlink()
    board.claim("ready-LaMP_5")
    assert board.next("LaMP_5") is None and not board.is_busy()
    rates = Group("LaMP_4", "rates", tuning=True)
    finished(board, rates, [(family, 0.1, 1.0) for family in ("pplug", "instruction-only-mlp")])
    taken = board.next("LaMP_5")
    assert taken.name == "short" and board.is_busy()
    finished(board, taken, [])
    assert not board.is_busy()


def test_a_learning_rate_is_known_when_all_trials_are_finished(tmp_path):
    board = Board(tmp_path, ("LaMP_4",), seeds=(0,))
    finished(board, Group("LaMP_4", "rates-earlier", tuning=True), [("pplug", 0.1, 2.0)])  # of another run
    assert board.rate("LaMP_4", "pplug") is None
    finished(board, next(g for g in board.groups if g.name == "rates"), [("pplug", 0.2, 1.0)])
    assert board.rate("LaMP_4", "pplug") == 0.2


def test_families_have_as_many_trials():
    for group in (*groups(), *short()):
        if group.tuning:
            counts = [sum(s.family == family for s in group.settings) for family in {s.family for s in group.settings}]
            assert set(counts) == {4}
    assert len(tuned((Setting("a", "a"),))) == 4
    for plan in (groups, short):
        keys = [group.key for group in plan()]
        assert len(keys) == len(set(keys))
