"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..data.vectors import DEFAULT_FOLDER

DType = Literal["auto", "float32", "bfloat16", "float16"]
Chat = Literal["auto", "always", "never"]
CHAT = "Write prompts as the user's turn of the language model's chat template; auto: if it has one."
SYSTEM = "System text of these chats (default: what the template does without one)."
TASK = "Task, e.g. LaMP-2, or a .json file with a task of your own (default: the task.json of the folder, or what the outputs file says)."
DATA = "Folder with {split}_questions.json[.gz] or {split}.jsonl[.gz], or a .jsonl file."


def option(default: Any, help: str) -> Any:
    """Return a field with a default; its help is the one of the command line and of the docs."""
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """Return a field that has to be given."""
    return field(metadata={"help": help})


@dataclass(kw_only=True)
class AnsweringSettings:
    """Settings of `bench` and `evaluate`: the data, the language model and the decoding."""

    data: str = required(DATA)
    task: str | None = option(None, TASK)
    split: str = option("dev", "Split of a folder to answer.")
    backbone: str | None = option(None, "Language model (default: the first plug's).")
    backbone_dtype: DType = option("auto", "Data type of the backbone.")
    chat: Chat = option("auto", CHAT + " A plug is asked as it was trained.")
    system: str | None = option(None, "System text of these chats (default: the first plug's).")
    num_beams: int = option(1, "Beams.")
    max_new_tokens: int | None = option(None, "Maximum answer length in tokens (default: the task's).")
    max_length: int = option(256, "Maximum prompt length in tokens, retrieved items included.")
    constrained: bool = option(False, "On label tasks, answer with the task's labels only.")
    max_items: int | None = option(None, "Keep at most this many of the newest items of a history (default: all).")
    batch_size: int = option(32, "Prompts per batch.")
    leave_out_users: float = option(0.0, "As in training; label frequencies are fitted on the remaining users.")
    split_seed: int = option(0, "As in training.")
    seed: int = option(0, "Seed of the wrong users and of random retrieval.")
    vectors: str = option(DEFAULT_FOLDER, "Folder of the vector store.")
