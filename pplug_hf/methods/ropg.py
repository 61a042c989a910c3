"""ROPG: a retriever that is trained with the answers of the frozen language model (Salemi et al., SIGIR 2024).

The candidates of a question are the first items of an untrained ranker. A candidate's reward g says how well the language
model answers with this item alone in the prompt; s is its score under the encoder that is trained.

    policy    pi = softmax(s / tau)
    ROPG-KD   KL(softmax(g / tau_t) || pi)
    ROPG-RL   - sum_i pi_i (g_i - g_1)       the expected gain over the item that comes first without training

The rewards are known before the training begins (`rewards.py`), so an epoch asks the language model nothing.

B questions of a batch, l candidates (padded and masked), D encoder width, M distinct items.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ..data.histories import history_examples
from ..data.records import Example, data_digest
from ..errors import ConfigurationError, DataError
from ..modeling import encoders
from ..storage.files import atomic_write
from ..tasks.task import Task
from .artefacts import Artefact, Draft
from .fitting import FitJob
from .rewards import Rewards, is_informative
from .trained_ranker import KIND, ranking_text

_CHECKPOINT, _BEST = ".checkpoint.safetensors", ".best.safetensors"
_TEMPERATURE_RATE = 1e-2  # of a single number, which the encoder's rate would hardly move


# ---- losses ------------------------------------------------------------------------------------------------------


def kd_loss(
    scores: Tensor,
    rewards: Tensor,
    mask: Tensor,
    target_temperature: float = 1.0,
    temperature: float | Tensor = 1.0,
    form: str = "paper",
) -> Tensor:
    """Return the mean loss of ROPG-KD.

    Args:
        scores: [B, l].
        rewards: [B, l].
        mask: [B, l], true for candidates that exist.
        target_temperature: of the softmax over rewards.
        temperature: of the softmax over scores.
        form: "paper": the divergence of the policy from the target. "release": the cross entropy of the target and the
            softmax of the policy, a softmax of a softmax, as in the authors' code.
    """
    target = _masked(rewards / target_temperature, mask).log_softmax(dim=1)
    policy = _masked(scores / temperature, mask).log_softmax(dim=1)
    if form == "release":
        again = _masked(policy.exp(), mask).log_softmax(dim=1)
        return -(target.exp() * again).sum(dim=1).mean()
    return (target.exp() * (target - policy)).sum(dim=1).mean()


def rl_loss(
    scores: Tensor,
    rewards: Tensor,
    mask: Tensor,
    temperature: float | Tensor = 1.0,
    form: str = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean loss of ROPG-RL.

    Args:
        scores, rewards, mask, temperature: as in `kd_loss`; the first candidate is the untrained ranker's.
        form: "exact": minus the expected gain. "sampled": its estimate by one draw of the policy for each question, with the
            same gradient in expectation.
        generator: for these draws.
    """
    policy = _masked(scores / temperature, mask).log_softmax(dim=1)
    gain = (rewards - rewards[:, :1]).masked_fill(~mask, 0.0)
    if form == "sampled":
        drawn = policy.detach().exp().cpu().multinomial(1, generator=generator).to(scores.device)  # [B, 1]
        return -(gain * policy).gather(1, drawn).mean()
    return -(policy.exp() * gain).sum(dim=1).mean()


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return values that a softmax gives no weight where there is no candidate; finite, so that 0 times it is 0."""
    return values.masked_fill(~mask, torch.finfo(values.dtype).min)


# ---- questions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Questions with their candidates and rewards, to train on or to validate with.

    Attributes:
        users: of n questions.
        queries: n texts.
        items: M distinct texts.
        index: [n, l] rows of `items`, padded with 0.
        rewards: [n, l], padded with 0.
        mask: [n, l], true for candidates that exist.
    """

    users: list[str]
    queries: list[str]
    items: list[str]
    index: Tensor
    rewards: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls,
        task: Task,
        examples: Sequence[Example],
        candidates: Sequence[Sequence[int]],
        values: Sequence[Tensor],
        dated: bool = False,
    ) -> Questions:
        """Return questions with their candidates, of which each has at least one, and their rewards."""
        row: dict[str, int] = {}
        index = [
            torch.tensor([row.setdefault(ranking_text(task, e.history[i], dated), len(row)) for i in positions])
            for e, positions in zip(examples, candidates, strict=True)
        ]
        return cls(
            [e.user for e in examples],
            [task.retrieval_query(e.prompt) for e in examples],
            list(row),
            nn.utils.rnn.pad_sequence(index, batch_first=True),
            nn.utils.rnn.pad_sequence(list(values), batch_first=True),
            nn.utils.rnn.pad_sequence([torch.ones(len(rows)) for rows in index], batch_first=True).bool(),
        )

    def batches(self, size: int, seed: str | None = None) -> Iterator[list[int]]:
        """Yield rows of questions, those of one user together because they share items; in a drawn order with a seed."""
        places: dict[str, list[int]] = {}
        for i, user in enumerate(self.users):
            places.setdefault(user, []).append(i)
        users = sorted(places)
        if seed is not None:
            random.Random(seed).shuffle(users)
        order = [i for user in users for i in places[user]]
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if seed is not None:
            random.Random(f"{seed} batches").shuffle(batches)
        yield from batches


class Policy(nn.Module):
    """The encoder that is trained, and the temperature of its scores.

    Args:
        encoder: to start from; it is copied.
        item_vectors: [M, D] of the items of the questions to train on and of those held out, where only the side of queries
            is trained; None to encode items, too.
        prompts: put in front of items and of queries.
        temperature: of the softmax over scores.
        learn_temperature: train it.
        bf16: compute the encoder in bfloat16 while it trains.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        item_vectors: tuple[Tensor, Tensor] | None,
        prompts: tuple[str, str],
        temperature: float,
        learn_temperature: bool,
        bf16: bool = False,
    ):
        super().__init__()
        self.encoder = encoders.trainable_copy(encoder).eval()  # without dropout
        self.vectors, self.prompts, self.bf16 = item_vectors, prompts, bf16
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def scores(self, questions: Questions, rows: Sequence[int], held: bool = False) -> Tensor:
        """Return the scores [B, l] of a batch; each distinct text in it is encoded once."""
        item_prompt, query_prompt = self.prompts
        bf16 = self.bf16 and not held
        queries = [questions.queries[i] for i in rows]
        queries = encoders.embed_with_gradient(self.encoder, queries, query_prompt, bf16)  # [B, D]
        index = questions.index[rows]  # [B, l]
        if self.vectors is not None:
            items = self.vectors[held][index].to(queries.device)  # [B, l, D]
        else:
            used, places = index.unique(return_inverse=True)
            texts = [questions.items[i] for i in used.tolist()]
            items = encoders.embed_with_gradient(self.encoder, texts, item_prompt, bf16)[places.to(queries.device)]
        return torch.einsum("bd,bld->bl", queries, items)


# ---- training ----------------------------------------------------------------------------------------------------


def train(job: FitJob) -> Artefact:
    """Train a retriever and save it.

    Args:
        job: the method is "ropg-kd" or "ropg-rl".

    Raises:
        ConfigurationError: an option cannot work with this encoder or task.
        DataError: no question has items, or no rewards differ.
    """
    options, resources = job.options, job.resources
    _check(job)
    base = resources.encoder(None)
    if options.trained_side == "both" and encoders.has_routes(base):
        raise ConfigurationError("This encoder has a side of its own for queries: pass trained_side='query'.")
    left_out = [e for name in job.other_splits for e in job.read(name)] if options.train_on_histories else []
    digests = {"left_out": data_digest(job.task, left_out, answers=False)} if left_out else {}
    draft = job.draft(KIND, encoder=encoders.fingerprint(base)["digest"], **digests)
    if draft.finished:
        print("That training was complete already: nothing was trained now.")
        return draft.finished
    fit, held, facts = _questions(job, left_out)
    item_prompt, query_prompt = (base.prompts.get(name) or "" for name in ("document", "query"))
    vectors = None
    if options.trained_side == "query":
        store = resources.store(base, item_prompt)
        vectors = store(fit.items), store(held.items)
    prompts = item_prompt, query_prompt
    policy = Policy(base, vectors, prompts, options.temperature, options.learn_temperature, options.bf16)
    curve = _train(job, policy, fit, held, draft.folder)
    best = _best(curve)
    if best["reward"] <= curve[0]["reward"]:
        print("No epoch put better items first for the held-out users than the encoder did before training.")
    print(f"Kept: epoch {best['epoch']}, reward {best['reward']:.4f} (before training {curve[0]['reward']:.4f}).")
    return _save(job, draft, policy, base, {"curve": curve, "epoch": best["epoch"], **facts})


def _check(job: FitJob) -> None:
    options = job.options
    job.resources.check_ranker(options.candidates_by)
    job.task.prompt_format  # noqa: B018 - raises if there is none
    if not job.users.held:
        raise ConfigurationError("held_users is 0: keep some users to choose the best epoch by.")
    if options.candidates < 2:
        raise ConfigurationError(
            f"candidates is {options.candidates}; give at least 2, or there is nothing to choose."
        )


def _questions(job: FitJob, left_out: Sequence[Example]) -> tuple[Questions, Questions, dict[str, object]]:
    """Return the questions to train on and those held out, and facts about their rewards.

    Args:
        job: with the users of both.
        left_out: questions of other splits, nothing of which may be learned.
    """
    options, task = job.options, job.task
    examples = list(job.users.fit)
    if options.train_on_histories:
        examples += history_examples(examples, task, left_out)
    made, facts = [], {}
    for name, part in (("fit", examples), ("held", job.users.held)):
        part = [e for e in part if e.history]
        orders = job.resources.ranking(options.candidates_by, part)
        candidates = [order[: options.candidates] for order in orders]
        if not part:
            raise DataError(f"No question of the {name} users has a history: there are no items to rank.")
        rewards = Rewards.of(job.resources, part, candidates, options.reward, options.rewards)
        summary = rewards.summary()
        print(
            f"{len(part)} questions of the {name} users with {sum(map(len, candidates))} candidates: "
            f"{', '.join(f'{key} {value:.3f}' for key, value in summary.items())}; {rewards.asked} prompts asked now."
        )
        facts[name] = {"questions": len(part), "language_model_passes": rewards.passes, **summary}
        if not summary["informative"]:
            raise DataError(
                f"All candidates of a question have the same reward, for all {len(part)} questions of the {name} users: "
                "there is nothing to learn. Choose another reward, other candidates, or more questions."
            )
        values, rows = rewards.values, range(len(part))
        if options.drop_uninformative:
            rows = [i for i in rows if is_informative(values[i])]
        chosen = [part[i] for i in rows], [candidates[i] for i in rows], [values[i] for i in rows]
        made.append(Questions.of(task, *chosen, dated=options.dated_items))
    return made[0], made[1], {"rewards": facts}


def _train(job: FitJob, policy: Policy, fit: Questions, held: Questions, folder: Path) -> list[dict[str, float]]:
    """Train until the held-out reward no longer rises; load the best weights, and return the learning curve."""
    options = job.options
    rate = options.learning_rate or (1e-4 if options.trained_side == "query" else 3e-5)
    weights = [p for p in policy.encoder.parameters() if p.requires_grad]
    groups = [{"params": weights, "lr": rate}, {"params": [policy.log_temperature], "lr": _TEMPERATURE_RATE}]
    optimizer = torch.optim.Adam(groups)
    steps = options.epochs * math.ceil(len(fit.users) / options.questions_per_step)
    schedule = LambdaLR(optimizer, lambda step: _share(step, steps, options.warmup))
    curve = _load(folder, policy, optimizer, schedule)
    if not curve:
        curve = [{"epoch": 0, **_judge(job, policy, held)}]
    for epoch in range(len(curve), options.epochs + 1):
        if epoch - (_best(curve)["epoch"] if epoch > 1 else 0) > options.patience:
            break
        seed, losses = f"{job.seed}/{epoch}", []
        batches = list(fit.batches(options.questions_per_step, seed))
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6]))
        for rows in tqdm(batches, desc=f"Epoch {epoch}"):
            optimizer.zero_grad()
            loss = _loss(options, policy, fit, rows, generator=generator)
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        curve.append({"epoch": epoch, "training_loss": sum(losses) / len(losses), **_judge(job, policy, held)})
        if _best(curve)["epoch"] == epoch:
            _write(folder / _BEST, policy.state_dict())
        _write(folder / _CHECKPOINT, policy.state_dict() | _moments(optimizer), curve)
    with safe_open(folder / _BEST, "pt") as file:
        policy.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    return curve


def _loss(
    options: Any,
    policy: Policy,
    questions: Questions,
    rows: Sequence[int],
    held: bool = False,
    generator: torch.Generator | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    scores = policy.scores(questions, rows, held) if scores is None else scores
    rewards, mask = questions.rewards[rows].to(scores.device), questions.mask[rows].to(scores.device)
    if hasattr(options, "target_temperature"):
        target = options.target_temperature or (0.25 if options.reward == "metric" else 1.0)
        return kd_loss(scores, rewards, mask, target, policy.temperature, options.loss)
    return rl_loss(scores, rewards, mask, policy.temperature, options.loss, generator)


@torch.no_grad()
def _judge(job: FitJob, policy: Policy, held: Questions) -> dict[str, float]:
    """Return the mean loss of held-out questions, and the mean reward of the item that is put first."""
    loss, reward = 0.0, 0.0
    for rows in held.batches(job.options.questions_per_step):
        scores = policy.scores(held, rows, held=True)
        generator = torch.Generator().manual_seed(0)
        loss += _loss(job.options, policy, held, rows, True, generator, scores).item() * len(rows)
        first = _masked(scores.cpu(), held.mask[rows]).argmax(dim=1)
        reward += held.rewards[rows].gather(1, first[:, None]).sum().item()
    return {"loss": loss / len(held.users), "reward": reward / len(held.users)}


def _best(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the trained epoch with the best reward; of equals the one with the lowest loss."""
    return max(curve[1:], key=lambda epoch: (epoch["reward"], -epoch["loss"]))


def _share(step: int, steps: int, warmup: float) -> float:
    """Return the share of the learning rate at a step: up to 1, then down to 0."""
    rising = max(1, round(steps * warmup))
    return (step + 1) / rising if step < rising else max(0.0, (steps - step) / max(1, steps - rising))


# ---- files -------------------------------------------------------------------------------------------------------


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"adam/{i}/{name}": value for i, each in state.items() for name, value in each.items()}


def _write(path: Path, tensors: dict[str, Tensor], curve: Sequence[dict[str, float]] = ()) -> None:
    contents = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_write(path) as staging:
        save_file(contents, staging, {"curve": json.dumps(list(curve))})


def _load(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, schedule: LambdaLR
) -> list[dict[str, float]]:
    """Put everything back to where the last epoch ended; return the curve so far, empty if there is no such epoch."""
    path = folder / _CHECKPOINT
    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        curve = json.loads(file.metadata()["curve"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    moments: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith("adam/")]:
        _, number, part = name.split("/")
        moments.setdefault(int(number), {})[part] = tensors.pop(name)
    policy.load_state_dict(tensors)
    # The optimiser's own groups: rates belong to the schedule, which is brought to the same step.
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.last_epoch = int(moments[0]["step"])
    for group, rate, share in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * share(schedule.last_epoch)
    print(f"Going on after epoch {curve[-1]['epoch']}.")
    return curve


def _save(job: FitJob, draft: Draft, policy: Policy, base: SentenceTransformer, about: dict[str, Any]) -> Artefact:
    options, folder = job.options, draft.folder / "encoder"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted save
    policy.encoder.save_pretrained(str(folder), create_model_card=False)
    name, revision = encoders.origin(base)
    settings = {
        **job.settings(),
        "encoder": encoders.fingerprint(base)["digest"],
        "trained_side": options.trained_side,
        "prompts": list(policy.prompts),
        "dated_items": options.dated_items,
    }
    trained = sum(p.numel() for p in policy.encoder.parameters() if p.requires_grad)
    about |= {"encoder": {"name": name, "revision": revision}, "temperature": policy.temperature.item()}
    passes = sum(part["language_model_passes"] for part in about["rewards"].values())
    about["cost"] = {"language_model_passes": passes, "trained_weights": trained}
    artefact = draft.finish(settings, about)
    for path in (draft.folder / _CHECKPOINT, draft.folder / _BEST):
        path.unlink(missing_ok=True)
    return artefact
