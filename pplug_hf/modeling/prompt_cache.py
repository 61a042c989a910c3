"""A cache of what a language model computes from prompts, for soft prompts that stand behind them.

With `placement="answer"` the states of a prompt depend on its token ids alone: they are the same for every user, in every
epoch, and in every later turn of a conversation. An entry holds the states behind those of its parent, another entry
whose ids it begins with. Entries are kept in memory up to one limit, then in files up to another; what fits into neither
is computed each time.

B prompts, T tokens, F numbers per token.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigurationError
from ..storage.files import atomic_write
from .prefix import Inserted, Known, word_embeddings
from .prompt_states import CausalStates, EncoderStates, digest_of, find_states
from .weight_sample import weight_state

logger = logging.getLogger(__name__)

# Options of a call that ask for what a cache does not have.
NOT_CACHED = ("output_attentions", "output_hidden_states", "cache_implementation", "past_key_values", "cache")

Ids = tuple[int, ...]
Entry = tuple[int, Tensor]  # length of the parent, states [n, F] of the tokens behind it
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size_in_bytes(size: str | int) -> int:
    """Return a size such as "4GB", "500 MB" or 0 in bytes.

    Raises:
        ConfigurationError: it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    if found is None:
        raise ConfigurationError(f"A size must be a number of bytes or a text such as '4GB' or '500MB', got {size!r}.")
    return int(float(found[1]) * _UNITS[found[2]])


class _Model(NamedTuple):
    """A backbone as the cache sees it."""

    backbone: PreTrainedModel
    kind: CausalStates | EncoderStates
    digest: str
    device: torch.device

    def name(self, ids: Ids) -> str:
        """Return the name of a prompt's entry, which tells its length."""
        return f"{self.digest}-{len(ids)}-{hashlib.sha256(array('q', ids)).hexdigest()[:40]}"


_NAME = re.compile(r"\w+-\d+-[0-9a-f]{40}")


def _length(name: str) -> int:
    return int(name.split("-")[-2])


class PromptCache:
    """The states of prompts, by their token ids. Several models and threads can share one.

    Args:
        memory: keep states of this size in memory, e.g. `"4GB"`, `"500MB"`, or bytes.
        folder: of safetensors files for what is more than that (default: none). Later processes use them again.
        disk: keep files of this size there.
        device: of the states in memory. On the model's own device nothing has to be copied to it.
        evict: where there is no more room, drop what was not used for longest: right for requests as they come. False
            keeps what came first: right for passes over a data set, of which the other rule would drop every prompt
            before its next turn.

    Attributes:
        computed: tokens that models have read because they were not in the cache.

    Raises:
        ConfigurationError: a size cannot be read.
    """

    def __init__(
        self,
        memory: str | int = "4GB",
        folder: str | os.PathLike | None = None,
        disk: str | int = "20GB",
        device: str | torch.device = "cpu",
        evict: bool = True,
    ):
        self.device, self.evict, self.computed = torch.device(device), evict, 0
        self._memory = _Memory(size_in_bytes(memory))
        self._files = _Files(folder, size_in_bytes(disk), evict)
        self._lengths = set(map(_length, self._files))  # of all that was ever stored
        self._shared: dict[Ids, None] = {}
        self._kinds: WeakKeyDictionary[PreTrainedModel, tuple[Any, str, object]] = WeakKeyDictionary()
        self._lock = RLock()

    def __deepcopy__(self, memo: object) -> PromptCache:
        return self  # of a model's copy, too

    @property
    def used(self) -> int:
        """Bytes of states in memory."""
        return self._memory.used

    def __len__(self) -> int:
        """Number of entries: prompts, and beginnings that they share."""
        return len({*self._memory, *self._files})

    def share(self, prompts: Iterable[Sequence[int]]) -> None:
        """Store the longest common beginning of prompts once, rather than in each of them.

        Args:
            prompts: token ids of a data set's prompts, or of some of them.
        """
        rows = [tuple(row) for row in prompts]
        pairs = zip(min(rows), max(rows), strict=False) if len(rows) > 1 else ()
        if common := tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)):
            self._shared[common] = None

    def fits(self, backbone: PreTrainedModel) -> bool:
        """Return whether the states of a backbone can be kept. This is measured once; if not, one warning says so.

        Args:
            backbone: a frozen language model. If its weights have changed since, it counts as another one.
        """
        state = [weight_state(weight) for weight in backbone.parameters()]
        if backbone not in self._kinds or self._kinds[backbone][2] != state:
            try:
                self._kinds[backbone] = find_states(backbone), digest_of(backbone), state
            except ValueError as error:
                self._kinds[backbone] = None, "", state
                logger.warning(
                    "The backbone %s does not work with a prompt cache (%s): prompts are read again each time.",
                    type(backbone).__name__,
                    error,
                )
        return self._kinds[backbone][0] is not None

    def of_tenants(self, tenants: Sequence[str]) -> TenantsPromptCache:
        """Return this cache for one batch, in which a tenant's rows are given only what the same tenant's rows left.

        Args:
            tenants: whose each row of the batch is.
        """
        return TenantsPromptCache(self, tenants)

    @torch.no_grad()
    def states(
        self,
        backbone: PreTrainedModel,
        rows: Sequence[Sequence[int]],
        mask: Tensor | None = None,
        tenants: Sequence[str] | None = None,
    ) -> Known:
        """Return the states of prompts. Those that are not in the cache are computed together.

        Args:
            backbone: a frozen language model.
            rows: the token ids of each prompt, without padding; not all of them empty.
            mask: [B, T], ones where the first tokens of each prompt are wanted (causal models; default: all of them).
            tenants: as of `of_tenants` (default: one for all).

        Returns:
            What the backbone takes (a `DynamicCache` padded on the left, or an encoder's output [B, T, H] padded on the
            right), and its mask.

        Raises:
            ConfigurationError: the states of this backbone cannot be kept, see [`fits`].
        """
        if not self.fits(backbone):
            raise ConfigurationError(f"A prompt cache does not work with the backbone {type(backbone).__name__}.")
        device = word_embeddings(backbone).weight.device
        kind, digest, _ = self._kinds[backbone]
        if torch.is_autocast_enabled(device.type):
            digest += str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        prompts = [tuple(row) for row in rows]
        owners = [""] * len(prompts) if tenants is None else tenants
        model, found = _Model(backbone, kind, digest, device), {}
        with self._lock:
            for tenant in dict.fromkeys(owners):
                own = [ids for ids, owner in zip(prompts, owners, strict=True) if owner == tenant]
                chains = self._chains(model._replace(digest=digest + _salt(tenant)), own)
                found |= {(tenant, ids): chain for ids, chain in chains.items()}
        if mask is None:
            mask = _padded([[1] * len(ids) for ids in prompts], kind.causal, device)
        lengths, chains = mask.sum(dim=1).tolist(), [found[key] for key in zip(owners, prompts, strict=True)]
        return Known(kind.past(self._joined(model, chains, lengths, mask.shape[1])), mask)

    def of_batch(
        self,
        backbone: PreTrainedModel,
        inserted: Inserted,
        needed: int | None = None,
        tenants: Sequence[str] | None = None,
    ) -> Known | None:
        """Return the states of what stands in front of all soft prompts of a batch.

        Args:
            backbone: a frozen language model.
            inserted: the batch with its soft prompts.
            needed: the first column whose logits are needed (default: the last one).
            tenants: as of `of_tenants` (default: one for all).

        Returns:
            States and mask of the first columns of the batch; of an encoder-decoder model, of the prompts. None where
            there is nothing to take: the backbone does not go with a cache, as none does that checkpoints its
            activations, or rows begin with their soft prompt.
        """
        checkpoints = (getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
        if (backbone.training and any(checkpoints)) or not self.fits(backbone):
            return None
        batch = zip(inserted.input_ids.tolist(), inserted.text_mask.tolist(), strict=True)
        texts = [[i for i, real in zip(*row, strict=True) if real] for row in batch]
        tokens = inserted.mask.sum(dim=1)
        has_none = tokens == inserted.text_mask.sum(dim=1)  # [B], of a soft prompt among the tokens
        if not self._kinds[backbone][0].causal:
            return self.states(backbone, texts, tenants=tenants) if has_none.all() and any(texts) else None
        rows = [ids[:n] for ids, n in zip(texts, inserted.position.tolist(), strict=True)]
        # Rows are padded in front, so their ends are at one column. Of a row without a soft prompt the last token is read,
        # for its answer follows from that.
        end = inserted.mask.shape[1] - int((tokens - inserted.position + has_none.long()).max())
        if end <= 0 or (needed is not None and needed < end) or not inserted.mask[:, :end].any():
            return None
        return self.states(backbone, rows, inserted.mask[:, :end], tenants)

    # ---- entries -------------------------------------------------------------------------------------------

    def _chains(self, model: _Model, prompts: Iterable[Ids]) -> dict[Ids, list[Tensor]]:
        """Return the states of each prompt, in parts [n, F] that follow each other."""
        found = {ids: self._chain(model, ids) for ids in dict.fromkeys(prompts)}
        missing = [ids for ids, chain in found.items() if chain is None]
        computed = self._compute(model, missing) if missing else {}
        return {ids: computed[ids] if chain is None else chain for ids, chain in found.items()}

    def _chain(self, model: _Model, ids: Ids) -> list[Tensor] | None:
        """Return the stored states of a prompt in parts, or None. Those used last are the parents, so they stay longest."""
        parts: list[Tensor] = []
        while ids:
            name = model.name(ids)
            start, states = self._find(name) or (-1, None)
            if states is None or not 0 <= start < len(ids) or states.shape != (len(ids) - start, model.kind.width):
                return None
            parts.insert(0, states)
            ids = ids[:start]
        return parts

    def _parent(self, model: _Model, ids: Ids) -> Ids:
        """Return the longest beginning of a prompt that is stored or to be shared."""
        if not model.kind.causal:
            return ()
        lengths = [n for n in self._lengths if n < len(ids)]
        stored = (ids[:n] for n in sorted(lengths, reverse=True))
        longest = next((part for part in stored if self._has(model.name(part))), ())
        return max([longest, *(s for s in self._shared if len(s) < len(ids) and ids[: len(s)] == s)], key=len)

    def _compute(self, model: _Model, prompts: list[Ids]) -> dict[Ids, list[Tensor]]:
        """Compute the states of prompts in one pass, and keep them.

        All rows read as many tokens as the one that lacks most, so that padding stands in front of everything: a model
        with a sliding window would count what stands between.
        """
        parents = {ids: self._parent(model, ids) for ids in prompts}
        chains = self._chains(model, parents.values())
        n = max(len(ids) - len(parents[ids]) for ids in prompts)
        before = None
        if max(map(len, prompts)) > n:
            known = [max(len(ids) - n, 0) for ids in prompts]
            before = self._joined(model, [chains[parents[ids]] for ids in prompts], known, max(known))
        left = model.kind.causal
        mask = _padded([[1] * len(ids) for ids in prompts], left, model.device)
        read = _padded([ids[-n:] for ids in prompts], left, model.device)
        states = model.kind.read(model.backbone, read, mask, before)  # [B, n, F]
        found = {}
        for row, ids in zip(states, prompts, strict=True):
            start = len(parents[ids])
            lacking = len(ids) - start
            self.computed += lacking
            own = (row[-lacking:] if left else row[:lacking]).to(self.device, copy=True)
            found[ids] = [*chains[parents[ids]], own]
            name = model.name(ids)
            self._memory.drop(name)  # one that lacks its parent
            self._files.drop(name)
            self._keep(name, (start, own))
        if self.evict:
            for ids in set(parents.values()):
                self._chain(model, ids)  # a parent stays longer than its children
        return found

    def _joined(self, model: _Model, chains: list[list[Tensor]], lengths: list[int], width: int) -> Tensor:
        """Return the first states of prompts as a batch [B, T, F] on the model's device, T being the width."""
        part = next(part for chain in chains for part in chain)
        states = torch.zeros(len(chains), width, part.shape[1], dtype=part.dtype, device=self.device)
        for row, chain, length in zip(states, chains, lengths, strict=True):
            at, end = (len(row) - length, len(row)) if model.kind.causal else (0, length)
            for part in chain:
                n = min(len(part), end - at)
                row[at : at + n] = part[:n]
                at += n
        return states.to(model.device)

    def _has(self, name: str) -> bool:
        return name in self._memory or name in self._files

    def _find(self, name: str) -> Entry | None:
        if (entry := self._memory.find(name)) is None and (entry := self._files.find(name)) is not None and self.evict:
            self._keep(name, entry)
        return entry

    def _keep(self, name: str, entry: Entry) -> None:
        self._lengths.add(_length(name))
        if self.evict:
            for oldest in self._memory.put(name, entry):
                self._files.put(*oldest)
        elif self._memory.has_room(entry):
            self._memory.put(name, entry)
        else:
            self._files.put(name, entry)


class TenantsPromptCache(NamedTuple):
    """A cache for one batch with rows of several tenants, of whom none is given what another has left."""

    cache: PromptCache
    tenants: Sequence[str]

    def of_batch(self, backbone: PreTrainedModel, inserted: Inserted, needed: int | None = None) -> Known | None:
        """See `PromptCache.of_batch`."""
        return self.cache.of_batch(backbone, inserted, needed, self.tenants)


AnyPromptCache: TypeAlias = PromptCache | TenantsPromptCache


def _salt(tenant: str) -> str:
    """Return what the names of a tenant's entries have in them; nothing for the default tenant."""
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:40] if tenant else ""


def _padded(rows: Sequence[Sequence[int]], left: bool, device: torch.device) -> Tensor:
    """Return rows of numbers as [B, T], with zeros on one side."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)], device=device)


def _size(entry: Entry) -> int:
    return entry[1].numel() * entry[1].element_size()


class _Memory(OrderedDict[str, Entry]):
    """Entries in memory, the one used last at the end."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.used = limit, 0

    def has_room(self, entry: Entry) -> bool:
        return self.used + _size(entry) <= self.limit

    def find(self, name: str) -> Entry | None:
        if name in self:
            self.move_to_end(name)
        return self.get(name)

    def drop(self, name: str) -> None:
        if name in self:
            self.used -= _size(self.pop(name))

    def put(self, name: str, entry: Entry) -> list[tuple[str, Entry]]:
        """Add an entry, and return those that had to go for it."""
        self.drop(name)
        self[name] = entry
        self.used += _size(entry)
        gone = []
        while self.used > self.limit:
            gone.append(self.popitem(last=False))
            self.used -= _size(gone[-1][1])
        return gone


class _Files(OrderedDict[str, int]):
    """Sizes of the entries in files, the one used last at the end. A file is written as a whole and never changed."""

    def __init__(self, folder: str | os.PathLike | None, limit: int, evict: bool):
        super().__init__()
        self.folder, self.limit, self.evict, self.writes = Path(folder or ""), limit, evict, bool(folder)
        ages = {}
        for path in self.folder.glob("*.safetensors") if folder else ():
            if _NAME.fullmatch(path.stem):
                with contextlib.suppress(OSError):  # another process has deleted it
                    ages[path.stem], self[path.stem] = path.stat().st_mtime, path.stat().st_size
        for name in sorted(ages, key=ages.__getitem__):
            self.move_to_end(name)
        self.used = sum(self.values())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def find(self, name: str) -> Entry | None:
        if name not in self:
            return None
        try:
            with safe_open(self._path(name), framework="pt") as file:
                start, checksum = (int(file.metadata()[key]) for key in ("start", "crc32"))
                states = file.get_tensor("states")
            if checksum != _checksum(states):
                raise ValueError
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # deleted, or damaged
            self.drop(name)
            return None
        self.move_to_end(name)
        return start, states

    def put(self, name: str, entry: Entry) -> None:
        """Write an entry, if there is room for it."""
        start, states = entry
        if name in self:
            self.move_to_end(name)
        if name in self or not self.writes:
            return
        while self.evict and self and self.used + _size(entry) > self.limit:
            self.drop(next(iter(self)))
        if self.used + _size(entry) > self.limit:
            return
        states = states.cpu()
        metadata = {"start": str(start), "crc32": str(_checksum(states))}
        try:
            with atomic_write(self._path(name)) as staging:
                save_file({"states": states}, staging, metadata)
        except (OSError, SafetensorError) as error:
            logger.warning(
                "No more prompts are stored in %r (%s). Those that do not fit into memory are read again each time.",
                str(self.folder),
                error,
            )
            self.writes = False
            return
        self[name] = _size(entry)
        self.used += _size(entry)

    def drop(self, name: str) -> None:
        if name not in self:
            return
        self.used -= self.pop(name)
        with contextlib.suppress(OSError):
            self._path(name).unlink(missing_ok=True)


def _checksum(states: Tensor) -> int:
    return zlib.crc32(states.view(torch.uint8).numpy().data)
