"""Persona stores that processes and threads write to at once, and that are killed meanwhile."""

import multiprocessing
import os
import signal
import threading
from contextlib import suppress

import pytest
from stores import FORK, check, items

from pplug_hf.errors import (
    MismatchError,
)


def _write(store_place, start, confirm):
    with store_place.open() as store:
        for i in range(start, start + 10_000):
            names = [f"{i}-{j}" for j in range(1 + i % 5)]
            store.append(f"user {i % 3}", items(*names))
            confirm.send(names)


@pytest.mark.parametrize("who", ["writer", "server"])
def test_nothing_is_lost_or_torn_when_processes_are_killed(store_place, who):
    if store_place.kind == "folder" and who == "server":
        pytest.skip("a folder has no server")
    confirmed = []
    for round in range(4):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        writer = FORK.Process(target=_write, args=(store_place, round * 10_000, sender))
        writer.start()
        sender.close()
        for _ in range(20 + 7 * round):
            confirmed += receiver.recv()
        victim = writer if who == "writer" else store_place.process
        os.kill(victim.pid, signal.SIGKILL)
        with suppress(EOFError):
            while True:
                confirmed += receiver.recv()
        writer.join()
        if who == "server":
            store_place.process.wait()
            store_place.start()
    with store_place.open() as store:
        found = [check(store.get(f"user {i}")) for i in range(3)]
    kept = [name for names in found for name in names]
    assert set(confirmed) <= set(kept) and len(kept) == len(set(kept)) and len(confirmed) > 300
    for names in found:  # of each append all items, or none
        for number in {name.split("-")[0] for name in names}:
            assert sum(name.startswith(f"{number}-") for name in names) == 1 + int(number) % 5


def _append(store_place, store, worker):
    """Append to a user of all workers, in a forked process, with the store of the parent or one's own."""
    store = store or store_place.open()
    for i in range(8):
        store.append("all", items(f"{worker}-{i}", f"both-{i}"))


@pytest.mark.parametrize("shared", [False, True], ids=["own store", "store of before the fork"])
def test_processes_write_to_one_user(store_place, shared):
    with store_place.open() as store:
        store.append("all", items("first"))
        processes = [
            FORK.Process(target=_append, args=(store_place, store if shared else None, worker)) for worker in range(3)
        ]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            check(store.get("all"))  # a reader never sees half of an append
        for process in processes:
            process.join()
            assert process.exitcode == 0
        expected = {"first", *(f"{worker}-{i}" for worker in [*range(3), "both"] for i in range(8))}
        names = check(store.get("all"))
        assert set(names) == expected and len(names) == len(expected)


def test_threads_write_and_read(store_place):
    errors, done = [], threading.Event()

    def guarded(work, *args):
        try:
            work(*args)
        except BaseException as error:
            errors.append(error)

    def write(worker):
        for i in range(10):
            store.append("all", items(f"{worker}-{i}"))
            store.append(f"own {worker}", items(f"{worker}-{i}"))
            while True:  # a counter: nobody's change is lost
                version = store.version("counter")
                names = store.get("counter").item_ids if version else ()
                try:
                    store.replace("counter", items(*names, f"n{len(names)}"), expected_version=version)
                    break
                except MismatchError:
                    pass

    def read():
        while not done.is_set():
            for persona in store.get_many(["all", "own 1", "counter"]):
                assert persona is None or check(persona)

    with store_place.open() as store:
        readers = [threading.Thread(target=guarded, args=(read,)) for _ in range(2)]
        writers = [threading.Thread(target=guarded, args=(write, worker)) for worker in range(4)]
        for thread in readers + writers:
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        for thread in readers:
            thread.join()
        assert not errors
        assert len(check(store.get("all"))) == 40 and len(check(store.get("own 3"))) == 10
        assert len(store.get("counter")) <= 40 and check(store.get("counter"))
