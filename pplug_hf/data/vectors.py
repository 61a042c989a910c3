"""Text vectors on disk: each text is encoded once per encoder.

A vector depends only on its text, the encoder and the encoder's prompt. The store has one folder per encoder and
prompt, with safetensors files that each hold vectors [n, D] and the SHA-256 of their texts [n, 32]; no text is stored.
A file is written as a whole and never changed, so a killed run keeps its finished files. Processes can share a store:
while one encodes, the others wait, and then read its vectors. In memory are the hashes, and the vectors that are asked for.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError
from ..modeling import encoders
from ..storage.files import atomic_write, locked
from ..storage.layout import DEFAULT_FOLDER
from ..tasks.items import whole_texts


class TextTable(ABC):
    """Vectors of texts, on disk. A subclass says how to compute them.

    Args:
        folder: of the files; its name has to tell apart what is computed differently.
        width: D.
        title: of the progress bar.

    Attributes:
        encoded: number of texts that this object has computed; 0 when all vectors were on disk.
        vectors: of the texts that `rows` was asked for so far, [n, D] in fp32; new ones are appended. Read only.
    """

    def __init__(self, folder: Path, width: int, title: str):
        self.folder, self.title = folder, title
        self.encoded = 0
        self._place: dict[bytes, int] = {}  # of each text in the files, one behind the other
        self._starts: list[int] = []  # of each file, among the places
        self._parts: list[Tensor] = []  # each file's vectors, mapped into memory: the system reads what is asked for
        self._files: set[Path] = set()  # files whose hashes are in memory
        self._row: dict[bytes, int] = {}  # of each text in `vectors`
        self._space = self.vectors = torch.zeros(0, width)  # the latter is the first part of the former
        self._read_new()

    @abstractmethod
    def compute(self, texts: list[str]) -> Tensor:
        """Return the vectors [len(texts), D] of one batch, in fp32 on the CPU."""

    def __len__(self) -> int:
        return len(self._place)

    def __call__(
        self, texts: Sequence[str], batch_size: int = 64, chunk_size: int = 4096, show_progress: bool = True
    ) -> Tensor:
        """Return the vectors of texts, encoding new ones.

        Args:
            texts: in any order, with repetitions.
            batch_size: texts per forward pass.
            chunk_size: texts per file, and the most that a killed run loses.
            show_progress: show a progress bar for new texts.

        Returns:
            [len(texts), D] in fp32, on the CPU.
        """
        keys = self._known(texts, batch_size, chunk_size, show_progress)
        return self._gather(keys, torch.empty(len(keys), self.vectors.shape[1]))

    def rows(
        self, texts: Sequence[str], batch_size: int = 64, chunk_size: int = 4096, show_progress: bool = True
    ) -> list[int]:
        """Return the index of each text in `vectors`, for who asks for the same ones often. Arguments as in `__call__`."""
        keys = self._known(texts, batch_size, chunk_size, show_progress)
        if new := [key for key in dict.fromkeys(keys) if key not in self._row]:
            start, end = len(self.vectors), len(self.vectors) + len(new)
            if end > len(self._space):  # at least twice as long, so that single texts are not copied again and again
                self._space = torch.empty(max(end, 2 * start), self.vectors.shape[1])
                self._space[:start] = self.vectors
            self._gather(new, self._space[start:end])
            self.vectors = self._space[:end]
            self._row.update(zip(new, range(start, end), strict=True))
        return [self._row[key] for key in keys]

    def _known(self, texts: Sequence[str], batch_size: int, chunk_size: int, show_progress: bool) -> list[bytes]:
        """Return the hash of each text, whose vectors are all on disk then."""
        texts = whole_texts(list(texts))
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._place}
        # Longest texts first: batches have even lengths, and the time left is never underestimated.
        todo = sorted(new.items(), key=lambda pair: len(pair[1]), reverse=True)
        if todo:
            self._encode(todo, batch_size, chunk_size, show_progress)
        return keys

    def _gather(self, keys: list[bytes], target: Tensor) -> Tensor:
        """Fill a tensor [n, D] with the vectors of texts, file by file, and return it."""
        places = np.array([self._place[key] for key in keys], dtype=np.intp)
        order = np.argsort(places)
        ends = [*np.searchsorted(places[order], self._starts[1:]), len(keys)]
        for part, start, first, end in zip(self._parts, self._starts, [0, *ends], ends, strict=False):
            if first < end:
                rows = order[first:end]
                target.numpy()[rows] = part.numpy()[places[rows] - start]
        return target

    def _encode(self, todo: list[tuple[bytes, str]], batch_size: int, chunk_size: int, show_progress: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        is_main = os.environ.get("LOCAL_RANK", "0") == "0"  # one of several training processes shows a bar
        with tqdm(total=len(todo), desc=self.title, unit="text", disable=not (show_progress and is_main)) as bar:
            while todo:
                with locked(self.folder):
                    if self._read_new():  # from another process
                        left = [pair for pair in todo if pair[0] not in self._place]
                        bar.update(len(todo) - len(left))
                        todo = left
                    chunk, todo = todo[:chunk_size], todo[chunk_size:]
                    if chunk:
                        self._encode_chunk(chunk, batch_size, bar)

    def _encode_chunk(self, chunk: list[tuple[bytes, str]], batch_size: int, bar: tqdm) -> None:
        found = []
        for at in range(0, len(chunk), batch_size):
            texts = [text for _, text in chunk[at : at + batch_size]]
            found.append(self.compute(texts))
            bar.update(len(texts))
        self._read(self._write(torch.cat(found), [key for key, _ in chunk]))
        self.encoded += len(chunk)

    def _read_new(self) -> bool:
        """Read the files that are new since the last call; return True if there were any."""
        new = sorted(set(self.folder.glob("*.safetensors")) - self._files)
        for path in new:
            self._read(path)
        return bool(new)

    def _read(self, path: Path) -> None:
        vectors, hashes = _mapped(path)
        start = self._starts[-1] + len(self._parts[-1]) if self._parts else 0
        self._starts.append(start)
        self._parts.append(vectors)
        self._place.update(zip(hashes, range(start, start + len(hashes)), strict=True))
        self._files.add(path)

    def _write(self, vectors: Tensor, hashes: list[bytes]) -> Path:
        keys = torch.from_numpy(np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32).copy())
        written = self.folder / f"{uuid.uuid4().hex}.safetensors"
        with atomic_write(written) as staging:
            save_file({"vectors": vectors.contiguous(), "sha256": keys}, staging)
        return written


class VectorStore(TextTable):
    """Vectors of texts under one frozen encoder, on disk.

    Args:
        encoder: a frozen encoder.
        prompt: put in front of every text.
        folder: of the files (default: next to the Hugging Face cache).
        task: "document" or "query", for encoders that have a side for each.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        prompt: str = "",
        folder: str | os.PathLike = DEFAULT_FOLDER,
        task: str = "document",
    ):
        self.encoder, self.prompt, self.task = encoder, prompt, task
        self.fingerprint = encoders.fingerprint(encoder, prompt)
        identity = f"{self.fingerprint['digest']}\n{prompt}"
        if task == "query" and encoders.has_routes(encoder):  # a side of its own
            identity += "\nquery"
        place = Path(folder) / hashlib.sha256(identity.encode()).hexdigest()[:16]
        super().__init__(place, self.fingerprint["embedding_size"], "Encoding texts")

    def compute(self, texts: list[str]) -> Tensor:
        """Return vectors in fp32 on the CPU.

        Args:
            texts: one batch.

        Returns:
            [len(texts), D].
        """
        return encoders.embed(self.encoder, texts, self.prompt, len(texts), task=self.task).cpu()


def _mapped(path: Path) -> tuple[Tensor, list[bytes]]:
    """Return the vectors of a file, of which nothing is read yet, and the hashes of their texts."""
    try:
        tensors = load_file(path)
        hashes = tensors["sha256"].numpy().tobytes()
        return tensors["vectors"], [hashes[at : at + 32] for at in range(0, len(hashes), 32)]
    except (SafetensorError, KeyError) as error:
        raise DataError(
            f"The vector file {path.name!r} in {str(path.parent)!r} is damaged ({error}): delete it; its texts will "
            "be encoded again."
        ) from error
