"""Personalise a language model that can write, for users whose writing style only their history shows.

    python examples/writing_styles/demo_llm.py --backbone runs/smollm2/model

`make demo-llm` does this on a fresh machine. The backbone is a small instruct model that stays as it is; the plug is trained
on synthetic users (styles.py) and meets users whose combination of habits it has never seen. The sentence encoder is the
mean of the backbone's own token embeddings: it costs nothing, and unlike most encoders it sees capitals and emojis.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from styles import SPLITS, WritingStyle, is_new, make_examples, style_of
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from pplug_hf import (
    Comparison,
    Example,
    PersonaDataset,
    PPlugCollator,
    PPlugForConditionalGeneration,
    PPlugModel,
    PPlugProcessor,
    PPlugTrainer,
    PPlugTrainingArguments,
    PromptCache,
    Task,
    VectorStore,
    answer,
    register_metric,
    shuffle_histories,
)

SYSTEM = "You write headlines."
ITEM = "{headline}"
register_metric(WritingStyle(), exist_ok=True)
TASK = Task(
    name="headlines in the user's style",
    query_marker="On ",
    query_field="note",
    answer_field="headline",
    item_template=ITEM,
    item_template_unlabelled=ITEM,
    metric=WritingStyle.name,
    max_new_tokens=32,
)
BARE, NOBODY, WRONG, PPLUG = "bare model", "PPlug, no history", "PPlug, another user's history", "PPlug"
DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", required=True, help="folder or Hub id of a causal model with a chat template")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: the faster one here")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="questions per step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="of the plug (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4, help="persona tokens (default: %(default)s)")
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="users to answer for")
    parser.add_argument(
        "--users", type=int, default=2, help="a dozen users to answer for, this many times (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the plug and the users (default: %(default)s)")
    parser.add_argument("--output", default="demo-llm-output", help="folder for plug, table and picture")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    set_seed(arguments.seed)

    dtype = faster_dtype(arguments.backbone) if arguments.dtype == "auto" else arguments.dtype
    encoder = save_encoder(arguments.backbone, output / "encoder")
    clock.done(f"backbone in {dtype}, encoder of its token embeddings")

    styles = len(SPLITS["train"].styles)
    questions = -(-arguments.steps * arguments.batch_size // (20 * styles))
    examples = make_examples("train", 20, questions, arguments.seed)
    model = make_plug(arguments.backbone, encoder, dtype, arguments.tokens)
    model.print_trainable_parameters()
    train(model, examples, output, arguments)
    clock.done(f"{arguments.steps} steps on {len(examples)} questions of {20 * styles} users in {styles} styles")

    held_out = make_examples(arguments.split, arguments.users, 3, arguments.seed)
    comparison, losses = compare(model, held_out)
    table = as_table(comparison, losses)
    (output / "table.md").write_text(table, encoding="utf-8")
    asked = f"{len(held_out)} questions of {len({e.user for e in held_out})} {arguments.split} users"
    draw(comparison.rows(), losses, f"Headlines in each user's style, {asked}", output / "styles.png")
    print(f"\n{table}\nas a picture: {output / 'styles.png'}\n")
    clock.done(
        f"{len(held_out)} questions of {len({e.user for e in held_out})} users who are not in the training data"
    )

    four = four_users(held_out)
    histories = [e.history for e in four]
    answers = write(model, four, histories)
    print("The newest headline of four users, and what is written for them:\n")
    show(four, answers, write(model, four, None))

    model.save_pretrained(output / "plug")
    PPlugProcessor.from_model(model).save_pretrained(output / "plug")
    del model
    again = write(PPlugModel.from_pretrained(output / "plug", backbone_kwargs=backbone_kwargs(dtype)), four, histories)
    if again != answers:
        raise SystemExit(f"The reloaded plug answers {again}, the trained one {answers}.")
    clock.done(f"saved in {output / 'plug'} and loaded again: it answers the same")


class Clock:
    """Prints what a step took: processor time of all cores, and time on the clock."""

    def __init__(self) -> None:
        self.started = self.last = time.process_time(), time.perf_counter()

    def done(self, what: str) -> None:
        now = time.process_time(), time.perf_counter()
        used, passed = (b - a for a, b in zip(self.last, now, strict=True))
        print(f"[{passed:.0f} s, {used:.0f} s of processor time] {what}", flush=True)
        self.last = now


# ---- the parts --------------------------------------------------------------------------------------------------


@torch.no_grad()
def faster_dtype(folder: str) -> str:
    """Return the data type in which this machine computes faster; bfloat16 is slow without instructions for it."""
    seconds = {}
    for dtype in DTYPES:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        ids = torch.arange(512).view(8, 64) % model.config.vocab_size
        model(ids, logits_to_keep=1)  # the first call prepares the weights
        start = time.perf_counter()
        model(ids, logits_to_keep=1)
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


def save_encoder(backbone: str, folder: Path) -> str:
    """Make a sentence encoder that averages the backbone's own token embeddings, and return its folder.

    Most sentence encoders write everything in lower case first, and would see no difference between two of our users.
    """
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    words = AutoModelForCausalLM.from_pretrained(backbone, dtype="float32").get_input_embeddings().weight.detach()
    module = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=words.numpy())
    SentenceTransformer(modules=[module], device="cpu").save(str(folder))
    return str(folder)


def backbone_kwargs(dtype: str) -> dict[str, str]:
    """Return how the backbone is loaded. On CPUs the plain attention is the faster one for short texts in bfloat16."""
    return {"dtype": dtype, "attn_implementation": "eager"}


def make_plug(backbone: str, encoder: str, dtype: str, tokens: int) -> PPlugForConditionalGeneration:
    """Return a new plug on the frozen backbone."""
    return PPlugForConditionalGeneration.from_backbone(
        backbone,
        encoder,
        backbone_kwargs=backbone_kwargs(dtype),
        placement="answer",  # behind the note, where the headline begins
        system=SYSTEM,
        item_template=ITEM,
        num_persona_tokens=tokens,
        projector_size=256,
        attention_temperature=0.1,
        learn_temperature=True,
        train_input_encoder=False,
    )


def train(
    model: PPlugForConditionalGeneration, examples: Sequence[Example], output: Path, arguments: argparse.Namespace
) -> None:
    """Train a plug on questions with the histories of their users."""
    processor = PPlugProcessor.from_model(model)
    store = VectorStore(model.history_encoder, model.config.history_prompt, output / "vectors")
    trainer = PPlugTrainer(
        model=model,
        args=PPlugTrainingArguments(
            output_dir=str(output / "training"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            warmup_steps=0.05,
            logging_steps=25,
            save_strategy="no",
            dataloader_pin_memory=False,
            report_to="none",
            seed=arguments.seed,
        ),
        data_collator=PPlugCollator(processor),
        prompt_cache=PromptCache("2GB", evict=False),  # many users are asked about the same notes, which are read once
        train_dataset=PersonaDataset(examples, store, model.config.item_template),
        processing_class=processor,
    )
    trainer.train()
    model.eval().prompt_cache = None


# ---- answers and their judgement --------------------------------------------------------------------------------


def write(model: PPlugForConditionalGeneration, examples: Sequence[Example], histories: Sequence | None) -> list[str]:
    """Return a headline for each example, given a history; of the backbone alone if histories are None."""
    return answer(
        model.backbone.generate if histories is None else model.generate,
        PPlugProcessor.from_model(model),
        [e.prompt for e in examples],
        personas=None if histories is None else model.encode_persona(histories),
        max_new_tokens=TASK.max_new_tokens,
        description="Writing headlines",
    )


@torch.no_grad()
def loss_per_token(
    model: PPlugForConditionalGeneration, examples: Sequence[Example], histories: Sequence | None
) -> float:
    """Return the negative log-likelihood per token of the users' own headlines; arguments as of `write`."""
    processor = PPlugProcessor.from_model(model)
    total = count = 0.0
    for start in range(0, len(examples), 16):
        chunk = slice(start, start + 16)
        batch = processor(
            text=[e.prompt for e in examples[chunk]],
            labels=[e.target for e in examples[chunk]],
            persona=None if histories is None else histories[chunk],
        )
        if histories is None:
            batch.pop("persona_position")  # the backbone alone has no use for it
        output = (model.backbone if histories is None else model)(**batch)
        tokens = int((batch["labels"] != -100).sum())
        total, count = total + float(output.loss) * tokens, count + tokens
    return total / count


def compare(model: PPlugForConditionalGeneration, examples: Sequence[Example]) -> tuple[Comparison, dict[str, float]]:
    """Return the answers of each row, and the loss of each row on the users' own headlines."""
    comparison, losses = Comparison(TASK, examples, reference=PPLUG), {}
    own = [e.history for e in examples]
    wrong = [own[row] for row in shuffle_histories(examples)]
    for row, histories in {BARE: None, NOBODY: [[]] * len(own), WRONG: wrong, PPLUG: own}.items():
        comparison.add(row, write(model, examples, histories))
        losses[row] = loss_per_token(model, examples, histories)
    return comparison, losses


def as_table(comparison: Comparison, losses: dict[str, float]) -> str:
    """Return the rows as Markdown: shares of answers in the user's style, of all users and of those whose style is new."""
    new = [row for row, e in enumerate(comparison.examples) if is_new(e)]
    of_new = Comparison(
        TASK,
        [comparison.examples[row] for row in new],
        reference=PPLUG,
        predictions={name: [[runs[0][row] for row in new]] for name, runs in comparison.predictions.items()},
    )
    lines = [
        "| | in the user's style | PPlug is better by [95 %, users] | new combinations | form | case | end | loss |"
    ]
    lines.append("| --- " * 8 + "|")
    for record, part in zip(comparison.rows(), of_new.rows(), strict=True):
        mean, low, high = record.get("gain") or (None, None, None)
        gain = "" if mean is None else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        shares = [f"{share:.3f}" for share in (part["style"], record["form"], record["case"], record["end"])]
        cells = [record["row"], f"{record['style']:.3f}", gain, *shares, f"{losses[record['row']]:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def four_users(examples: Sequence[Example]) -> list[Example]:
    """Return three prompts, each asked by the same four users: one of each form, two of whom write in a new style."""
    users: dict[str, Example] = {}
    for example in examples:
        form = style_of(str(example.target)).form
        if is_new(example) == (form in ("question", "number first")):
            users.setdefault(form, example)
    asked = [e for e in examples if e.user == examples[0].user]
    return [replace(e, user=u.user, history=u.history) for e in asked for u in users.values()]


def show(examples: Sequence[Example], answers: Sequence[str], bare: Sequence[str]) -> None:
    """Print the answers to each prompt: of the backbone alone, and for each user, below a headline from their history."""
    for e in {e.user: e for e in examples}.values():
        print(f"{e.user:12} {e.history[-1]['headline']}")
    for prompt in dict.fromkeys(e.prompt for e in examples):
        rows = [row for row, e in enumerate(examples) if e.prompt == prompt]
        print(f"\n{prompt}\n  {BARE:12} {' '.join(bare[rows[0]].split())}")
        for row in rows:
            print(f"  {examples[row].user:12} {' '.join(answers[row].split())}")
    print()


COLOURS = ("#9aa0a6", "#5f9ea0", "#e0a030", "#2f5fb3")  # the plug's own is the strongest


def draw(records: list[dict[str, Any]], losses: dict[str, float], title: str, path: Path) -> None:
    """Draw the share of answers in the user's style, whole and by parts, and the loss."""
    parts = ("style", "form", "case", "end")
    figure = Figure((9.5, 4), layout="constrained")
    shares, loss = figure.subplots(1, 2, width_ratios=(3, 1))
    for place, (record, colour) in enumerate(zip(records, COLOURS, strict=True)):
        at = [i + 0.84 * (place - len(records) / 2 + 0.5) / len(records) for i in range(len(parts))]
        bars = shares.bar(at, [record[part] for part in parts], 0.84 / len(records), label=record["row"], color=colour)
        shares.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        loss.bar_label(loss.bar(place, losses[record["row"]], color=colour), fmt="%.2f", fontsize=7, padding=1)
    shares.set_xticks(range(len(parts)), ["whole style", *parts[1:]])
    shares.set_ylim(0, 1.08)
    shares.set_ylabel("share of answers in the user's style")
    loss.set_xticks([])
    loss.set_ylabel("loss per token of the user's headline")
    figure.suptitle(title, fontsize=10)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=len(records), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
