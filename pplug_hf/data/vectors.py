"""Item vectors on disk: a text is encoded once per encoder, ever.

A vector depends on its text, the encoder and the encoder's prompt alone. The store keeps safetensors files in one
folder per encoder and prompt, each with vectors [n, D] and the SHA-256 of their texts [n, 32]; no text is stored.
Files are written whole and never changed, so a killed run keeps what it had. Processes can share a store: while one
encodes, the others wait, and read what it wrote.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError
from ..modeling import encoders
from ..storage.files import atomic_write
from ..storage.replace import locked

DEFAULT_FOLDER = os.path.join(HF_HOME, "pplug_hf", "vectors")


class VectorStore:
    """Vectors of texts under one frozen encoder, in memory and on disk.

    Args:
        encoder: a frozen encoder.
        prompt: put in front of every text.
        folder: where the files are (default: beside the Hugging Face cache).

    Attributes:
        encoded: how many texts were encoded by this object; 0 when everything was on disk.
    """

    def __init__(self, encoder: SentenceTransformer, prompt: str = "", folder: str | os.PathLike = DEFAULT_FOLDER):
        self.encoder, self.prompt = encoder, prompt
        self.fingerprint = encoders.fingerprint(encoder, prompt)
        identity = f"{self.fingerprint['digest']}\n{prompt}"
        self.folder = Path(folder) / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.encoded = 0
        self._row: dict[bytes, int] = {}
        self._parts = [torch.zeros(0, self.fingerprint["embedding_size"])]  # of `vectors`, joined when it is read
        self._files: set[Path] = set()  # that are in memory
        self._read_new()

    def __len__(self) -> int:
        return len(self._row)

    def __call__(
        self, texts: Sequence[str], batch_size: int = 64, chunk_size: int = 4096, show_progress: bool = True
    ) -> Tensor:
        """The vectors of texts, encoding those that are new.

        Args:
            texts: may repeat.
            batch_size: texts per forward pass.
            chunk_size: texts per file; what a killed run loses at most.
            show_progress: show a progress bar over new texts.

        Returns:
            [len(texts), D] in fp32, on the CPU.
        """
        rows = self.rows(texts, batch_size, chunk_size, show_progress)  # first: it may add vectors
        return self.vectors[rows]

    @property
    def vectors(self) -> Tensor:
        """[len(self), D] all vectors, in fp32; new ones come behind those that are there. Not to be written to."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def rows(
        self, texts: Sequence[str], batch_size: int = 64, chunk_size: int = 4096, show_progress: bool = True
    ) -> list[int]:
        """Where in `vectors` each text is, for who does not want a copy. Arguments as in `__call__`."""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._row}
        # Long texts first: batches are even, and the time left is never underestimated.
        todo = sorted(new.items(), key=lambda pair: len(pair[1]), reverse=True)
        if todo:
            self._encode(todo, batch_size, chunk_size, show_progress)
        return [self._row[key] for key in keys]

    def _encode(self, todo: list[tuple[bytes, str]], batch_size: int, chunk_size: int, show_progress: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes of a training, one shows a bar
        with tqdm(total=len(todo), desc="Encoding texts", unit="text", disable=not (show_progress and first)) as bar:
            while todo:
                with locked(self.folder):
                    if self._read_new():  # what another process wrote meanwhile
                        left = [pair for pair in todo if pair[0] not in self._row]
                        bar.update(len(todo) - len(left))
                        todo = left
                    part, todo = todo[:chunk_size], todo[chunk_size:]
                    if part:
                        self._encode_part(part, batch_size, bar)

    def _encode_part(self, part: list[tuple[bytes, str]], batch_size: int, bar: Any) -> None:
        found = []
        for at in range(0, len(part), batch_size):
            rows = [text for _, text in part[at : at + batch_size]]
            found.append(encoders.embed(self.encoder, rows, self.prompt, batch_size).cpu())
            bar.update(len(rows))
        vectors, hashes = torch.cat(found), [key for key, _ in part]
        self._files.add(self._write(vectors, hashes))
        self._add(vectors, hashes)
        self.encoded += len(part)

    def _read_new(self) -> bool:
        """Take in the files that have come since the last time; whether there were any."""
        new = sorted(set(self.folder.glob("*.safetensors")) - self._files)
        for path in new:
            self._add(*_read(path))
            self._files.add(path)
        return bool(new)

    def _add(self, vectors: Tensor, hashes: list[bytes]) -> None:
        start = sum(map(len, self._parts))
        self._parts.append(vectors)
        self._row.update({key: start + i for i, key in enumerate(hashes)})

    def _write(self, vectors: Tensor, hashes: list[bytes]) -> Path:
        keys = torch.from_numpy(np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32).copy())
        written = self.folder / f"{uuid.uuid4().hex}.safetensors"
        with atomic_write(written) as staging:
            save_file({"vectors": vectors.contiguous(), "sha256": keys}, staging)
        return written


def _read(path: Path) -> tuple[Tensor, list[bytes]]:
    try:
        tensors: dict[str, Any] = load_file(path)
        return tensors["vectors"], [row.tobytes() for row in tensors["sha256"].numpy()]
    except (SafetensorError, KeyError) as error:
        raise DataError(
            f"The vector file {path.name!r} in {str(path.parent)!r} is damaged ({error}): delete it; its texts will "
            "be encoded again."
        ) from error
