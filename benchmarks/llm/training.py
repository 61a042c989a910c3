"""Training and asking of plugs that share a frozen language model's passes.

J plugs, B prompts, P soft tokens, D encoder width, H backbone width, L labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unfinished
from corpus import Corpus, Rows
from lockstep import Reader
from mixture import Mixture
from plan import ABLATIONS, OURS, Group, Setting
from safetensors.torch import load_file
from torch import Tensor

from pplug_hf import PPlugForConditionalGeneration
from pplug_hf.modeling.aggregators import Items
from pplug_hf.modeling.encoders import embed_with_gradient
from pplug_hf.modeling.plug_batched import GROUP
from pplug_hf.modeling.plug_batched import Group as History


@dataclass(frozen=True)
class Schedule:
    """How long plugs train."""

    steps: int = 300
    batch_size: int = 32
    warmup: float = 0.05
    validations: int = 4
    validate_on: int = 256  # examples


WRITTEN = ("", "wrong-user")  # what is done to the history of plugs that write


class Personas:
    """The histories of a split on the device of the plugs.

    Args:
        corpus: of the split.
        split: as of `Corpus.examples`.
        device: of the plugs.
        learned: what the plugs learn from, if it is not this corpus.
    """

    def __init__(self, corpus: Corpus | Mixture, split: str, device: Any, learned: Corpus | Mixture | None = None):
        self.corpus, self.split, self.device, self.learned = corpus, split, device, learned or corpus
        self._vectors: dict[str, Tensor] = {}
        self.queries = corpus.queries(split).to(device)
        self.texts = [e.query for e in corpus.examples(split)]

    def vectors(self, items: str) -> Tensor:
        """Return the matrix of all item vectors."""
        if items not in self._vectors:
            self._vectors[items] = self.corpus.dataset(self.split, items).vectors.to(self.device)
        return self._vectors[items]

    def own(self, items: str, rows: Sequence[int]) -> list[np.ndarray]:
        """Return the item rows of some examples."""
        dataset = self.corpus.dataset(self.split, items)
        return [dataset.rows[i] for i in rows]

    def batch(self, items: str, histories: Sequence[np.ndarray]) -> list[History]:
        """Return histories, given as rows of the matrix, as a plug takes them."""
        vectors, groups = self.vectors(items), []
        for start in range(0, len(histories), GROUP):
            part = histories[start : start + GROUP]
            lengths = torch.tensor([len(rows) for rows in part])
            owner = torch.arange(len(part)).repeat_interleave(lengths)
            mask = torch.arange(len(part))[:, None] == owner
            flat = torch.from_numpy(np.concatenate(part)) if len(owner) else torch.zeros(0, dtype=torch.long)
            groups.append(History(Items(vectors[flat.to(self.device)], mask.to(self.device))))
        return groups

    def everybody(self, items: str, size: int) -> list[History]:
        """Return one history for all examples, whatever their split: the mean of all items to train on."""
        mean = self.learned.mean_item(items).to(self.device)
        mask = torch.ones(1, 1, dtype=torch.bool, device=self.device)
        return [History(Items(mean, mask.expand(min(GROUP, size - start), 1))) for start in range(0, size, GROUP)]


class Trained:
    """A plug with its optimiser and its best weights.

    Args:
        setting: what it is.
        model: over the shared language model and encoder.
        rate: learning rate.
        seed: of its initialisation and history drop-out.
    """

    def __init__(self, setting: Setting, model: PPlugForConditionalGeneration, rate: float, seed: int = 0):
        self.setting, self.model, self.plug, self.rate, self.seed = setting, model, model.plug, rate, seed
        self.parameters = [p for p in self.plug.parameters() if p.requires_grad]
        encoder = (
            {id(p) for p in self.plug.input_encoder.parameters()} if self.plug.input_encoder is not None else set()
        )
        # As PPlugTrainer: no decay of biases (and of other vectors' kind the Trainer decays all), the encoder slower.
        named = [(name, p) for name, p in self.plug.named_parameters() if p.requires_grad]
        kinds: dict[tuple[float, float], list[Any]] = {}
        for name, p in named:
            decay = 0.0 if name.endswith("bias") or "norm" in name.lower() else setting.decay
            kinds.setdefault((rate / 20 if id(p) in encoder else rate, decay), []).append(p)
        self.device = self.parameters[0].device
        fused = self.parameters[0].is_cuda
        self.optimizer: Any = torch.optim.AdamW(
            [{"params": ps, "lr": lr, "base": lr, "weight_decay": decay} for (lr, decay), ps in kinds.items()],
            fused=fused,
        )
        self.best, self.state, self.curve = math.inf, {}, []

    def soft_prompts(self, personas: Personas, rows: Sequence[int], histories: Any) -> Tensor:
        """Return the soft prompts [B, P, H] of examples, given their histories."""
        queries = None
        if self.setting.persona != "none" and self.plug.aggregator.needs_query:
            if self.plug.input_encoder is None:
                queries = personas.queries[list(rows)]
            else:
                texts = [personas.texts[i] for i in rows]
                queries = embed_with_gradient(self.plug.input_encoder, texts, self.model.config.query_prompt)
                queries = queries.to(self.plug.no_persona)
        return self.plug(queries, histories)

    def step(self, done: float, warmup: float) -> None:
        """Take a step at a learning rate that rises, then falls to zero."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = done / warmup if done < warmup else (1 - done) / (1 - warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def validated(self, loss: float) -> None:
        """Keep the weights if they are the best so far."""
        self.curve.append(round(loss, 5))
        if loss < self.best:
            self.best, self.state = loss, {k: v.detach().clone() for k, v in self.plug.state_dict().items()}

    def restore(self) -> None:
        """Go back to the best weights."""
        if self.state:
            self.plug.load_state_dict(self.state, strict=False)
        self.optimizer, self.state = None, {}


class Asked:
    """Soft prompts of a set of plugs for examples of a split."""

    def __init__(self, personas: Personas, plugs: Sequence[Trained]):
        self.personas, self.plugs = personas, plugs

    def histories(self, trained: Trained, rows: Sequence[int], variant: str = "") -> Any:
        """Return the histories of examples, changed by an ablation."""
        personas, setting = self.personas, trained.setting
        corpus, split, items = personas.corpus, personas.split, setting.items
        if setting.persona == "everybody":
            return personas.everybody(items, len(rows))
        if setting.persona == "none" or variant == "no-history":
            return personas.batch(items, [np.zeros(0, dtype=np.int64)] * len(rows))
        own = personas.own(items, rows)
        if variant in ("wrong-user", "nearest-user"):
            donors = corpus.donors(split, variant, items)
            own = personas.own(items, [donors[i] for i in rows])
        elif variant.startswith("last"):
            newest = corpus.newest(split, int(variant[5:]), items)
            own = [newest[i] for i in rows]
        elif variant.startswith("top"):
            count = int(variant[4:])
            weights = trained.plug.weights(personas.queries[list(rows)], personas.batch(items, own))
            best = [w.float().cpu().argsort(stable=True)[max(0, len(w) - count) :].numpy() for w in weights]
            own = [mine[np.sort(chosen)] for mine, chosen in zip(own, best, strict=True)]
        return personas.batch(items, own)

    def soft_prompts(self, rows: Sequence[int], variants: Sequence[str]) -> list[Tensor]:
        """Return one tensor [B, P, H] per plug and its variant."""
        shared: dict[Any, Any] = {}
        found = []
        for trained, variant in zip(self.plugs, variants, strict=True):
            key = (trained.setting.persona, trained.setting.items, variant if variant[:3] != "top" else object())
            if key not in shared:
                shared[key] = self.histories(trained, rows, variant)
            found.append(trained.soft_prompts(self.personas, rows, shared[key]))
        return found


def train(
    group: Group,
    corpus: Corpus | Mixture,
    reader: Reader,
    encoder: Any,
    rate_of: Any,
    schedule: Schedule,
    kept: Path | None = None,
    started: Any = None,
) -> list[Trained]:
    """Train the plugs of a group in step, and leave them at their best weights by held-out training users.

    Args:
        group: what to train.
        corpus: of its task, or of all its tasks.
        reader: the language model.
        encoder: the frozen sentence encoder.
        rate_of: a setting's learning rate.
        schedule: how long.
        kept: file for the state at each validation, from which a stopped training goes on.
        started: the folder of the plug of a name and a seed, for settings that start from one.
    """
    plugs = []
    for seed in group.all_seeds:
        for setting in group.settings:
            torch.manual_seed(seed)
            model = new_plug(setting, group.placement, corpus, reader, encoder)
            if setting.start:
                weights = load_file(started(setting.start, seed) / "model.safetensors")
                model.load_state_dict(weights, strict=False)
            plugs.append(Trained(setting, model, rate_of(setting), seed))
            plugs[-1].plug.train()
    rows, personas = (
        corpus.rows(group.examples, group.form, group.placement),
        Personas(corpus, group.examples, reader.device),
    )
    checks = corpus.rows("val", group.form, group.placement), Personas(corpus, "val", reader.device)
    lengths = [len(b) + len(a) for b, a in zip(rows.before, rows.after, strict=True)]
    batches = batches_of(lengths, schedule, np.random.default_rng(group.seed))
    every = max(1, schedule.steps // schedule.validations)
    what = [asdict(schedule), [[p.setting.name, repr(p.setting), p.rate, p.seed] for p in plugs]]
    begun = unfinished.restore(kept, what, plugs) if kept else 0
    for step, batch in enumerate(batches[begun:], begun + 1):
        histories: dict[Any, Any] = {}
        softs = []
        for trained in plugs:
            setting = trained.setting
            key = (setting.persona, setting.items, setting.dropout, setting.new_users, trained.seed)
            if key not in histories:
                rng = np.random.default_rng((trained.seed, step))
                histories[key] = _training_histories(setting, personas, batch, rng)
            softs.append(trained.soft_prompts(personas, batch, histories[key]))
        leaves = [soft.detach().requires_grad_() for soft in softs]
        context = reader.read([rows.before[i] for i in batch])
        after, answers = [rows.after[i] for i in batch], [rows.answers[i] for i in batch]
        tokens, width = sum(map(len, answers)), max(map(len, answers))
        for chunk in reader.chunks(leaves, after, width):
            nll = reader.nll(context, [leaves[j] for j in chunk], after, answers)
            (nll.sum() / tokens).backward()
        torch.autograd.backward(softs, [leaf.grad for leaf in leaves])
        for trained in plugs:
            trained.step((step - 0.5) / schedule.steps, schedule.warmup)
        if step % every == 0 or step == schedule.steps:
            for trained, loss in zip(plugs, validate(plugs, reader, *checks, schedule.validate_on), strict=True):
                trained.validated(loss)
                trained.plug.train()
            if kept:
                unfinished.save(kept, what, plugs, step)
    for trained in plugs:
        trained.restore()
        trained.plug.eval()
    return plugs


def new_plug(
    setting: Setting, placement: str, corpus: Corpus | Mixture, reader: Reader, encoder: Any
) -> PPlugForConditionalGeneration:
    """Return an untrained plug over the shared language model."""
    return PPlugForConditionalGeneration.from_backbone(
        reader.backbone,
        encoder,
        tokenizer=corpus.tokenizer,
        placement=placement,
        **{**OURS, "item_template": corpus.template(setting.items), **setting.plug},
    )


def _training_histories(setting: Setting, personas: Personas, batch: Sequence[int], rng: Any) -> Any:
    """Return the histories of training examples, which lose a random share of their items, as in `PersonaDataset`."""
    if setting.persona == "everybody":
        return personas.everybody(setting.items, len(batch))
    if setting.persona == "none":
        return personas.batch(setting.items, [np.zeros(0, dtype=np.int64)] * len(batch))
    own = personas.own(setting.items, batch)
    if setting.dropout:
        kept = [len(rows) - int(rng.uniform(0, setting.dropout) * len(rows) + 0.5) for rows in own]
        own = [rows[np.sort(rng.choice(len(rows), k, replace=False))] for rows, k in zip(own, kept, strict=True)]
    if setting.new_users:
        own = [rows[:0] if rng.random() < setting.new_users else rows for rows in own]
    return personas.batch(setting.items, own)


def batches_of(lengths: Sequence[int], schedule: Schedule, rng: Any) -> list[list[int]]:
    """Return the batches of a training: passes in a random order, in which examples of similar length stand together."""
    found: list[list[int]] = []
    size, width = schedule.batch_size, np.array(lengths)
    while len(found) < schedule.steps:
        order = rng.permutation(len(lengths))
        made = []
        for start in range(0, len(order), size * 20):
            part = order[start : start + size * 20]
            part = part[np.argsort(width[part], kind="stable")]
            made += [part[at : at + size].tolist() for at in range(0, len(part) - size + 1, size)] or [part.tolist()]
        found += [made[i] for i in rng.permutation(len(made))]
    return found[: schedule.steps]


@torch.no_grad()
def validate(plugs: Sequence[Trained], reader: Reader, rows: Rows, personas: Personas, most: int) -> list[float]:
    """Return the loss per token of each plug."""
    asked, totals, tokens = Asked(personas, plugs), torch.zeros(len(plugs)), 0
    for trained in plugs:
        trained.plug.eval()
    for batch in _by_length(rows, 64, most):
        nll = _nll(asked.soft_prompts(batch, [""] * len(plugs)), reader, rows, batch)
        totals, tokens = totals + nll.sum(dim=1).cpu(), tokens + sum(len(rows.answers[i]) for i in batch)
    return (totals / tokens).tolist()


def _nll(softs: Sequence[Tensor], reader: Reader, rows: Rows, batch: Sequence[int]) -> Tensor:
    context = reader.read([rows.before[i] for i in batch])
    after, answers = [rows.after[i] for i in batch], [rows.answers[i] for i in batch]
    chunks = reader.chunks(softs, after, max(map(len, answers)))
    return torch.cat([reader.nll(context, [softs[j] for j in chunk], after, answers) for chunk in chunks])


def _by_length(rows: Rows, size: int, most: int | None = None) -> list[list[int]]:
    count = len(rows.before) if most is None else min(most, len(rows.before))
    order = sorted(range(count), key=lambda i: len(rows.before[i]) + len(rows.after[i]), reverse=True)
    return [order[start : start + size] for start in range(0, count, size)]


@torch.no_grad()
def ask(
    group: Group,
    plugs: Sequence[Trained],
    corpus: Corpus,
    reader: Reader,
    split: str,
    new_tokens: int,
    learned: Corpus | Mixture | None = None,
) -> dict[int, dict[str, dict[str, Any]]]:
    """Return what each row says to a split: log-probabilities of labels, or of the answer and a greedy answer.

    Greedy answers are written without changes to the history and with another user's.

    Args:
        group: for its prompts.
        plugs: trained ones; none: the language model as it is.
        corpus: of the task.
        reader: the language model.
        split: "val", "dev" or "test".
        new_tokens: of an answer.
        learned: what the plugs have learned from, if it is not this corpus.

    Returns:
        seed -> row -> "nll" [n], "tokens" [n], and "labels" [n, L] or "answers" [n].
    """
    rows = corpus.rows(split, group.form, group.placement)
    names, asking, variants = [], [], []
    for trained in plugs:
        for variant in ("", *(ABLATIONS if trained.setting.ablations and split != "val" else ())):
            names.append((trained.seed, trained.setting.name + f":{variant}" * bool(variant)))
            asking.append(trained)
            variants.append(variant)
    asked = Asked(Personas(corpus, split, reader.device, learned), asking) if plugs else None
    names = names or [(group.seed, {"plain": "no-persona"}.get(group.form, group.form))]
    labels, n = corpus.labels(), len(rows.before)
    made: dict[tuple[int, str], dict[str, Any]] = {
        name: {"nll": [0.0] * n, "tokens": list(map(len, rows.answers))} for name in names
    }
    greedy = [not plugs or (asking[j].setting.greedy and variants[j] in WRITTEN) for j in range(len(names))]
    for name, writes in zip(names, greedy, strict=True):
        if labels:
            made[name]["labels"] = [None] * n
        elif writes and split in group.written:
            made[name]["answers"] = [""] * n
    for batch in _by_length(rows, 32 if labels else 64):
        softs = (
            asked.soft_prompts(batch, variants)
            if asked
            else [torch.zeros(len(batch), 0, reader.embed.weight.shape[1], device=reader.device)]
        )
        if labels:
            context = reader.read([rows.before[i] for i in batch])
            scores = reader.label_log_probs(context, softs, [rows.after[i] for i in batch], labels)  # [J, B, L]
            for name, of_row in zip(names, scores.tolist(), strict=True):
                for i, values in zip(batch, of_row, strict=True):
                    made[name]["labels"][i] = [round(value, 3) for value in values]
            gold = [corpus.task.labels.index(corpus.task.label_of(corpus.examples(split)[i].target)) for i in batch]
            nll = -scores[:, torch.arange(len(batch)), gold]
        else:
            nll = _nll(softs, reader, rows, batch)
        for name, of_row in zip(names, nll.tolist(), strict=True):
            for i, value in zip(batch, of_row, strict=True):
                made[name]["nll"][i] = round(value, 4)
    if not labels and split in group.written:
        for batch in _by_length(rows, 256):
            context = reader.read([rows.before[i] for i in batch])
            after = [rows.after[i] for i in batch]
            softs = (
                asked.soft_prompts(batch, variants)
                if asked
                else [torch.zeros(len(batch), 0, reader.embed.weight.shape[1], device=reader.device)]
            )
            for name, writes, soft in zip(names, greedy, softs, strict=True):
                if writes:
                    ids = reader.greedy(context, soft, after, corpus.tokenizer.eos_token_id, new_tokens)
                    texts = corpus.tokenizer.batch_decode(ids, skip_special_tokens=True)
                    for i, text in zip(batch, texts, strict=True):
                        made[name]["answers"][i] = text.strip()
    by_seed: dict[int, dict[str, Any]] = {}
    for (seed, name), said in made.items():
        by_seed.setdefault(seed, {})[name] = said
    return by_seed


def run(
    group: Group,
    corpora: Sequence[Corpus],
    reader: Reader,
    encoder: Any,
    rate_of: Any,
    schedule: Schedule,
    new_tokens: int,
    keep: Any,
    kept: Path | None = None,
    started: Any = None,
) -> list[dict[str, Any]]:
    """Train and ask a group, and return all of it as JSON takes it, for each of its tasks and seeds.

    Args:
        group, reader, encoder, rate_of, schedule, kept, started: as of `train`.
        corpora: of its tasks.
        new_tokens: of an answer.
        keep: called with each trained plug.
    """
    start = time.monotonic()
    schedule = replace(schedule, steps=group.steps or schedule.steps)
    learned: Corpus | Mixture = corpora[0]
    if group.together:
        learned = Mixture(corpora, schedule.validate_on)
        schedule = replace(schedule, validate_on=schedule.validate_on * len(corpora))
    plugs = train(group, learned, reader, encoder, rate_of, schedule, kept, started) if group.settings else []
    trained = time.monotonic()
    for plug in plugs:
        keep(plug)
    splits = () if group.tuning else ("val", "dev", "test")
    answers = {
        corpus.name: {split: ask(group, plugs, corpus, reader, split, new_tokens, learned) for split in splits}
        for corpus in corpora
    }
    seconds = {"train": round(trained - start, 1), "ask": round(time.monotonic() - trained, 1)}
    return [
        {
            "task": corpus.task.name,
            "group": group.key_of(seed, corpus.name),
            "seed": seed,
            "form": group.form,
            "placement": group.placement,
            "examples": len(learned.examples(group.examples)),
            "steps": schedule.steps * bool(plugs),
            "batch_size": schedule.batch_size,
            "seconds": seconds,
            "plugs": {
                plug.setting.name: {
                    "family": plug.setting.family,
                    "rate": plug.rate,
                    "loss": plug.best,
                    "curve": plug.curve,
                    "weights": sum(p.numel() for p in plug.parameters),
                    "choices": dict(plug.setting.plug),
                }
                for plug in plugs
                if plug.seed == seed
            },
            "answers": {split: said[seed] for split, said in answers[corpus.name].items()},
        }
        for corpus in corpora
        for seed in group.all_seeds
    ]
