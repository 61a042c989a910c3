"""Both kinds of persona store, for tests: a folder of SQLite files, and a real server on loopback."""

import multiprocessing
from contextlib import ExitStack

import torch
from resp_server import resp_server

from pplug_hf import EncoderSpec, Persona, open_store

SECRET = "a secret of the tests"
SPEC = EncoderSpec("digest of an encoder", 12, item_template="{text}", model_type="bert")
OTHER = EncoderSpec("digest of another", 8)
FORK = multiprocessing.get_context("fork")


def vector(name, width=12):
    """The vector of an item, which its id decides."""
    return torch.randn(width, generator=torch.Generator().manual_seed(hash_of(name))).half()


def hash_of(name):
    return int.from_bytes(name.encode("utf-8", "surrogatepass")[-7:], "big")


def items(*names, spec=SPEC, times=None):
    vectors = torch.stack([vector(name, spec.width) for name in names]) if names else torch.zeros(0, spec.width).half()
    return Persona(vectors, spec, names, None if times is None else torch.tensor(times, dtype=torch.float64))


def check(persona):
    """Nothing is torn: every item has its own vector."""
    assert torch.equal(persona.vectors, items(*persona.item_ids).vectors)
    return list(persona.item_ids)


class Place:
    """Where a store is, for both kinds.

    Attributes:
        place: what `open_store` takes.
        folder: of its files.
    """

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self._stack = ExitStack()
        self.place = self.start() if kind == "server" else folder

    def start(self, *options):
        self.process, self.place = self._stack.enter_context(resp_server(self.folder, *options))
        return self.place

    def open(self, spec=SPEC, **options):
        return open_store(self.place, spec, **{"secret": SECRET} | options)

    def bytes(self):
        return b"".join(path.read_bytes() for path in self.folder.rglob("*") if path.is_file())

    def close(self):
        self._stack.close()
