"""Parts of a log, encoded by actors of a Ray cluster: the same code on a laptop and on many machines.

Workers read the files, which must lie where all of them find them, and encode; the caller gets the vectors and writes the
store. A killed actor is started again and its part encoded again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..data.item_log import ItemRow, Part
from ..errors import ConfigurationError, PPlugError
from ..optional import require

Encode: TypeAlias = Callable[..., Tensor]  # of texts
Read: TypeAlias = Callable[[Path], Iterator[Part]]


def encoded_parts(files: Sequence[Path], read: Read, encode: Encode, workers: int) -> Iterator[tuple[Part, Tensor]]:
    """Yield parts in the order of the log, each with the vectors [rows without a fault, D] in fp32.

    Args:
        files: of the log.
        read: gives the parts of a file.
        encode: gives the vectors of texts.
        workers: actors.

    Raises:
        MissingPackageError: Ray is not installed.
        PPlugError: what `read` or `encode` raised on a worker.
    """
    with _cluster(workers) as ray:
        data = require("ray.data", "ray", "The engine ray")
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / workers)
        parts = data.from_items([{"file": str(path)} for path in files], override_num_blocks=len(files))
        parts.context.enable_progress_bars = False
        parts.context.execution_options.preserve_order = True
        parts = parts.flat_map(partial(_read, read), num_cpus=0.5)
        # A small file would be one block, of one actor. An actor that takes a whole CPU leaves none for the reader.
        parts = parts.repartition(target_num_rows_per_block=1).map(
            _Encoder,
            fn_constructor_args=(ray.put(encode),),
            compute=data.ActorPoolStrategy(size=workers),
            num_cpus=0.5,
            num_gpus=gpus,
        )
        try:
            for row in parts.iter_rows():
                part = _part(row["part"])
                vectors = np.frombuffer(row["vectors"], np.float32).copy()
                yield part, torch.from_numpy(vectors.reshape(max(1, len(part.texts)), -1))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if not isinstance(cause, PPlugError):
                raise
            raise type(cause)(str(cause).partition("\n")[0]) from None  # Ray's advice follows


def _read(read: Read, row: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the parts of a file as rows of a data set, each of one text: a part stays whole on its way."""
    for part in read(Path(row["file"])):
        yield {"part": json.dumps(part)}


def _part(text: str) -> Part:
    digest, file, first, rows, done = json.loads(text)
    return Part(digest, file, first, [ItemRow(*row) for row in rows], done)


class _Encoder:
    """Actor that adds the vectors to a part."""

    def __init__(self, encode: Any):
        import ray

        self.encode: Any = ray.get(encode)
        if torch.cuda.is_available():
            self.encode.args[0].to("cuda")

    def __call__(self, row: Mapping[str, str]) -> dict[str, object]:
        vectors = self.encode(_part(row["part"]).texts)
        return {"part": row["part"], "vectors": vectors.numpy().tobytes()}


@contextmanager
def _cluster(workers: int) -> Iterator[ModuleType]:
    """Use the cluster of this process or of RAY_ADDRESS, or start one on this machine and end it afterwards.

    A cluster listens on every network of its machine, so one that is started here asks for a token that nobody else knows.
    Ray reads the token's settings when it is imported.

    Yields:
        The module ray.

    Raises:
        ConfigurationError: the cluster is too small, and would wait for ever; or Ray was imported without a token before.
    """
    is_joined = "RAY_ADDRESS" in os.environ
    was_imported = "ray" in sys.modules
    if not (is_joined or was_imported):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = require("ray", "ray", "The engine ray")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    is_ours = not ray.is_initialized()
    try:
        if is_ours and is_joined:
            ray.init(**quiet)
        elif is_ours:
            if os.environ.get("RAY_AUTH_MODE") != "token":
                raise ConfigurationError(
                    "Ray was imported before without RAY_AUTH_MODE=token, so its cluster would be open to the network: set it "
                    "before the import, or start the cluster yourself with ray.init()."
                )
            cpus = max(os.cpu_count() or 1, math.ceil(workers / 2) + 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        if (cpus := ray.cluster_resources().get("CPU", 0)) < workers / 2 + 1:
            raise ConfigurationError(
                f"The Ray cluster has {cpus:g} CPUs, and {workers} workers and a reader need {workers / 2 + 1:g}: choose fewer "
                "workers."
            )
        yield ray
    finally:
        if is_ours:
            ray.shutdown()
