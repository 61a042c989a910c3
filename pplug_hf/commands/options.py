"""Options of all commands: each is a field with its default and its help. No model library is loaded for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from ..data.events import Answers, Split
from ..storage.layout import DEFAULT_FOLDER
from ..tasks.lamp_metrics import Fallback

T = TypeVar("T")
DType = Literal["auto", "float32", "bfloat16", "float16"]
BadRows = Literal["refuse", "skip"]
BulkEngine = Literal["local", "ray"]
Chat = Literal["auto", "always", "never"]
CHAT = "Write prompts as the user's turn of the language model's chat template; auto: if it has one."
SYSTEM = "System text of these chats (default: what the template does without one)."
TASK = "Task, e.g. LaMP-2, or a .json file with a task of your own (default: the task.json of the folder, or what the outputs file says)."
DEVICE = "Device, e.g. cpu, cuda or cuda:1 (default: an accelerator, else the CPU)."
HISTORY = "The items, texts or mappings of fields: a .json list, .jsonl, or .txt with one item per line."
DATA = "Folder with {split}_questions.json[.gz] or {split}.jsonl[.gz], or a .jsonl file."


def option(default: T, help: str) -> T:
    """Return a field with a default; its help is the one of the command line and of the docs."""
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """Return a field that has to be given."""
    return field(metadata={"help": help})


@dataclass(kw_only=True)
class AnsweringSettings:
    """Settings of `bench` and `evaluate`: the data, the language model and the decoding."""

    GROUPS: ClassVar = {"data": "data", "backbone": "language model and answers", "batch_size": "run"}

    data: str = required(DATA)
    task: str | None = option(None, TASK)
    split: str = option("dev", "Split of a folder to answer.")
    max_items: int | None = option(None, "Keep at most this many of the newest items of a history (default: all).")
    leave_out_users: float = option(0.0, "As in training; label frequencies are fitted on the remaining users.")
    split_seed: int = option(0, "As in training.")
    backbone: str | None = option(None, "Language model (default: the first plug's).")
    backbone_dtype: DType = option("auto", "Data type of the backbone.")
    chat: Chat = option("auto", CHAT + " A plug is asked as it was trained.")
    system: str | None = option(None, "System text of these chats (default: the first plug's).")
    num_beams: int = option(1, "Beams.")
    max_new_tokens: int | None = option(None, "Maximum answer length in tokens (default: the task's).")
    max_length: int = option(256, "Maximum prompt length in tokens, retrieved items included.")
    constrained: bool = option(False, "On label tasks, answer with the task's labels only.")
    batch_size: int = option(32, "Prompts per batch.")
    seed: int = option(0, "Seed of the wrong users and of random retrieval.")
    device: str | None = option(None, DEVICE)
    vectors: str = option(DEFAULT_FOLDER, "Folder of the vector store.")


@dataclass
class TrainSettings:
    """Train a persona plug on questions and histories; the backbone stays frozen."""

    GROUPS: ClassVar = {"data": "data", "epochs": "training", "backbone_dtype": "run"}

    data: str = required(
        "Folder with train_questions.json[.gz] and train_outputs.json[.gz], or with train.jsonl[.gz]; or a "
        ".jsonl file. The other splits are never used for training."
    )
    output: str = required("Folder for the plug: a new one, or one with a plug to replace.")
    backbone: str = required("Frozen language model: Hub id, local folder, or path of a GGUF file.")
    encoder: str = required("Frozen sentence encoder: Hub id or local folder.")
    task: str | None = option(None, TASK)
    train_on_histories: bool = option(True, "Make every answered history item one more example.")
    synthetic_users: int = option(
        0, "Label tasks: this many more examples, of synthetic users whose items match one user's label frequencies."
    )
    labelled_items: bool = option(
        True, "Encode items with the user's own tag or score (the code of the paper's authors: without)."
    )
    use_history: bool = option(
        True,
        "Pass False for an instruction-only plug, the ablation in which all histories are empty: it learns one soft prompt for "
        "everybody.",
    )
    new_users: float = option(
        0.0,
        "In every epoch, show this share of the examples without their histories, so that the plug learns to answer users who "
        "have none.",
    )
    max_items: int | None = option(None, "Keep at most this many of the newest items (default: all; paper: 512).")
    history_dropout: float = option(0.5, "In every epoch, drop a random share of each history's items, at most this.")
    history_repeats: int = option(
        0,
        "Extra copies of each example per epoch, each with some history items dropped (paper: 10). The example itself "
        "stays whole.",
    )
    leave_out_users: float = option(
        0.0, "Share of the training users to leave out, e.g. because the backbone was trained on them."
    )
    split_seed: int = option(0, "Seed of the choice of users that are left out.")
    validation_users: float = option(
        0.1, "Share of the users held out to choose the best checkpoint: the nearest number of users, at least one."
    )
    epochs: float = option(10, "Maximum number of passes over the examples.")
    max_steps: int | None = option(None, "Stop after this many optimiser steps (default: when the epochs are over).")
    patience: int = option(5, "Stop after this many evaluations without a better validation loss.")
    evaluations_per_epoch: int = option(1, "Validations (and checkpoints) per epoch.")
    batch_size: int = option(32, "Examples per step, over all processes.")
    gradient_accumulation: int = option(1, "Batches per optimiser step.")
    learning_rate: float = option(1e-2, "Learning rate of projector and instruction (paper: 1e-4).")
    encoder_learning_rate: float | None = option(
        None, "Learning rate of a trained input encoder (default: learning_rate / 20)."
    )
    weight_decay: float = option(0.01, "Weight decay.")
    warmup: float = option(0.05, "Share of the steps with a rising learning rate, below 1.")
    gradient_checkpointing: bool = option(False, "Trade time for memory in the backbone.")
    prompt_cache: str = option(
        "auto",
        "With placement answer: memory for what the backbone computes from the prompts, which is then done once instead of "
        "in every epoch. What is more goes into files in the output folder, until training ends. auto: 4GB on a CPU, none on an accelerator, "
        "where it has not been measured; 0: none.",
    )
    max_length: int = option(256, "Maximum prompt length in tokens.")
    max_target_length: int = option(128, "Maximum answer length in tokens.")
    seed: int = option(0, "Seed of initialisation, order and drop-out.")
    backbone_dtype: DType = option("auto", "Data type of the backbone. The plug is float32.")
    chat: Chat = option("auto", CHAT + " Kept with the plug.")
    system: str | None = option(None, SYSTEM)
    device: str | None = option(None, DEVICE)
    vectors: str = option(DEFAULT_FOLDER, "Folder of the vector store.")
    resume: bool = option(
        True,
        "Resume from the last checkpoint in the output folder, if there is one; one of other data or settings is refused. "
        "False: start again, and delete the checkpoints there.",
    )
    logging_steps: int | None = option(
        None, "Steps between two lines with the loss (default: ten lines per evaluation)."
    )
    report_to: list[str] | None = option(
        None, "Trackers that get the losses, e.g. tensorboard or wandb (default: none)."
    )


@dataclass(kw_only=True)
class EvaluateSettings(AnsweringSettings):
    """Compare a plug with: no persona, instruction only, the history of another user, the user's label frequencies."""

    GROUPS: ClassVar = {**AnsweringSettings.GROUPS, "plug": "rows and results"}

    plug: list[str] = required("Plug folder or Hub id; several are seeds of one row.")
    instruction_only: list[str] | None = option(
        None, "Plugs trained with --use_history False, for the row of that name."
    )
    frequencies: bool = option(
        True, "On label tasks, add a baseline: label probabilities mixed with the user's label frequencies."
    )
    output: str | None = option(
        None, "Folder for results.json, table.md and predictions; those that it has are not answered again."
    )


@dataclass(kw_only=True)
class BenchSettings(AnsweringSettings):
    """Answer a split with many rows and compare them. Rows that are in the folder already are not answered again."""

    GROUPS: ClassVar = {**AnsweringSettings.GROUPS, "output": "rows and results"}

    output: str = required("Folder for predictions, results.json, table.md and pictures.")
    rows: list[str] | None = option(
        None,
        "Rows, e.g. no-persona frequencies bm25@4 NAME NAME:wrong-user NAME:top-4 NAME:last-8 NAME:strength-1.5 NAME+bm25@1 "
        "(default: those that show what a persona is worth).",
    )
    plugs: list[str] | None = option(
        None,
        "Names of plugs, each as NAME=FOLDER or NAME=FOLDER,FOLDER for several seeds. The name instruction-only is for "
        "plugs trained with --use_history False.",
    )
    trained: list[str] | None = option(
        None, "Names of what `pplug-hf fit` trained, each as NAME=FOLDER or NAME=FOLDER,FOLDER for several seeds."
    )
    fuse: list[str] | None = option(
        None,
        "Rankers that the rows rrf@K fuse, trained ones (their first seed) included (default: recency, bm25 and, with an "
        "encoder, dense).",
    )
    reference: str | None = option(None, "Row that the others are compared with (default: the first plug's own).")
    retriever: str | None = option(
        None, "Sentence encoder of the rows dense@K (default: the first plug's, with its vectors)."
    )
    oracle: list[str] | None = option(
        None,
        "Rows to choose from, as ROW,ROW or NAME=ROW,ROW: also show the score of the best of their answers to each "
        "question, of the worst and of any, beside what chance alone gives (as many draws of random@4, which are answered).",
    )
    pairs: bool = option(
        False, "Also write pairs.json, with each user's scores under a hash instead of a name: keep it private."
    )
    show_history: str | None = option(
        None,
        "Also draw the weight of each history item of the question with this id, with the user's texts: keep that "
        "picture private.",
    )
    tables_only: bool = option(False, "Load no model: make tables and pictures of the predictions that are there.")


@dataclass(kw_only=True)
class PairsSettings(AnsweringSettings):
    """Write the answers of two rows side by side for human judges, who do not see which is which; needs no gold answers."""

    GROUPS: ClassVar = {**AnsweringSettings.GROUPS, "output": "rows and results"}

    output: str = required("Folder for pairs.jsonl, key.json and predictions; those that it has are not made again.")
    rows: list[str] = required("Two rows as in bench, e.g. no-persona NAME.")
    plugs: list[str] | None = option(None, "Names of plugs, each as NAME=FOLDER.")
    trained: list[str] | None = option(None, "Names of what fit trained, each as NAME=FOLDER.")
    retriever: str | None = option(
        None, "Sentence encoder of the rows dense@K (default: the first plug's, with its vectors)."
    )


@dataclass(kw_only=True)
class FitSettings:
    """Train a baseline of the comparison; `pplug-hf fit --method NAME --help` lists the method's own options."""

    GROUPS: ClassVar = {"task": "data", "backbone_dtype": "language model and answers", "batch_size": "run"}

    method: str = required(
        "Method to train: ropg-kd, ropg-rl, rspg-pre, rspg-post, ftp, oppu or user-tokens; those that plug-ins add, too."
    )
    data: str = required(
        "Data set with a train split, as for `train`. Of other splits no question and no answer is learned."
    )
    output: str = required("Folder for what is learned, which `bench` takes as --trained NAME=FOLDER.")
    backbone: str = required("Frozen language model: Hub id or local folder.")
    task: str | None = option(None, TASK)
    max_items: int | None = option(None, "Keep at most this many of the newest items of a history (default: all).")
    max_questions: int | None = option(
        None,
        "Train on at most this many questions, drawn by the seed of the split. ftp and user-tokens learn from histories alone.",
    )
    leave_out_users: float = option(0.0, "As in training: share of the users whom the backbone was trained on.")
    select_users: float = option(0.3, "Share of the users kept for methods that choose among trained ones.")
    held_users: float = option(0.1, "Share of the users to stop the training in time with.")
    split_seed: int = option(0, "Seed of the choice of users.")
    backbone_dtype: DType = option("auto", "Data type of the backbone.")
    chat: Chat = option("auto", CHAT)
    system: str | None = option(None, SYSTEM)
    num_beams: int = option(1, "Beams, as in the comparison.")
    max_new_tokens: int | None = option(None, "Maximum answer length in tokens (default: the task's).")
    max_length: int = option(256, "Maximum prompt length in tokens, retrieved items included.")
    constrained: bool = option(False, "On label tasks, answer with the task's labels only.")
    batch_size: int = option(32, "Prompts per batch.")
    seed: int = option(0, "Seed of the training.")
    device: str | None = option(None, DEVICE)
    vectors: str = option(DEFAULT_FOLDER, "Folder of the vector store.")
    resume: bool = option(
        True,
        "Go on with an interrupted training in the output folder; one of other data or settings is refused. False: delete "
        "what is there, and start again.",
    )


@dataclass
class ScoreSettings:
    """Score predictions by LaMP's official rules. Prints JSON and nothing else."""

    golds: str = required("The official {split}_outputs.json, plain or gzipped.")
    predictions: str = required("A file of the same layout with the answers, plain or gzipped.")
    task: str | None = option(
        None, "Task, or a .json file with a task of your own (default: what the golds file says)."
    )
    fallback: Fallback = option(
        "farthest",
        "Value of a rating that is not a number: the end of the scale farthest from the gold (LaMP), or "
        "the first digit in it, else the low end (PPlug's authors).",
    )
    output: str | None = option(None, "Also write the JSON to this file.")


@dataclass
class GenerateSettings:
    """Answer a prompt for the user of a history."""

    GROUPS: ClassVar = {"plug": "user", "max_new_tokens": "answer", "backbone": "run"}

    plug: str = required("Plug folder or Hub id.")
    prompt: str = required("What to answer.")
    history: str | None = option(None, HISTORY)
    persona: str | None = option(None, "Folder or file of an encoded history, instead of --history.")
    query: str | None = option(
        None, "Query that weights the history items (default: what the plug takes from the prompt)."
    )
    persona_strength: float = option(1.0, "Strength of the persona: 0 is nobody, 1 as trained, more exaggerates.")
    picture: str | None = option(None, "PNG file for the weights of the history items.")
    max_new_tokens: int = option(64, "Maximum answer length in tokens.")
    num_beams: int = option(1, "Beams.")
    temperature: float | None = option(None, "Sample, with this temperature (default: take the likeliest token).")
    top_p: float | None = option(None, "Sample from the likeliest tokens that have this probability together.")
    labels: list[str] | None = option(None, "Answer with one of these (default: anything).")
    stream: bool = option(False, "Print the answer as it is written.")
    backbone: str | None = option(None, "Language model: Hub id or folder (default: the one that the plug names).")
    encoder: str | None = option(None, "Sentence encoder: Hub id or folder (default: the one that the plug names).")
    chat: Chat | None = option(
        None, "Write the prompt in the chat template, or not (default: as the plug was trained)."
    )
    system: str | None = option(None, "System text of the chat (default: as the plug was trained).")
    device: str | None = option(None, DEVICE)


@dataclass
class ServeSettings:
    """Serve an OpenAI-compatible API with the personas of a store. Listens on this machine alone, unless there are keys."""

    GROUPS: ClassVar = {"plugs": "model", "host": "server", "max_new_tokens": "limits"}

    plug: str = required("Plug folder or Hub id: the model that answers unless a request names another.")
    store: str = required("Folder of the personas, made if it does not exist; or redis://... of a server.")
    plugs: list[str] | None = option(None, "More plugs of the same language model and encoder, each as NAME=FOLDER.")
    engine: Literal["transformers", "vllm"] = option("transformers", "What runs the language model.")
    backbone: str | None = option(None, "Language model: Hub id or folder (default: the one that the plug names).")
    encoder: str | None = option(None, "Sentence encoder: Hub id or folder (default: the one that the plug names).")
    device: str | None = option(None, DEVICE)
    temperature: float | None = option(
        None, "Temperature of requests that name none (default: take the likeliest token)."
    )
    prompt_cache: str | None = option(
        None,
        "Memory for the states of prompts, for plugs with placement answer; 0: none (default: 256MB; not with vllm, which has "
        "a cache of its own).",
    )
    host: str = option("127.0.0.1", "Address to listen on; another than this machine's own needs --keys.")
    port: int = option(8000, "Port; 0 takes a free one.")
    keys: str | None = option(None, "JSON file with the tenant of each API key's SHA-256 (default: no keys).")
    max_new_tokens: int = option(512, "Maximum answer length in tokens.")
    max_prompt_tokens: int | None = option(
        None,
        "Maximum prompt length in tokens (default: 2048; not with vllm, which takes what the language model reads).",
    )
    max_batch: int = option(32, "Requests that are answered at once.")
    max_queue: int = option(256, "Requests that may wait; more get 429.")
    max_items: int = option(10_000, "Maximum number of items of a user.")
    max_body: int = option(4_194_304, "Maximum bytes of a request.")
    time_limit: float = option(60.0, "Seconds from a request to the end of its answer.")


@dataclass
class AppSettings:
    """Try a plug on a page in the browser, for users of your own or those of the demo."""

    GROUPS: ClassVar = {"plug": "plug and users", "host": "page"}

    plug: str | None = option(None, "Plug folder or Hub id (default: the demo plug that comes with the package).")
    backbone: str | None = option(None, "Language model: Hub id or folder (default: the one that the plug names).")
    encoder: str | None = option(None, "Sentence encoder: Hub id or folder (default: the one that the plug names).")
    store: str | None = option(None, "Folder or address of a persona store (default: one that ends with the page).")
    max_new_tokens: int = option(64, "Maximum answer length in tokens.")
    host: str = option("127.0.0.1", "Address to listen on. The page has no login: keep it on this machine.")
    port: int = option(7860, "Port to listen on.")
    device: str | None = option(None, DEVICE)


@dataclass
class DemoSettings:
    """Train a tiny plug on synthetic readers, compare it with its ablations, save it and load it in a new process."""

    output: str = option("demo-output", "Folder for plugs, tables and the picture.")
    epochs: float = option(3, "Passes over the training examples.")
    seed: int = option(0, "Seed of the training.")


@dataclass
class PrepareSettings:
    """Make a data set and a task of a log with one event per row: who, when, a text, and the answer."""

    GROUPS: ClassVar = {"source": "columns", "instruction": "task", "split": "splits"}

    source: str = required("Log of events: a .csv, .tsv, .parquet or .jsonl file, plain or gzipped.")
    output: str = required("Folder for the data set: a new one, or one that this command made.")
    user: str = required("Column with the user.")
    text: str = required("Column with the text that was answered.")
    answer: str = required("Column with the user's answer: a label, a number or a text.")
    time: str | None = option(None, "Column with the time: dates or numbers (default: rows are oldest first).")
    question: str | None = option(None, "Column with a question for each event, asked before the text.")
    instruction: str | None = option(None, "Instruction before each text, if there is no column of questions.")
    name: str | None = option(None, "Name of the task (default: that of the output folder).")
    answers: Answers = option("auto", "Kind of answers (auto: few and repeated answers are labels).")
    metric: str | None = option(None, "How answers are judged (default: accuracy, mae for numbers, rouge for texts).")
    split: Split = option(
        "users",
        "What dev and test hold: all questions of users whom train does not have, the newest of every user, or the newest "
        "of all.",
    )
    dev: float = option(0.1, "Share of users (or of events) in dev.")
    test: float = option(0.1, "Share of users (or of events) in test.")
    min_history: int = option(1, "Items that a question must have before it.")
    questions_per_user: int | None = option(None, "Keep at most this many of a user's newest questions in each split.")
    time_format: str | None = option(None, "Format of the times, as for strptime (default: ISO 8601).")
    seed: int = option(0, "Seed of the choice of users.")


@dataclass
class StoreSettings:
    """Look after a store of personas: its size, a user's right of access, and deletion."""

    store: str = required(
        "Folder or URL (redis://..., valkey://...) of the store. Its secret is in the folder or in the variable "
        "PPLUG_STORE_SECRET."
    )
    action: Literal["stats", "export", "delete-items", "delete-user", "compact"] = option(
        "stats",
        "stats: print users, items, bytes and namespaces; export: write the persona of a user into a folder; delete-items, "
        "delete-user: forget them in all namespaces and print the receipt; compact: give back the space of what was deleted.",
    )
    user: str | None = option(None, "Id of the user.")
    items: list[str] | None = option(None, "Ids of the items to delete.")
    output: str | None = option(None, "Folder for the persona of an export.")
    tenant: str = option("", "Tenant.")
    namespace: str | None = option(None, "Namespace (default: the active one).")


@dataclass
class EncodeSettings:
    """Encode the history items of a data set, each distinct text once and never again; or one history of one user; or a log
    of items of many users into a store.
    """

    GROUPS: ClassVar = {"data": "data set or one history", "source": "log into a store", "batch_size": "run"}

    data: str | None = option(None, "Folder with {split}_questions.json[.gz] or {split}.jsonl[.gz], or a .jsonl file.")
    encoder: str | None = option(None, "Frozen sentence encoder: Hub id or local folder.")
    plug: str | None = option(None, "Encode one --history into --output as this plug does; needs no backbone.")
    history: str | None = option(None, HISTORY)
    output: str | None = option(None, "Folder, or .safetensors file, for the vectors.")
    task: str | None = option(None, TASK)
    splits: list[str] = field(
        default_factory=lambda: ["train", "dev", "test"],
        metadata={"help": "Which splits of a folder; those that it lacks are passed over."},
    )
    labelled_items: bool = option(True, "With the user's own tag or score.")
    item_template: str | None = option(
        None, "Format string of an item's text, as of train or of a recipe (default: the task's)."
    )
    history_prompt: str | None = option(None, "Text put in front of items (default: the encoder's own).")
    vectors: str = option(DEFAULT_FOLDER, "Folder of the vector store.")
    source: list[str] | None = option(
        None,
        "Log with one item per row: .parquet, .jsonl, .csv or .tsv files, or folders of them. Encoded as --plug does.",
    )
    store: str | None = option(None, "Store of the personas: a folder, or redis://... of a server.")
    user: str = option("user", "Column with the user.")
    item: str | None = option(
        None, "Column with the item's id (default: id if there is one, else a fingerprint of the row)."
    )
    time: str | None = option(None, "Column with the time (default: date if there is one, else items have no times).")
    fields: list[str] | None = option(
        None, "Columns of the item's fields, each as FIELD=COLUMN (default: columns of the fields' names)."
    )
    bad_rows: BadRows = option(
        "refuse",
        "Rows without a user or a text, or with a wrong time: stop at the first, or leave them out and count them.",
    )
    engine: BulkEngine = option("local", "Encode on this machine, or on a Ray cluster.")
    workers: int = option(1, "Processes or Ray actors that encode.")
    tenant: str = option("", "Tenant of the store.")
    namespace: str | None = option(None, "Namespace of the store (default: the active one).")
    dtype: Literal["float32", "float16", "int8"] | None = option(
        None, "Type of the vectors of a new store (default: float16)."
    )
    markers: str | None = option(
        None, "Folder for the names of finished parts, by which a run continues (default: in the folder of the store)."
    )
    batch_size: int = option(64, "Texts per forward pass.")
    device: str | None = option(None, DEVICE)


@dataclass
class ReportSettings:
    """Describe the histories of a data set: sizes, ages, labels, repetitions, near-duplicates of the questions."""

    data: str = required("Folder with {split}_questions.json[.gz] or {split}.jsonl[.gz], or a .jsonl file.")
    split: str = option("dev", "Which split of a folder.")
    task: str | None = option(None, TASK)
    seed: int = option(0, "Seed of the random users that real ones are compared with.")
    encoder: str | None = option(None, "Count the items that are too long for this encoder: Hub id or local folder.")
    output: str | None = option(None, "Write the report to this JSON file, too.")


@dataclass
class RecipesSettings:
    """List the recipes, or show one."""

    name: str | None = option(None, "Recipe to show, as in paper/lamp-4 (default: list all).")


@dataclass
class CardSettings:
    """Write the README.md of a plug folder for the Hub. Text outside of the generated parts stays as it is."""

    plug: str = required("Plug folder.")
    repo: str | None = option(None, "Hub id the plug will have, as owner/name.")
    results: str | None = option(None, "Folder of pplug-hf bench with results of this plug.")
    license: str | None = option(None, "Licence of the plug, e.g. apache-2.0.")
    datasets: list[str] | None = option(None, "Hub ids of the data it was trained on.")
    language: list[str] | None = option(None, "Codes of the data's languages, e.g. en.")


@dataclass
class InfoSettings:
    """Say what is in a plug: its parts, its choices and its size."""

    plug: str = required("Plug folder or Hub id.")


@dataclass
class ExportVllmSettings:
    """Write what `vllm serve` needs for a plug: a chat template, a page with the command line, and perhaps a soft prompt."""

    GROUPS: ClassVar = {"plug": "plug", "history": "a soft prompt"}

    plug: str = required("Plug folder or Hub id.")
    output: str = required("Folder for chat_template.jinja, README.md and soft_prompts.safetensors.")
    backbone: str | None = option(None, "Language model: Hub id or folder (default: the one that the plug names).")
    encoder: str | None = option(None, "Sentence encoder: Hub id or folder (default: the one that the plug names).")
    history: str | None = option(None, HISTORY)
    persona: str | None = option(None, "Folder or file of an encoded history, instead of --history.")
    query: str | None = option(None, "Query that weights the items of this user.")


@dataclass
class PushSettings:
    """Upload a plug, its vocabulary and its card to the Hub, in one commit."""

    plug: str = required("Plug folder.")
    repo: str = required("Repository, as 'owner/name'; created if it does not exist.")
    private: bool = option(False, "Make a new repository private.")
    revision: str | None = option(None, "Branch; created if it does not exist (default: main).")
    create_pr: bool = option(False, "Open a pull request instead.")
    subfolder: str = option("", "Folder inside the repository.")
    message: str | None = option(None, "Commit message (default: Upload plug).")
    description: str | None = option(None, "Extended description of the commit.")
    token: str | None = option(
        None, "Access token (default: that of `hf auth login`, or HF_TOKEN, which no process list shows)."
    )
    results: str | None = option(None, "Folder of `pplug-hf bench`, for the card.")
    license: str | None = option(None, "Licence shown on the model card, e.g. apache-2.0.")
    datasets: list[str] | None = option(None, "Hub ids of the training data, for the card.")
    language: list[str] | None = option(None, "Language codes of the data, e.g. en.")
    tags: list[str] | None = option(None, "More tags for the card.")
