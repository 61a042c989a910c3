"""Learning to choose between ways to answer: a sentence encoder and a linear head score a text of each way.

    z_m = (w + u_m) . f(text_m) + b + c_m            f, w and b are shared by all ways; in the paper, u and c are zero
    loss = KL(softmax(g / tau) || softmax(z))        g_m: reward of way m, in [0, 1]

The text shows what the language model would read (pre), or also what it answered (post). Of equal scores, that of the
first way counts. Salemi and Zamani (2024) call the two RSPG-Pre and RSPG-Post.

n questions, R ways, B questions of a step, D encoder width.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from ..errors import ConfigurationError, DataError, MismatchError
from ..modeling.encoders import embed, embed_with_gradient, encoder_size, load_encoder, trainable_copy

Order = Literal["answer-first", "paper"]
ENCODER, HEAD = "encoder", "head.safetensors"


@dataclass(frozen=True, kw_only=True)
class TextForm:
    """Form in which a way to answer becomes a text.

    Args:
        order: "answer-first" is the answer, the question, then the prompt, cut at its end, so that what is cut is
            the rest of the prompt. "paper" is the lower-case prompt, then the answer, cut at its start.
        length: tokens of a text (default: the encoder's own).
    """

    order: Order = "answer-first"
    length: int | None = None

    def texts(
        self,
        separator: str,
        queries: Sequence[str],
        prompts: Sequence[Sequence[str]],
        answers: Sequence[Sequence[str]] | None = None,
    ) -> list[list[str]]:
        """Return the texts of all ways to answer each question, n lists of R.

        Args:
            separator: between the parts, of the encoder's tokenizer.
            queries: n questions without their instruction.
            prompts: what the language model reads in each way, R lists of n.
            answers: what it answered, R lists of n; None to choose before it answers.
        """
        texts = []
        for i, query in enumerate(queries):
            own = []
            for m, prompt in enumerate(prompts):
                answer = [] if answers is None else [answers[m][i]]
                parts = [*answer, query, prompt[i]] if self.order != "paper" else [prompt[i].lower(), *answer]
                own.append(f" {separator} ".join(parts))
            texts.append(own)
        return texts


class SelectionModel(nn.Module):
    """Scores of texts.

    Args:
        encoder: trained in place; pass a `trainable_copy`.
        form: of the texts.
        ways: R, for a part of the head (u, c) that each way has for itself; 0 for none (paper).

    Raises:
        ConfigurationError: the encoder cannot read texts of the form's length.
    """

    def __init__(self, encoder: SentenceTransformer, form: TextForm, ways: int = 0):
        super().__init__()
        if form.length is not None:
            config = getattr(getattr(encoder[0], "auto_model", None), "config", None)
            most = getattr(config, "max_position_embeddings", None)
            if form.length < 1 or (most is not None and form.length > most):
                raise ConfigurationError(f"The encoder reads 1 to {most} tokens, and text_length is {form.length}.")
            encoder.max_seq_length = form.length
        encoder.tokenizer.truncation_side = "left" if form.order == "paper" else "right"
        self.encoder, self.form = encoder.eval(), form  # no drop-out: the same text has the same score
        width, device = encoder_size(encoder), encoder.device
        shapes = {"weight": (1, width), "bias": (1,), "row_weights": (ways, width), "row_biases": (ways,)}
        self.head = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape, device=device)) for name, shape in shapes.items() if shape[0]}
        )

    @classmethod
    def from_encoder(cls, encoder: SentenceTransformer, form: TextForm, ways: int = 0) -> SelectionModel:
        """Return a model to train, with a copy of an encoder."""
        return cls(trainable_copy(encoder), form, ways)

    @classmethod
    def load(
        cls, encoder: str | Path, head: str | Path, form: TextForm, device: str | torch.device | None = None
    ) -> SelectionModel:
        """Return a trained model.

        Args:
            encoder: folder of its encoder.
            head: file of its head.
            form: of the texts that it was trained with.
            device: where it runs.

        Raises:
            MismatchError: the head is of another encoder.
        """
        weights = load_file(head)
        model = cls(load_encoder(str(encoder)), form, len(weights.get("row_biases", ())))
        if {name: each.shape for name, each in weights.items()} != {n: p.shape for n, p in model.head.items()}:
            raise MismatchError(
                f"The head of the selector in {str(Path(head).parent)!r} is of another encoder: train it again."
            )
        model.head.load_state_dict(weights)
        return model.to(device).requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write `encoder/` and `head.safetensors`."""
        self.encoder.save_pretrained(str(folder / ENCODER), create_model_card=False)
        weights = {name: each.detach().cpu().contiguous() for name, each in self.head.items()}
        save_file(weights, folder / HEAD)

    @property
    def separator(self) -> str:
        """Separator of the parts of a text."""
        return str(self.encoder.tokenizer.sep_token or self.encoder.tokenizer.eos_token or "|")

    def forward(self, texts: Sequence[Sequence[str]], bf16: bool = False) -> Tensor:
        """Return scores [B, R], part of the autograd graph; equal texts are read once, in bfloat16 if told so."""
        distinct = list(dict.fromkeys(text for own in texts for text in own))
        return self._score(embed_with_gradient(self.encoder, distinct, bf16=bf16), distinct, texts)

    @torch.no_grad()
    def scores(self, texts: Sequence[Sequence[str]], batch_size: int = 32) -> Tensor:
        """Return scores [n, R] without gradients, on the CPU."""
        distinct = list(dict.fromkeys(text for own in texts for text in own))
        return self._score(embed(self.encoder, distinct, batch_size=batch_size, task="query"), distinct, texts).cpu()

    def _score(self, vectors: Tensor, distinct: Sequence[str], texts: Sequence[Sequence[str]]) -> Tensor:
        """Return scores [n, R] of texts, given the vectors of the distinct ones."""
        number = {text: i for i, text in enumerate(distinct)}
        rows = torch.tensor([[number[text] for text in own] for own in texts], device=vectors.device)
        scores = (vectors @ self.head["weight"][0] + self.head["bias"])[rows]
        if "row_weights" not in self.head:
            return scores
        own = vectors @ self.head["row_weights"].T + self.head["row_biases"]  # [distinct, R]
        return scores + own.gather(0, rows)

    def count_cut(self, texts: Sequence[Sequence[str]]) -> int:
        """Count the texts that are too long for the encoder."""
        flat, most = [text for own in texts for text in own], self.encoder.max_seq_length
        if most is None or not flat:
            return 0
        lengths = map(len, self.encoder.tokenizer(flat, truncation=False, verbose=False)["input_ids"])
        return sum(length > most for length in lengths)


def selection_loss(scores: Tensor, rewards: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean over questions of KL(softmax(rewards / temperature) || softmax(scores)).

    Args:
        scores: z, [B, R].
        rewards: g, [B, R].
        temperature: the lower, the more the best way counts.
    """
    target = F.log_softmax(rewards / temperature, dim=-1)
    return F.kl_div(F.log_softmax(scores, dim=-1), target, reduction="batchmean", log_target=True)


def choose(scores: Tensor) -> list[int]:
    """Return the way with the highest score [n, R] for each question; of equal ones the first."""
    return scores.detach().cpu().numpy().argmax(axis=-1).tolist()  # numpy's takes the first, torch's any of them


def informative(rewards: Tensor) -> Tensor:
    """Return the positions of questions whose ways [n, R] are not all equally good."""
    return (rewards.max(dim=1).values - rewards.min(dim=1).values > 1e-9).nonzero().flatten()


@dataclass(frozen=True, kw_only=True)
class SelectionTraining:
    """Settings of a training.

    Args:
        epochs: most passes over the questions.
        patience: stop after this many passes without a better choice on held-out users.
        questions_per_step: B.
        learning_rate: of the encoder.
        head_learning_rate: of the head, which starts at zero.
        warmup: share of the steps with a rising learning rate; then it falls to zero.
        temperature: of the rewards' softmax.
        seed: of the order.
        bf16: compute the encoder in bfloat16, with float32 weights.
    """

    epochs: int = 5
    patience: int = 3
    questions_per_step: int = 16
    learning_rate: float = 3e-5
    head_learning_rate: float = 1e-2
    warmup: float = 0.05
    temperature: float = 1.0
    seed: int = 0
    bf16: bool = False


def train_selection(
    model: SelectionModel,
    texts: list[list[str]],
    rewards: Tensor,
    held_texts: list[list[str]],
    held_rewards: Tensor,
    settings: SelectionTraining,
) -> list[dict[str, float]]:
    """Train a model in place, and leave it as it was after its best epoch.

    Args:
        model: a fresh one.
        texts: of the questions to learn from, n lists of R.
        rewards: of these ways, [n, R]; questions whose ways are all equally good are left out.
        held_texts: of questions of other users, likewise.
        held_rewards: of these ways.
        settings: see there.

    Returns:
        Per epoch `loss`, `held_loss`, and `held_reward`: the mean reward of the chosen ways.

    Raises:
        DataError: in all questions of either part, all ways are equally good.
    """
    used, held = informative(rewards).tolist(), informative(held_rewards).tolist()
    for part, kept, of in (("to learn from", used, len(rewards)), ("of the held-out users", held, len(held_rewards))):
        if not kept:
            raise DataError(
                f"For all {of} questions {part}, every row of the pool is equally good, so there is nothing to choose: take "
                "rows that answer differently, or more questions."
            )
    asked = [held_texts[i] for i in held]
    rows = [
        {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": settings.learning_rate},
        {"params": model.head.parameters(), "lr": settings.head_learning_rate},
    ]
    optimizer = torch.optim.Adam(rows)
    per_epoch = -(-len(used) // settings.questions_per_step)
    steps = per_epoch * settings.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, int(steps * settings.warmup), steps)
    curve: list[dict[str, float]] = []
    best, since = ((float("-inf"), 0.0), model.state_dict()), 0
    with tqdm(total=steps, desc="Learning to choose", unit="step") as bar:
        for epoch in range(settings.epochs):
            order = list(used)
            random.Random(f"{settings.seed}/{epoch}").shuffle(order)
            total = 0.0
            for start in range(0, len(order), settings.questions_per_step):
                batch = order[start : start + settings.questions_per_step]
                scores = model([texts[i] for i in batch], settings.bf16)  # [B, R]
                loss = selection_loss(scores, rewards[batch].to(scores.device), settings.temperature)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                total += float(loss.detach()) * len(batch)
                bar.update()
            scores = model.scores(asked)
            reward = float(held_rewards[held][range(len(held)), choose(scores)].mean())
            loss = float(selection_loss(scores, held_rewards[held], settings.temperature))
            curve.append({"loss": total / len(order), "held_loss": loss, "held_reward": reward})
            if (reward, -loss) > best[0]:
                best, since = ((reward, -loss), copy.deepcopy(model.state_dict())), 0
            else:
                since += 1
            if since >= settings.patience:
                break
    model.load_state_dict(best[1])
    return curve
