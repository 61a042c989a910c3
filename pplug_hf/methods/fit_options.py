"""Options of the methods that `pplug-hf fit` trains, besides those that all share. No model library is loaded for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from ..errors import ConfigurationError
from ..storage.layout import ANSWERS_FOLDER, REWARDS_FOLDER, TASK_LORAS_FOLDER

T = TypeVar("T")


def option(default: T, help: str) -> T:
    """Return an option with its default; the help is the one of the command line and of the docs."""
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class RopgOptions:
    """Train a retriever with the answers of the language model."""

    GROUPS: ClassVar = {"candidates_by": "rewards", "trained_side": "training"}

    encoder: str = field(metadata={"help": "Sentence encoder to start from: Hub id or local folder."})
    candidates_by: str = option("dense", "Ranker whose first items are the candidates of each question.")
    candidates: int = option(8, "Candidates per question; a shorter history is used whole (paper: 16).")
    reward: Literal["log_prob", "metric"] = option(
        "log_prob",
        "Reward of an item: the log-probability of the right answer (per token, for texts) with the item in the prompt; or "
        "the metric of the answer that the language model gives then (paper), which costs a generation each.",
    )
    rewards: str = option(REWARDS_FOLDER, "Folder of the reward table, which all trainings and seeds share.")
    trained_side: Literal["query", "both"] = option(
        "query", "Train the encoder of queries and keep the vectors of items, or train one encoder for both (paper)."
    )
    dated_items: bool = option(False, "Show an item's date to the encoder (paper).")
    train_on_histories: bool = option(False, "Make every answered history item one more question.")
    drop_uninformative: bool = option(False, "Leave out questions whose candidates all have the same reward.")
    epochs: int = option(10, "Maximum number of passes over the questions.")
    patience: int = option(3, "Stop after this many passes without a better reward on the held-out users.")
    questions_per_step: int = option(32, "Questions per optimiser step.")
    learning_rate: float | None = option(None, "Learning rate (default: 1e-4 for the query side, 3e-5 for both).")
    warmup: float = option(0.05, "Share of the steps with a rising learning rate; then it falls to zero.")
    temperature: float = option(0.05, "Temperature of the softmax over scores (paper: 1); the start if it is learned.")
    learn_temperature: bool = option(True, "Train that temperature (paper: no).")
    bf16: bool = option(False, "Compute the encoder in bfloat16 while it trains, with float32 weights.")


@dataclass(kw_only=True)
class RopgKdOptions(RopgOptions):
    """Train a retriever to rank items as the rewards of the language model's answers do (ROPG-KD)."""

    loss: Literal["paper", "release"] = option(
        "paper",
        "The paper's divergence; or the one of its authors' code, which takes the softmax of the scores twice.",
    )
    target_temperature: float | None = option(
        None, "Temperature of the softmax over rewards (default: 0.25 for the metric, 1 for log-probabilities)."
    )


@dataclass(kw_only=True)
class RopgRlOptions(RopgOptions):
    """Train a retriever to raise the expected reward of the language model's answers (ROPG-RL)."""

    loss: Literal["exact", "sampled"] = option(
        "exact",
        "The gradient of the expected reward over all candidates, or of one candidate drawn per question (paper).",
    )


@dataclass(kw_only=True)
class RspgOptions:
    """Train a selector, which chooses between rows for each question."""

    GROUPS: ClassVar = {"pool": "pool", "order": "what the selector reads", "epochs": "training"}

    pool: list[str] | None = option(
        None,
        "Rows to choose from, as in bench; of equally good ones the first (default: no-persona, 4 items of each ranker, and "
        "the plugs).",
    )
    plugs: list[str] | None = option(None, "Plugs in the pool, each as NAME=FOLDER.")
    trained: list[str] | None = option(None, "What fit trained and the pool has, each as NAME=FOLDER.")
    encoder: str | None = option(
        None,
        "Sentence encoder to start from, and of the rows dense@K: Hub id or local folder (default: the first plug's).",
    )
    answers: str = option(ANSWERS_FOLDER, "Folder of the pool's answers, which all trainings and seeds share.")
    order: Literal["answer-first", "paper"] = option(
        "answer-first",
        "Order of a text and what is cut if it is too long: the answer, the question, then the prompt, cut at its end; or the "
        "lower-case prompt, then the answer (paper), cut at its start.",
    )
    row_heads: bool = option(
        True,
        "Give each row a part of the head of its own: rows of plugs have the same prompts as no-persona (paper: one head for "
        "all).",
    )
    text_length: int | None = option(None, "Tokens of a text (default: the encoder's own; paper: 1024).")
    target_temperature: float | None = option(
        None, "Temperature of the softmax over rewards (default: 0.25 where they are 0 or 1, else 1)."
    )
    epochs: int = option(5, "Maximum number of passes over the questions.")
    patience: int = option(3, "Stop after this many passes without a better choice on the held-out users.")
    questions_per_step: int = option(16, "Questions per optimiser step, each with a text for every row of the pool.")
    learning_rate: float = option(3e-5, "Learning rate of the encoder.")
    head_learning_rate: float = option(1e-2, "Learning rate of the linear head, which starts at zero.")
    warmup: float = option(0.05, "Share of the steps with a rising learning rate; then it falls to zero.")
    bf16: bool = option(False, "Compute the encoder in bfloat16 while it trains, with float32 weights.")


@dataclass(kw_only=True)
class RspgPreOptions(RspgOptions):
    """Train a selector that chooses a row by its prompt, before anything is answered (RSPG-Pre)."""


@dataclass(kw_only=True)
class RspgPostOptions(RspgOptions):
    """Train a selector that chooses between the answers of all rows (RSPG-Post)."""


@dataclass(kw_only=True)
class _UserWeightsOptions:
    GROUPS: ClassVar = {"split": "users and items", "epochs": "training"}

    split: str = option(
        "dev", "Split whose users get weights; held: the held-out users of the train split, to tune on."
    )
    items: Literal["common", "union"] = option(
        "common",
        "Items of a user to train on: those in the histories of all of the user's questions; or union, those in any of them, "
        "which leaks answers and shows how much a leak is worth.",
    )
    items_per_user: int | None = option(None, "Train on at most this many of a user's newest items (default: all).")
    retrieval: str | None = option(None, "Show retrieved items in every prompt, e.g. bm25@1 (default: none).")
    shard: str = option(
        "0/1", "Train every N-th user, from the I-th on, as I/N: N processes with one output share the work."
    )
    epochs: int = option(5, "Passes over a user's items.")
    learning_rate: float = option(5e-4, "Learning rate of AdamW.")
    schedule: Literal["constant", "linear"] = option(
        "constant", "Learning rate after the warm-up: constant, or down to 0."
    )
    warmup: float = option(0.0, "Share of the steps with a rising learning rate.")
    weight_decay: float = option(0.0, "Weight decay.")
    clip: float = option(1.0, "Largest norm of a gradient.")
    pairs_per_step: int = option(8, "Items per optimiser step.")
    stop_below: float = option(0.1, "Stop with a user after a pass whose mean loss is below this; 0: never.")
    max_answer_length: int = option(128, "Cut answers of the training to this many tokens.")


@dataclass(kw_only=True)
class FtpOptions(_UserWeightsOptions):
    """Train one LoRA per user on the items of the user's history."""

    GROUPS: ClassVar = {**_UserWeightsOptions.GROUPS, "rank": "LoRA"}

    rank: int = option(8, "Rank of a LoRA.")
    alpha: float = option(16, "Alpha: a LoRA is scaled by alpha / rank.")
    dropout: float = option(0.0, "Dropout of a LoRA in training.")
    modules: Literal["qkv", "qv"] = option("qkv", "Layers with a LoRA: queries, keys and values, or without keys.")


@dataclass(kw_only=True)
class OppuOptions(FtpOptions):
    """Train a LoRA of the task on other users' questions, add it to the weights, then one LoRA per user."""

    GROUPS: ClassVar = {**FtpOptions.GROUPS, "task_epochs": "LoRA of the task"}

    epochs: int = option(2, "Passes over a user's items.")
    task_epochs: int = option(3, "Passes over the other users' questions.")
    task_learning_rate: float = option(5e-4, "Learning rate of the LoRA of the task.")
    task_pairs_per_step: int = option(16, "Questions per optimiser step of the LoRA of the task.")
    task_loras: str = option(
        TASK_LORAS_FOLDER,
        "Folder of LoRAs of tasks: trainings that need the same one share it, such as those of other users.",
    )


@dataclass(kw_only=True)
class UserTokensOptions(_UserWeightsOptions):
    """Train one soft prompt per user, which starts as a plug's for this user."""

    plug: str = field(metadata={"help": "Plug to start from, made for this language model: folder or Hub id."})
    learning_rate: float = option(1e-2, "Learning rate of AdamW.")


# Method -> its options, a dataclass whose fields have a help, and the function that trains it, or its place.
FIT: dict[str, tuple[type, str | Callable[[Any], Any]]] = {
    "ropg-kd": (RopgKdOptions, "pplug_hf.methods.ropg:train"),
    "ropg-rl": (RopgRlOptions, "pplug_hf.methods.ropg:train"),
    "rspg-pre": (RspgPreOptions, "pplug_hf.commands.fit_selector:train"),
    "rspg-post": (RspgPostOptions, "pplug_hf.commands.fit_selector:train"),
    "ftp": (FtpOptions, "pplug_hf.methods.adapter_fit:train"),
    "oppu": (OppuOptions, "pplug_hf.methods.adapter_fit:train"),
    "user-tokens": (UserTokensOptions, "pplug_hf.methods.adapter_fit:train"),
}
# Options that must be greater than 0, or None.
POSITIVE = (
    *("epochs", "patience", "learning_rate", "head_learning_rate", "questions_per_step", "temperature"),
    *("target_temperature", "text_length", "clip", "pairs_per_step", "items_per_user", "max_answer_length", "rank"),
    *("alpha", "task_epochs", "task_learning_rate", "task_pairs_per_step"),
)
# Options that say where something is or who does it, and not what.
PLACES = ("encoder", "rewards", "device", "plug", "plugs", "trained", "answers", "task_loras", "shard")


def options_of(method: str) -> type:
    """Return the options of a method.

    Raises:
        ConfigurationError: no method of that name can be trained.
    """
    if method not in FIT:
        raise ConfigurationError(f"There is no method {method!r} to train; choose one of {', '.join(FIT)}.")
    return FIT[method][0]
