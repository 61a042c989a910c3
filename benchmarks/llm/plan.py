"""What is trained and asked: settings of plugs, groups of them that train in step, and their order.

A group shares its prompts, its examples and their order, so that its plugs can share the language model's passes
(lockstep.py). Every family is tuned with the same number of learning rates on held-out training users; final plugs take
the best rate of their family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from corpus import SYNTHETIC_USERS, TASKS

OURS: dict[str, Any] = {
    "num_persona_tokens": 4,
    "projector_size": 256,
    "attention_temperature": 0.1,
    "learn_temperature": True,
    "train_input_encoder": False,
}
# Four trials for every family. Bare numbers need larger steps than a projector, which moves all of them at once.
PLUG_RATES = (3e-2, 1e-1, 2e-1, 3e-1)
RATES = {"instruction-only-mlp": PLUG_RATES, "instruction-only": (1e-1, 1.0, 3.0, 10.0)}
SEEDS = (0, 1, 2)
ABLATIONS = ("wrong-user", "nearest-user", "no-history", "top-4", "last-4")


@dataclass(frozen=True)
class Setting:
    """One plug to train.

    Args:
        name: of its row.
        family: whose best learning rate it takes.
        plug: choices of the plug, on top of `OURS`.
        persona: what it is made of: the user's "own" history, "none", or "everybody", one mean vector for all users,
            which gives an instruction the parametrisation of a plug.
        items: which text of an item the encoder reads, see `corpus.ITEMS`.
        dropout: most of a history that is dropped from a training example.
        new_users: share of the training examples that are shown without their histories.
        decay: weight decay.
        rate: learning rate; 0: the best one of its family.
        start: name of the setting of the group "together" from whose weights it goes on, seed by seed.
        ablations: also answer with changed histories.
        greedy: write answers to free-text tasks.
    """

    name: str
    family: str
    plug: Mapping[str, Any] = field(default_factory=dict)
    persona: str = "own"
    items: str = "main"
    dropout: float = 0.5
    new_users: float = 0.0
    decay: float = 0.01
    rate: float = 0.0
    start: str = ""
    ablations: bool = False
    greedy: bool = False


@dataclass(frozen=True)
class Group:
    """Plugs that train in step.

    Args:
        task: folder of the task.
        name: of the group.
        seed: of initialisation, order and drop-out.
        settings: the plugs; none: the language model is asked as it is.
        form: of prompts, see `Corpus.rows`.
        placement: of the soft prompt.
        examples: see `Corpus.examples`.
        tuning: plugs are compared on held-out training users, and not asked anything else.
        level: groups of lower levels go first.
        seeds: of plugs that train in step, each setting once per seed, with the order of `seed`; none: `seed` alone.
        written: splits to which free-text answers are written.
        steps: instead of the schedule's.
        together: tasks whose examples are trained on as one, and which are all asked; none: `task` alone.
    """

    task: str
    name: str
    seed: int = 0
    settings: tuple[Setting, ...] = ()
    form: str = "plain"
    placement: str = "answer"
    examples: str = "all"
    tuning: bool = False
    level: int = 0
    seeds: tuple[int, ...] = ()
    written: tuple[str, ...] = ("dev", "test")
    steps: int = 0
    together: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Folders of all its tasks."""
        return self.together or (self.task,)

    @property
    def key(self) -> str:
        """Name of its file; with several seeds, of its first file."""
        return self.key_of(self.seed)

    def key_of(self, seed: int, task: str = "") -> str:
        """Return the name of the file of a seed, and of another task than the first."""
        return f"{task or self.task}-{self.name}-{seed}".replace(":", ",")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Seeds of its plugs."""
        return self.seeds or (self.seed,)

    @property
    def starts(self) -> set[str]:
        """Names of the plugs from which its own go on."""
        return {s.start for s in self.settings if s.start}

    @property
    def families(self) -> set[str]:
        """Families that have to be tuned before."""
        return set() if self.tuning else {s.family for s in self.settings if not s.rate}


def rates(family: str) -> tuple[float, ...]:
    """Return the learning rates that a family tries."""
    return next((found for name, found in RATES.items() if family.startswith(name)), PLUG_RATES)


def tuned(settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """Return each setting once per learning rate of its family."""
    return tuple(
        replace(s, name=f"{s.family}/{rate:g}", rate=rate, ablations=False, greedy=False)
        for s in settings
        for rate in rates(s.family)
    )


def instruction(name: str, family: str = "", greedy: bool = True, **plug: Any) -> Setting:
    """Return an instruction-only setting."""
    return Setting(name, family or name, plug, persona="none", greedy=greedy)


PPLUG = Setting("pplug", "pplug", ablations=True, greedy=True)
INSTRUCTIONS = (
    instruction("instruction-only"),
    instruction("instruction-only-k8", greedy=False, num_persona_tokens=8),
    Setting("instruction-only-mlp", "instruction-only-mlp", persona="everybody", greedy=True),
    Setting("instruction-only-mlp-k8", "instruction-only-mlp-k8", {"num_persona_tokens": 8}, persona="everybody"),
)
MAIN = (
    *INSTRUCTIONS,
    PPLUG,
    Setting("pplug-k8", "pplug-k8", {"num_persona_tokens": 8}),
    Setting("pplug-mean", "pplug-mean", {"aggregator": "mean"}, greedy=True),
)
SHORT = (INSTRUCTIONS[2], PPLUG)
# One change each, most of them towards the paper.
CHANGES = (
    instruction("instruction-only-k1", "instruction-only", greedy=False, num_persona_tokens=1),
    Setting("pplug-k1", "pplug", {"num_persona_tokens": 1}),
    Setting("pplug-temperature-1", "pplug", {"attention_temperature": 1.0, "learn_temperature": False}),
    Setting("pplug-other-items", "pplug", items="other"),
    Setting("pplug-token-size", "pplug", {"output_init": 1.0}),
    Setting("pplug-no-dropout", "pplug", dropout=0.0),
    Setting("pplug-wide", "pplug", {"projector_size": None}),
    Setting("pplug-rate-1e-4", "pplug", rate=1e-4),
)
QUERY_ENCODER = Setting("pplug-query-encoder", "pplug", {"train_input_encoder": True})
PAPER = Setting(
    "pplug-paper",
    "pplug",
    {
        "num_persona_tokens": 1,
        "projector_size": None,
        "attention_temperature": 1.0,
        "learn_temperature": False,
        "train_input_encoder": True,
    },
    decay=1e-4,
    rate=1e-4,
)


def with_retrieval(form: str) -> tuple[Setting, ...]:
    """Return the settings that train with retrieved items in their prompts."""
    return tuple(
        replace(setting, name=f"{setting.name}+{form}", family=f"{setting.name}+{form}", ablations=False)
        for setting in SHORT
    )


def trained_on(part: str) -> tuple[Setting, ...]:
    """Return the settings that train on a part of the examples."""
    return tuple(replace(s, name=f"{s.name}-{part}", ablations=False, greedy=False) for s in SHORT)


def all_tasks(tasks: tuple[str, ...], level: int, **options: Any) -> Iterator[Group]:
    """Yield the plugs that learn all tasks at once, and those of each task that go on from them."""
    if len(tasks) > 1:
        once = tuple(replace(s, name=f"{s.name}-together", rate=1e-1) for s in SHORT)
        yield Group(tasks[0], "together", settings=once, together=tasks, level=level, **options)
        later = tuple(
            replace(s, name=f"{s.name}-from-together", start=f"{s.name}-together", ablations=False) for s in SHORT
        )
        yield from (Group(t, "from-together", settings=later, level=level + 1, **options) for t in tasks)


IN_FRONT = (replace(PPLUG, name="pplug-in-front", family="pplug-in-front", ablations=False),)
UNTRAINED = ("bm25@1", "bm25@4", "dense@1", "dense@4", "bm25@4:turns")
RETRIEVED = ("bm25@4", "bm25@4:turns")
PARTS = ("questions", "quarter", "half", "real")


def groups(tasks: tuple[str, ...] = TASKS) -> Iterator[Group]:
    """Yield all groups; `level` says in which order they matter. All seeds of a group train in step."""
    for task in tasks:
        yield Group(task, "tune", settings=tuned(MAIN), tuning=True, level=1)
        yield Group(task, "main", settings=(*MAIN, *CHANGES), seeds=SEEDS, level=2)
        yield Group(task, "untrained-plain", level=2)
        yield from (
            Group(task, f"untrained-{form}", form=form, level=3) for form in filter(partial(possible, task), UNTRAINED)
        )
        for form in filter(partial(possible, task), RETRIEVED):
            yield Group(task, f"tune-{form}", settings=tuned(with_retrieval(form)), form=form, tuning=True, level=3)
            yield Group(task, form, settings=with_retrieval(form), form=form, seeds=SEEDS, level=4)
        yield Group(task, "tune-in-front", settings=tuned(IN_FRONT), placement="prompt", tuning=True, level=5)
        yield Group(task, "in-front", settings=IN_FRONT, placement="prompt", seeds=SEEDS, level=6)
        for part in filter(partial(possible, task), PARTS):
            yield Group(task, part, settings=trained_on(part), examples=part, seeds=SEEDS, level=7)
        yield Group(task, "query-encoder", settings=(QUERY_ENCODER,), seeds=SEEDS, level=8)
        yield Group(task, "paper", settings=(PAPER,), placement="prompt", examples="questions", seeds=SEEDS, level=8)
    yield from all_tasks(tasks, 9, seeds=SEEDS)


def possible(task: str, kind: str) -> bool:
    """Return whether a task has it: answers in its items, or synthetic users."""
    if kind in ("bm25@4:turns", "questions"):
        return task != "LaMP_1"
    return task in SYNTHETIC_USERS if kind == "real" else True


# Where eight tokens are much better than four.
SHORT_OF = {"LaMP_2": (*SHORT, Setting("pplug-k8", "pplug", {"num_persona_tokens": 8}))}
RATES_OF = {"LaMP_5": "LaMP_4"}  # tasks that are not tuned, and whose rates they take
CONTROLS = (INSTRUCTIONS[0], replace(INSTRUCTIONS[3], family="instruction-only-mlp"))
FORMS = (
    Setting("pplug-k1", "pplug", {"num_persona_tokens": 1}),
    Setting("pplug-mean", "pplug", {"aggregator": "mean"}),
    Setting("pplug-new-users", "pplug", {"project_no_persona": True}, new_users=0.1, ablations=True),
)


def short(tasks: tuple[str, ...] = TASKS, seeds: tuple[int, ...] = SEEDS) -> Iterator[Group]:
    """Yield groups that a CPU can finish in about an hour each.

    First an instruction in the plug's parametrisation, and the plug with its ablations; then the other controls, forms of
    the plug, one change at a time, retrieved items in the prompts, the soft prompt in front of them, parts of the
    examples, and one plug for all tasks. All seeds of a group train in step.
    """
    for task in tasks:
        form = next(filter(partial(possible, task), reversed(RETRIEVED)))
        others = {form: {"settings": with_retrieval(form), "form": form}}
        others |= {"in-front": {"settings": IN_FRONT, "placement": "prompt"}}
        if task not in RATES_OF:
            trial = partial(Group, task, tuning=True, steps=150)
            yield trial("rates", settings=tuned(SHORT))
            yield trial("rates-bare", settings=tuned(CONTROLS[:1]), level=2)
            for level, (name, what) in enumerate(others.items()):
                yield trial(f"rates-{name}", **{**what, "settings": tuned(what["settings"])}, level=6 + 2 * level)
        main, parts = SHORT_OF.get(task, SHORT), {"controls": CONTROLS, "forms": FORMS, "changes": CHANGES}
        yield Group(task, "short", seeds[0], main, seeds=seeds, written=("test",), level=1)
        for level, (name, settings) in enumerate(parts.items(), 3):
            known = {s.name for s in (*main, *FORMS * (name == "changes"))}
            rest = tuple(s for s in settings if s.name not in known)
            yield Group(task, name, seeds[0], rest, seeds=seeds, written=("test",), level=level)
        for level, (name, what) in enumerate(others.items()):
            yield Group(task, name, seeds[0], **what, seeds=seeds, written=("test",), level=7 + 2 * level)
        for part in filter(partial(possible, task), PARTS):
            what = {"settings": trained_on(part), "examples": part}
            yield Group(task, part, seeds[0], **what, seeds=seeds, written=("test",), level=11)
    yield from all_tasks(tasks, 12, seed=seeds[0], seeds=seeds, written=("test",))
