"""A frozen causal language model that reads a prompt once, whatever number of plugs continue it.

    context = reader.read(rows)                         # keys and values of what stands before the soft prompts
    reader.nll(context, softs, words, targets)          # J plugs at once, with gradients for their soft prompts

What stands before a soft prompt does not depend on it, so J plugs can share it: their continuations stand one behind
the other, and a mask keeps each from seeing the others. That equals J separate passes.

B prompts, J plugs, T tokens before the soft prompt, P soft tokens, W tokens behind it, Q = J * (P + W), H width,
V vocabulary, L labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from pplug_hf.modeling.prefix import cache_argument

COMPILED = "eager-compiled"


def compile_parts(backbone: Any, **options: Any) -> None:
    """Compile the norms, feed-forward layers and attention of a language model of Llama's kind.

    On a CPU in bfloat16 two thirds of a step are small operations between the matrix products. Compiled ones take half
    the time (7.2 s a step become 4.9 s), after a minute for compiling; it needs a C++ compiler, and rounding differs.

    Args:
        backbone: the language model.
        options: of `torch.compile`.
    """
    options = {"dynamic": True, **options}
    AttentionInterface.register(COMPILED, torch.compile(eager_attention_forward, **options))
    AttentionMaskInterface.register(COMPILED, eager_mask)
    backbone.set_attn_implementation(COMPILED)
    for module in backbone.modules():
        if type(module).__name__.endswith(("Norm", "MLP")):
            module.compile(**options)


class Context(NamedTuple):
    """Prompts up to their soft prompts, as the language model remembers them."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values [B, heads, T, width] of each layer
    mask: Tensor  # [B, T]

    def cache(self) -> DynamicCache:
        """Return a cache that starts with these tokens and may grow."""
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, number)
        return cache


class Reader:
    """A frozen causal language model without its padding and masks.

    Args:
        backbone: the language model, with rotary positions.
        pad: any token.
        budget: tokens of one pass with gradients; more plugs go through in several passes.
    """

    def __init__(self, backbone: Any, pad: int, budget: int = 6000):
        self.backbone, self.pad, self.budget = backbone, pad, budget
        self.base, self.head = backbone.base_model, backbone.get_output_embeddings()
        self.embed, self.device = backbone.get_input_embeddings(), backbone.device
        self.cache = cache_argument(backbone)
        assert "logits_to_keep" in inspect.signature(backbone.forward).parameters

    def padded(self, rows: Sequence[Sequence[int]], value: int | None = None) -> Tensor:
        """Return rows of ids as one matrix, padded behind."""
        width = max(map(len, rows))
        value = self.pad if value is None else value
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=self.device)

    def _real(self, rows: Sequence[Sequence[int]]) -> Tensor:
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return torch.arange(max(map(len, rows)), device=self.device) < lengths[:, None]  # [B, W]

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]]) -> Context:
        """Read what stands before the soft prompts, B rows of ids; what they begin with in common is read once."""
        B, shared = len(rows), _in_common(rows)
        mask, cache = self._real(rows), DynamicCache()
        if shared:
            self.base(input_ids=self.padded([rows[0][:shared]]), use_cache=True, **{self.cache: cache})
            cache.batch_repeat_interleave(B)
        self.base(
            input_ids=self.padded([row[shared:] for row in rows]),
            attention_mask=mask.long(),
            position_ids=torch.arange(shared, mask.shape[1], device=self.device)[None].expand(B, -1),
            use_cache=True,
            **{self.cache: cache},
        )
        return Context([(layer.keys, layer.values) for layer in cache.layers], mask)

    def hidden(
        self,
        context: Context,
        softs: Sequence[Tensor],
        words: Sequence[Sequence[int]],
        branches: Sequence[Sequence[int]] = (),
        cache: DynamicCache | None = None,
    ) -> list[Tensor]:
        """Return the last hidden states of J continuations of each prompt.

        Args:
            context: of B prompts.
            softs: J soft prompts [B, P] (P may differ and be 0).
            words: B rows of ids behind each soft prompt.
            branches: rows of ids that each follow the words, none of which sees another.
            cache: of the context, if it is to be kept.

        Returns:
            J tensors [B, W + all branches, H]; what is behind a row's end means nothing.
        """
        B, T = context.mask.shape
        device = self.device
        real, after = self._real(words), self.embed(self.padded(words))  # [B, W], [B, W, H]
        W, length = real.shape[1], real.sum(dim=1, keepdim=True)
        flat = [token for branch in branches for token in branch]
        if flat:
            extra = self.embed(torch.tensor(flat, device=device))[None].expand(B, -1, -1)
            after = torch.cat([after, extra], dim=1)
        own = torch.tensor([0] * W + [i + 1 for i, row in enumerate(branches) for _ in row], device=device)
        step = torch.tensor([i for row in branches for i in range(len(row))], device=device, dtype=torch.long)
        real = torch.cat([real, real.new_ones(B, len(flat))], dim=1)
        place = torch.cat(
            [torch.arange(W, device=device).expand(B, -1), length + step], dim=1
        )  # behind the soft prompt
        embeds, keys, positions, job, branch = [], [], [], [], []
        for j, soft in enumerate(softs):
            P = soft.shape[1]
            embeds += [soft.to(after.dtype), after]
            keys += [real.new_ones(B, P), real]
            positions += [torch.arange(P, device=device).expand(B, -1), P + place]
            job.append(torch.full((P + len(own),), j, device=device))
            branch += [own.new_zeros(P), own]
        jobs, branch = torch.cat(job), torch.cat(branch)  # [Q]
        Q = len(jobs)
        order = torch.arange(Q, device=device)
        seen = (jobs[:, None] == jobs) & (order[:, None] >= order)
        seen = seen & ((branch == 0) | (branch[:, None] == branch))  # [Q, Q]
        seen = seen & torch.cat(keys, dim=1)[:, None, :]  # [B, Q, Q]
        mask = torch.cat([context.mask[:, None, :].expand(B, Q, T), seen], dim=2)[:, None]
        start = context.mask.sum(dim=1, keepdim=True)
        states = self.base(
            inputs_embeds=torch.cat(embeds, dim=1),
            attention_mask=self._allowed(mask, embeds[0].dtype),
            position_ids=start + torch.cat(positions, dim=1),
            use_cache=True,
            **{self.cache: context.cache() if cache is None else cache},
        ).last_hidden_state
        found, at = [], 0
        for soft in softs:
            found.append(states[:, at + soft.shape[1] : at + soft.shape[1] + len(own)])
            at += soft.shape[1] + len(own)
        return found

    def _allowed(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a mask as the attention takes it: plain attention adds one."""
        if self.backbone.config._attn_implementation not in ("eager", COMPILED):
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def chunks(self, softs: Sequence[Tensor], words: Sequence[Sequence[int]], more: int = 0) -> Iterator[range]:
        """Yield ranges of plugs that one pass has room for."""
        width, start = max(map(len, words)) + more, 0
        budget = self.budget if torch.is_grad_enabled() else 2 * self.budget
        while start < len(softs):
            stop, tokens = start, 0
            while stop < len(softs):
                tokens += len(words) * (softs[stop].shape[1] + width)
                if tokens > budget and stop > start:
                    break
                stop += 1
            yield range(start, stop)
            start = stop

    def nll(
        self,
        context: Context,
        softs: Sequence[Tensor],
        after: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
    ) -> Tensor:
        """Return the negative log-likelihood [J, B] of the answers (whole, their end included)."""
        words = [[*a, *row[:-1]] for a, row in zip(after, answers, strict=True)]
        wanted = [[-100] * (len(a) - 1) + list(row) for a, row in zip(after, answers, strict=True)]
        targets = self.padded(wanted, -100)  # [B, W]
        row, column = (targets != -100).nonzero(as_tuple=True)
        states = torch.stack([states[row, column] for states in self.hidden(context, softs, words)])  # [J, n, H]
        logits = self.head(states)
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets[row, column].repeat(len(softs)), reduction="none")
        return nll.new_zeros(len(softs), len(words)).index_add(1, row, nll.view(len(softs), -1))

    @torch.no_grad()
    def label_log_probs(
        self,
        context: Context,
        softs: Sequence[Tensor],
        after: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
    ) -> Tensor:
        """Return the log-probability [J, B, L] of each label, its end included."""
        branches = [list(label[:-1]) for label in labels]  # a label of one token is its end: no branch
        found = []
        for chunk in self.chunks(softs, after, sum(map(len, branches))):
            for states in self.hidden(context, [softs[j] for j in chunk], after, branches):
                W = max(map(len, after))
                last = torch.tensor([len(a) - 1 for a in after], device=self.device)
                first = states[torch.arange(len(after), device=self.device), last]  # [B, H]
                first = self.head(first).float().log_softmax(dim=-1)  # [B, V]
                rest = self.head(states[:, W:]).float().log_softmax(dim=-1)  # [B, all branches, V]
                scores, at = [], 0
                for label in labels:
                    score = first[:, label[0]]
                    for i, token in enumerate(label[1:]):
                        score = score + rest[:, at + i, token]
                    at += len(label) - 1
                    scores.append(score)
                found.append(torch.stack(scores, dim=1))
        return torch.stack(found)

    @torch.no_grad()
    def greedy(
        self, context: Context, soft: Tensor, after: Sequence[Sequence[int]], end: int, most: int
    ) -> list[list[int]]:
        """Return the greedy answers to B prompts, at most `most` tokens each, without their end."""
        cache, B = context.cache(), len(after)
        (states,) = self.hidden(context, [soft], after, cache=cache)
        real = self._real(after)
        mask = torch.cat([context.mask, real.new_ones(B, soft.shape[1]), real], dim=1)  # [B, S]
        position = mask.sum(dim=1, keepdim=True)
        state = states[torch.arange(B, device=self.device), real.sum(dim=1) - 1]
        made = []
        ended = torch.zeros(B, dtype=torch.bool, device=self.device)
        for _ in range(most):
            token = self.head(state).argmax(dim=-1).masked_fill(ended, end)
            made.append(token)
            ended = ended | (token == end)
            if len(made) == most or (len(made) % 4 == 0 and bool(ended.all())):
                break
            mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)
            state = self.base(
                input_ids=token[:, None],
                attention_mask=self._allowed(mask[:, None, None, :], state.dtype),
                position_ids=position,
                use_cache=True,
                **{self.cache: cache},
            ).last_hidden_state[:, -1]
            position = position + 1
        rows = torch.stack(made, dim=1).tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]


def _in_common(rows: Sequence[Sequence[int]]) -> int:
    """Return with how many ids all rows begin; each has at least one more."""
    columns = zip(*(row[:-1] for row in rows), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
