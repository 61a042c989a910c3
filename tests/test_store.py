"""One suite for both kinds of persona store: a folder of SQLite files, and a real server on loopback."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sqlite3
import stat
import threading
from contextlib import ExitStack, suppress

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from resp_server import resp_server

from pplug_hf import EncoderSpec, Persona, cli, open_store
from pplug_hf.errors import (
    ConfigurationError,
    DamagedPersonaError,
    DamagedStoreError,
    DataError,
    MismatchError,
    StoreError,
)
from pplug_hf.serving import resp_store, sqlite_store
from pplug_hf.serving.keys import Key, Keys
from pplug_hf.serving.packing import Packing
from pplug_hf.serving.recent import Recent

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


@pytest.fixture(params=["folder", "server"])
def place(request, tmp_path):
    place = Place(request.param, tmp_path / "store")
    yield place
    place.close()


@pytest.fixture
def folder(tmp_path):
    return Place("folder", tmp_path / "store")


@pytest.fixture
def server(tmp_path):
    place = Place("server", tmp_path / "store")
    yield place
    place.close()


# ---- reading again ------------------------------------------------------------------------------------------------


def test_a_user_who_asks_again_is_not_read_again_until_anybody_changes_them(place):
    with place.open() as store, place.open() as another:
        store.append("anna", items("a"))
        first = store.get("anna")
        assert store.get("anna") is first and check(store.get_many(["anna"])[0]) == ["a"]
        another.append("anna", items("b"))
        assert check(store.get("anna")) == ["a", "b"] and store.get("anna") is store.get("anna")
        another.delete_items("anna", ["a"])
        assert check(store.get("anna")) == ["b"]
        store.replace("anna", items("c"))
        assert check(store.get("anna")) == ["c"] and store.tenant("other").get("anna") is None
        another.delete_user("anna")
        assert store.get("anna") is None and not store._recent._kept and store._recent._bytes == 0
        another.append("anna", items("a"))
        assert store.get("anna") is not first and check(store.get("anna")) == ["a"]
        store.delete_user("anna")
        assert not store._recent._kept


def test_a_forked_process_reads_for_itself(folder):
    with folder.open() as store:
        store.append("anna", items("a"))
        store.get("anna")
        with store._recent._lock:  # held by a thread that the child does not have
            child = FORK.Process(target=lambda: os._exit(check(store.get("anna")) != ["a"]))
            child.start()
        child.join(30)
        alive = child.is_alive()
        child.kill()
        assert not alive and child.exitcode == 0


def test_what_a_process_keeps_of_users_has_a_limit():
    size = items("a").vectors.nbytes
    recent, keys = Recent(3 * size), [Key(b"", bytes([i])) for i in range(5)]
    for i, key in enumerate(keys[:3]):
        recent.put(key, 1, items(str(i)))
    assert recent.get(keys[0], 1) is not None
    recent.put(keys[3], 1, items("3"))
    assert [recent.get(key, 1) is not None for key in keys] == [True, False, True, True, False]
    recent.put(keys[3], 2, items("4", "5"))
    assert recent.get(keys[3], 1) is None and recent.get(keys[3], 2) is None and recent._bytes <= 3 * size
    recent.put(keys[4], 1, items(*"abcd"))
    assert not recent._kept and recent._bytes == 0


# ---- what is written is read --------------------------------------------------------------------------------------


def test_items_come_back_with_their_ids_and_times(place):
    with place.open() as store:
        store.append("anna", items("a", "b", times=[1.5, 2.0]))
        store.append("anna", items("c", times=[3e9 + 0.25]))
        store.append("ben", items("a"))
        anna, nobody, ben = store.get_many(["anna", "nobody", "ben"])
        assert check(anna) == ["a", "b", "c"] and check(ben) == ["a"] and nobody is None
        assert anna.timestamps.tolist() == [1.5, 2.0, 3e9 + 0.25] and anna.timestamps.dtype == torch.float64
        assert ben.timestamps is None and anna.spec == SPEC and anna.vectors.dtype == torch.float16
        store.append("anna", items("d"))  # without a time
        assert check(store.get("anna")) == ["a", "b", "c", "d"] and store.get("anna").timestamps is None
        assert store.get_many([]) == []
    with place.open() as store:
        assert check(store.get("anna")) == ["a", "b", "c", "d"]


def test_an_item_is_kept_once(place):
    with place.open() as store:
        version = store.append("anna", items("a", "b", "a"))
        assert store.append("anna", items("b", "a")) == version == store.version("anna")
        assert store.append("anna", items("b", "c")) > version
        assert check(store.get("anna")) == ["a", "b", "c"]


def test_long_histories_are_read_as_written(place):
    names = [f"item {i}" for i in range(3000)]
    with place.open() as store:
        for start in range(0, 3000, 1100):
            store.append("anna", items(*names[start : start + 1100]))
        assert check(store.get("anna")) == names
        assert store.delete_items("anna", names[5:2990]).items == 2985
        assert check(store.get("anna")) == names[:5] + names[2990:]


def test_one_text_is_forgotten_without_encoding_anything_again(place):
    with place.open() as store:
        version = store.append("anna", items("a", "b", "c", times=[1, 2, 3]))
        assert store.delete_items("anna", "b").items == 1
        assert check(store.get("anna")) == ["a", "c"] and store.get("anna").timestamps.tolist() == [1, 3]
        assert store.version("anna") > version
        assert store.delete_items("anna", ["b", "x"]).items == 0  # not there is no error
        assert store.delete_items("anna", ["a", "c"]).items == 2
        assert store.get("anna") is None and store.version("anna") == 0 and list(store.users()) == []


def test_items_are_replaced(place):
    with place.open() as store:
        version = store.append("anna", items(*"abcdefghijklmnopqrstuvwxyz"))
        assert store.replace("anna", items("z", "y")) > version
        assert check(store.get("anna")) == ["z", "y"]
        assert store.replace("ben", items()) == store.replace("anna", items()) == 0
        assert store.get("anna") is None and store.stats().users == 0


def test_a_version_is_expected(place):
    with place.open() as store:
        with pytest.raises(MismatchError, match="at version 0, and version 3 was expected"):
            store.append("anna", items("a"), expected_version=3)
        version = store.append("anna", items("a"), expected_version=0)
        with pytest.raises(MismatchError, match="somebody else has changed"):
            store.replace("anna", items("b"), expected_version=version - 1)
        store.delete_user("anna")
        assert store.append("anna", items("b")) > version  # no version of before comes again
        assert check(store.get("anna")) == ["b"]


def test_two_tenants_share_nothing(place):
    with place.open() as store, place.open(tenant="acme") as opened:
        acme = store.tenant("acme")
        store.append("anna", items("a"))
        assert acme.get("anna") is None and opened.get("anna") is None
        acme.append("anna", items("b", "c"))
        assert check(opened.get("anna")) == ["b", "c"] and check(store.get("anna")) == ["a"]
        assert (store.stats().items, acme.stats().items) == (1, 2)
        assert set(store.users()).isdisjoint(acme.users())
        assert opened.delete_user("anna").items == 2 and check(store.get("anna")) == ["a"]
        assert acme.delete_items("anna", ["a"]).items == 0
        # Names cannot be shifted between tenant and user.
        store.tenant("ab").append("c", items("a"))
        assert store.tenant("a").get("bc") is None and store.tenant("abc").version("c") == 0


HOSTILE = [
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        ".",
        "..",
        "a/b",
        "\0",
        "a\0b",
        "a",
        " a",
        "a ",
        "A",
        "*",
        "{a}",
        "a:m",
    ),
    *(
        "'; DROP TABLE users; --",
        "%s",
        "\r\nFLUSHALL\r\n",
        "\ud800",
        "\u0445",
        "x",
        "é",
        "e\u0301",
        "ﬁ",
        "fi",
        "\u202ea",
    ),
    *("é" * 256, "👩‍👩‍👧", "\ufeffa", "\u0661", "1"),
]


def test_every_id_is_a_user_of_its_own(place):
    with place.open() as store:
        for i, user in enumerate(HOSTILE):
            store.append(user, items(f"item {i}"))
        for i, user in enumerate(HOSTILE):
            assert store.get(user).item_ids == (f"item {i}",)
        keys = list(store.users())
        assert len(keys) == len(set(keys)) == len(HOSTILE) == store.stats().users
        assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)
        assert store.delete_user("*").items == 1 and store.stats().users == len(HOSTILE) - 1
        assert b"passwd" not in place.bytes()
        store.append("items", items(*HOSTILE))
        assert store.get("items").item_ids == tuple(HOSTILE)
        assert store.delete_items("items", HOSTILE[1:]).items == len(HOSTILE) - 1
    assert {path.name for path in place.folder.parent.iterdir()} == {"store"}


@pytest.mark.parametrize("user", ["", "a" * 257, "a" * 2**20, None, 3, b"anna"])
def test_what_is_no_id_is_refused(place, user):
    with place.open() as store:
        for call in (store.get, store.version, store.delete_user, lambda user: store.append(user, items("a"))):
            with pytest.raises(DataError, match="texts of 1 to 256 characters"):
                call(user)
        with pytest.raises(DataError, match="texts of 1 to 256 characters"):
            store.delete_items("anna", [user])
        with pytest.raises(DataError, match="texts of 1 to 256 characters"):
            store.append("anna", Persona(torch.zeros(1, 12), SPEC, (user,)))
        assert store.stats().users == 0


def test_items_that_cannot_be_stored_are_refused(place):
    with place.open() as store:
        with pytest.raises(DataError, match="items with ids"):
            store.append("anna", Persona(torch.zeros(2, 12), SPEC))
        with pytest.raises(MismatchError, match=r"digest of another.*digest of an encoder"):
            store.append("anna", items("a", spec=OTHER))
        with pytest.raises(DataError, match="too large for float16"):
            store.append("anna", Persona(torch.full((1, 12), 1e5), SPEC, ("a",)))
        assert store.get("anna") is None


class AgainstADictionary(RuleBasedStateMachine):
    """The same calls on a store and on a dictionary."""

    USERS = st.sampled_from([("", "anna"), ("", "ben"), ("acme", "anna")])
    IDS = st.lists(st.integers(0, 60).map(str), max_size=40, unique=True)
    make = None  # opens the store

    def __init__(self):
        super().__init__()
        self.store, self.expected, self.versions = type(self).make(), {}, {}
        for tenant, user in (("", "anna"), ("", "ben"), ("acme", "anna")):
            self.store.tenant(tenant).delete_user(user)

    @rule(who=USERS, names=IDS)
    def append(self, who, names):
        known = self.expected.get(who, [])
        self.store.tenant(who[0]).append(who[1], items(*names))
        self.set(who, known + [name for name in names if name not in known])

    @rule(who=USERS, names=IDS)
    def replace(self, who, names):
        self.store.tenant(who[0]).replace(who[1], items(*names), expected_version=self.versions.get(who, 0))
        self.set(who, names)

    @rule(who=USERS, names=IDS)
    def delete_items(self, who, names):
        known = self.expected.get(who, [])
        left = [name for name in known if name not in names]
        assert self.store.tenant(who[0]).delete_items(who[1], names).items == len(known) - len(left)
        self.set(who, left)

    @rule(who=USERS)
    def delete_user(self, who):
        assert self.store.tenant(who[0]).delete_user(who[1]).items == len(self.expected.get(who, []))
        self.set(who, [])

    @rule()
    def reopen(self):
        self.store.close()
        self.store = type(self).make()

    def set(self, who, names):
        version, before = self.store.tenant(who[0]).version(who[1]), self.versions.get(who, 0)
        if names:
            assert version > before or (version == before and names == self.expected[who])
        else:
            assert version == 0
        self.expected[who], self.versions[who] = names, version

    @invariant()
    def same(self):
        for (tenant, user), names in self.expected.items():
            persona = self.store.tenant(tenant).get(user)
            assert (check(persona) if persona is not None else []) == names
        for tenant in ("", "acme"):
            mine = {who: names for who, names in self.expected.items() if who[0] == tenant and names}
            stats = self.store.tenant(tenant).stats()
            assert (stats.users, stats.items) == (len(mine), sum(map(len, mine.values())))
            assert len(list(self.store.tenant(tenant).users())) == len(mine)

    def teardown(self):
        self.store.close()


def test_a_store_agrees_with_a_dictionary(place):
    class Machine(AgainstADictionary):
        make = staticmethod(place.open)

    Machine.TestCase.settings = settings(
        max_examples=12, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
    )
    Machine.TestCase().runTest()


# ---- kills, processes, threads ------------------------------------------------------------------------------------


def _write(place, start, confirm):
    with place.open() as store:
        for i in range(start, start + 10_000):
            names = [f"{i}-{j}" for j in range(1 + i % 5)]
            store.append(f"user {i % 3}", items(*names))
            confirm.send(names)


@pytest.mark.parametrize("who", ["writer", "server"])
def test_nothing_is_lost_or_torn_when_processes_are_killed(place, who):
    if place.kind == "folder" and who == "server":
        pytest.skip("a folder has no server")
    confirmed = []
    for round in range(4):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        writer = FORK.Process(target=_write, args=(place, round * 10_000, sender))
        writer.start()
        sender.close()
        for _ in range(20 + 7 * round):
            confirmed += receiver.recv()
        victim = writer if who == "writer" else place.process
        os.kill(victim.pid, signal.SIGKILL)
        with suppress(EOFError):
            while True:
                confirmed += receiver.recv()
        writer.join()
        if who == "server":
            place.process.wait()
            place.start()
    with place.open() as store:
        found = [check(store.get(f"user {i}")) for i in range(3)]
    kept = [name for names in found for name in names]
    assert set(confirmed) <= set(kept) and len(kept) == len(set(kept)) and len(confirmed) > 300
    for names in found:  # of each append all items, or none
        for number in {name.split("-")[0] for name in names}:
            assert sum(name.startswith(f"{number}-") for name in names) == 1 + int(number) % 5


def _append(place, store, worker):
    """Append to a user of all workers, in a forked process, with the store of the parent or one's own."""
    store = store or place.open()
    for i in range(8):
        store.append("all", items(f"{worker}-{i}", f"both-{i}"))


@pytest.mark.parametrize("shared", [False, True], ids=["own store", "store of before the fork"])
def test_processes_write_to_one_user(place, shared):
    with place.open() as store:
        store.append("all", items("first"))
        processes = [
            FORK.Process(target=_append, args=(place, store if shared else None, worker)) for worker in range(3)
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


def test_threads_write_and_read(place):
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

    with place.open() as store:
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


# ---- deletion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_deleted_bytes_are_in_no_file(place, dtype, monkeypatch):
    monkeypatch.setattr(sqlite_store, "SHARDS", 1)  # many rows in one table, which SQLite moves between pages
    chance = random.Random(3)
    with place.open(dtype=dtype) as store, place.open() as reader:
        packing, kept, gone, number = Packing(SPEC, dtype), {}, {}, 0
        for _ in range(250):
            user = f"user {chance.randrange(40)}"
            if chance.random() < 0.75:
                names = [f"canary {number + i}" for i in range(chance.choice([1, 1, 2, 16, 60]))]
                number += len(names)
                store.append(user, items(*names))
                kept.setdefault(user, []).extend(names)
            elif user in kept:
                names = chance.sample(kept[user], min(len(kept[user]), chance.choice([1, 5, 100])))
                store.delete_items(user, names)
                gone.update(dict.fromkeys(names))
                kept[user] = [name for name in kept[user] if name not in gone]
                reader.get(user)
        user = max(kept, key=lambda user: len(kept[user]))
        receipt = store.delete_user(user)
        assert receipt.items == len(kept[user]) > 50 and receipt.time > 1.7e9
        assert receipt.key == Keys(SECRET).user("", user).user.hex()
        gone.update(dict.fromkeys(kept.pop(user)))
        if place.kind == "server":
            store.compact()
        files = place.bytes()

        span = 16 if dtype == "float32" else 8  # bytes that no two items have in common

        def rows(name):
            return packing.pack(items(name)).data.tobytes()[: packing.used]

        for name in gone:
            whole = rows(name)
            assert not any(whole[at : at + span] in files for at in range(0, len(whole) - span + 1, 4)), name
            assert f'"{name}"'.encode() not in files
        left = [rows(name)[:8] in files for names in kept.values() for name in names]
        assert sum(left) > 0.9 * len(left)  # but for those across two pages
        store.compact()
        assert all(store.get(user).item_ids == tuple(names) for user, names in kept.items() if names)


def test_a_receipt_needs_readers_to_let_go(folder, monkeypatch):
    monkeypatch.setattr("pplug_hf.serving.sqlite_pool.BUSY_SECONDS", 0)
    monkeypatch.setattr(
        "pplug_hf.serving.sqlite_pool._SETTINGS", "PRAGMA busy_timeout = 50; PRAGMA secure_delete = ON;"
    )
    with folder.open() as store:
        store.append("anna", items("a"))
        pool = store._backend._pool(Keys(SECRET).user("", "anna"))
        with pool.lent() as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT * FROM users").fetchall()
            with pytest.raises(StoreError, match="a reader holds the log"):
                store.delete_user("anna")
            connection.execute("COMMIT")
        assert store.delete_items("anna", ["a"]).items == 0
        assert store.delete_user("anna").items == 1 and vector("a").numpy().tobytes() not in folder.bytes()
        assert store.delete_user("anna").items == 0


def test_a_deletion_whose_log_cannot_be_written_back_does_not_say_that_nothing_was_written(folder, monkeypatch):
    class Broken(sqlite3.Connection):
        def execute(self, sql, *args):
            if "wal_checkpoint" in sql:
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *args)

    connect = sqlite3.connect
    with folder.open() as store:
        store.append("anna", items("a", "b"))
    with folder.open() as store:
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Broken, **options))
            with pytest.raises(StoreError, match=r"disk I/O error\. What was deleted stays deleted") as failed:
                store.delete_items("anna", ["a"])
        assert "Nothing was written" not in str(failed.value)
    with folder.open() as store:
        assert check(store.get("anna")) == ["b"]


def test_a_deletion_whose_answer_is_lost_is_confirmed_by_the_next(server, monkeypatch):
    import redis

    def lost(work, is_done):
        def call(*args):
            if is_done:
                work(*args)
            raise redis.TimeoutError("Timeout reading from socket")

        return call

    with server.open() as store:
        backend = store._backend
        for is_done in (True, False):
            store.append("anna", items("a", "b"))
            for delete, count in (
                (lambda: store.delete_items("anna", ["a"]), 1),
                (lambda: store.delete_user("anna"), 1),
            ):
                with monkeypatch.context() as patch:
                    patch.setattr(backend, "_script", lost(backend._script, is_done))
                    with pytest.raises(StoreError, match="may have been written or not"):
                        delete()
                assert delete().items == count and delete().items == 0


def test_a_deletion_counts_what_only_another_namespace_holds(place):
    with place.open() as store, place.open(OTHER, namespace="second") as new:  # which is being filled
        store.append("anna", items("a", "b", "c"))
        new.append("ben", items("a", spec=OTHER))
        store.append("ben", items("a", "b"))
        assert new.delete_items("anna", ["a"]).items == 1
        assert new.delete_user("anna").items == 2 and store.get("anna") is None
        assert new.delete_user("ben").items == 2 and new.delete_user("ben").items == 0


def test_compacting_gives_space_back(folder, monkeypatch):
    monkeypatch.setattr(sqlite_store, "SHARDS", 1)
    with folder.open() as store:
        store.append("anna", items(*(f"item {i}" for i in range(20_000))))
        store.append("ben", items("a"))
        before = store.stats().size
        store.delete_user("anna")
        store.compact()
        assert store.stats().size < before / 2 and check(store.get("ben")) == ["a"]


def _drop(place, name):
    with place.open() as store:
        store.drop_namespace(name)


@pytest.mark.parametrize("seen", ["by a new process", "by an open store"])
def test_a_killed_drop_leaves_nothing_behind_a_receipt(place, seen, monkeypatch):
    def kill(*args, **kwargs):
        os._exit(1)

    with place.open() as store, place.open(OTHER, namespace="second") as second:
        store.append("ben", items("b"))
        second.append("anna", items("a", spec=OTHER))
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_store.shutil, "rmtree", kill)
            if place.kind == "server":
                patch.setattr(type(store._place._client), "unlink", kill)
            child = FORK.Process(target=_drop, args=(place, "second"))
            child.start()
            child.join()
            assert child.exitcode == 1
        bytes_of_anna = vector("a", 8).numpy().tobytes()
        assert bytes_of_anna in place.bytes()
        if seen == "by an open store":
            store.delete_user("anna")
    with place.open() as store:
        store.delete_user("anna")
        if place.kind == "server":
            store.compact()
        assert bytes_of_anna not in place.bytes() and check(store.get("ben")) == ["b"]


@pytest.mark.parametrize("spec", [OTHER, SPEC], ids=["same encoder", "another encoder"])
def test_a_deletion_reaches_a_namespace_that_was_made_again(place, spec):
    with place.open() as store, place.open(OTHER, namespace="second") as stale, place.open() as another:
        stale.append("anna", items("a", spec=OTHER))
        assert store.delete_user("ben").items == 0  # this store has a connection to it now, too
        another.drop_namespace("second")
        with place.open(spec, namespace="second") as again:
            again.append("anna", items("b", "c", spec=spec))
            store.delete_items("anna", ["b"])
            assert again.get("anna").item_ids == ("c",)
            if place.kind == "folder":
                for call in (stale.get, stale.version, lambda user: stale.append(user, items("d", spec=OTHER))):
                    with pytest.raises(StoreError, match="namespace 'second' was dropped"):
                        call("anna")
            stale.delete_user("anna")
            assert again.get("anna") is None


def test_a_namespace_that_is_dropped_meanwhile_is_passed_over(place, monkeypatch):
    with place.open() as store, place.open(OTHER, namespace="second") as stale, place.open() as another:
        store.append("anna", items("a"))
        stale.append("anna", items("a", spec=OTHER))
        headers = store._place.headers()
        another.drop_namespace("second")
        monkeypatch.setattr(type(store._place), "headers", lambda self: headers)
        assert store.delete_user("anna").items == 1 and store.get("anna") is None
        if place.kind == "folder":
            with pytest.raises(StoreError, match="namespace 'second' was dropped"):
                stale.append("anna", items("b", spec=OTHER))


# ---- other encoders, secrets and types ------------------------------------------------------------------------------


def test_another_encoder_or_secret_is_refused(place):
    with place.open() as store:
        store.append("anna", items("a"))
    with pytest.raises(MismatchError, match=r"digest of an encoder.*digest of another"):
        place.open(OTHER)
    with pytest.raises(MismatchError, match="secret is not the one"):
        place.open(secret="another secret of tests")
    with pytest.raises(MismatchError, match="holds float16, not int8"):
        place.open(dtype="int8")
    with pytest.raises(ConfigurationError, match="at least 16 characters long, got 5"):
        place.open(secret="short")
    for name in ("../x", "", ".x", "a/b", "a" * 65, "a\n"):
        if name:
            with pytest.raises(ConfigurationError, match="cannot be a name"):
                place.open(namespace=name)
    with pytest.raises(ConfigurationError, match="float32, float16, int8"):
        place.open(namespace="new", dtype="float8")
    with pytest.raises(ConfigurationError, match="width is known"):
        place.open(EncoderSpec("digest", None), namespace="new")
    with place.open() as store:
        assert list(store.namespaces()) == ["default"] and check(store.get("anna")) == ["a"]


def test_a_new_encoder_is_a_new_namespace(place):
    old = place.open()
    old.append("anna", items("a", "b"))
    old.append("ben", items("a"))
    with place.open(OTHER, namespace="second", dtype="int8") as new:
        assert new.namespaces() == {"default": SPEC, "second": OTHER} and list(new.users()) == []
        for user in ("anna", "ben"):  # while the old one serves
            new.append(user, items(*old.get(user).item_ids, spec=OTHER))
        assert set(new.users()) == set(old.users())
        assert new.delete_items("anna", ["a"]).items == 1 and old.get("anna").item_ids == ("b",)  # in both
        with pytest.raises(ConfigurationError, match="in use"):
            new.drop_namespace("default")
        new.activate()
        assert list(new.namespaces()) == ["second", "default"]
        assert old.delete_user("ben").items == 1 and new.get("ben") is None
    with pytest.raises(MismatchError, match="pass namespace='default'"):
        place.open()
    with place.open(namespace="default") as again, place.open(OTHER) as new:
        assert again.get("anna").item_ids == new.get("anna").item_ids == ("b",)
        again.close()
        new = place.open(OTHER)
        new.drop_namespace("default")
        assert list(new.namespaces()) == ["second"] and new.get("anna").item_ids == ("b",)
        with pytest.raises(ConfigurationError, match="no namespace 'default'"):
            new.drop_namespace("default")
        new.close()
    old.close()


def test_a_folder_has_its_own_secret(folder, monkeypatch):
    with folder.open(secret=None) as store:
        store.append("anna", items("a"))
    path = folder.folder / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_text()) == 64
    assert stat.S_IMODE(folder.folder.stat().st_mode) == 0o700
    monkeypatch.setenv("PPLUG_STORE_SECRET", path.read_text())
    path.unlink()
    with folder.open(secret=None) as store:
        assert check(store.get("anna")) == ["a"] and not path.exists()
    monkeypatch.delenv("PPLUG_STORE_SECRET")
    with pytest.raises(MismatchError, match="secret is not the one"):
        folder.open(secret=None)


def test_a_server_needs_a_secret(server, monkeypatch):
    monkeypatch.delenv("PPLUG_STORE_SECRET", raising=False)
    with pytest.raises(ConfigurationError, match="at least 16 characters"):
        server.open(secret=None)
    monkeypatch.setenv("PPLUG_STORE_SECRET", SECRET)
    server.open(secret=None).close()


@pytest.mark.parametrize(
    "dtype, cosine, share", [("float32", 1.0, 2), ("float16", 0.9999999, 1), ("int8", 0.9999, 0.52)]
)
def test_small_types_stay_close(place, dtype, cosine, share):
    spec = EncoderSpec("digest", 768)
    vectors = torch.nn.functional.normalize(torch.randn(40, 768, generator=torch.Generator().manual_seed(0)))
    vectors[3] = 0
    with place.open(spec, dtype=dtype) as store:
        store.append("anna", Persona(vectors, spec, tuple(map(str, range(40)))))
        got = store.get("anna").vectors.float()
        similar = torch.nn.functional.cosine_similarity(got, vectors)
        assert similar[torch.arange(40) != 3].min() >= cosine - 1e-6 and not got[3].any()
        assert Packing(spec, dtype).row_size <= share * 768 * 2
    with place.open(spec) as store:  # the type of before
        assert store.get("anna").vectors.dtype == (torch.float16 if dtype == "float16" else torch.float32)


def test_odd_widths_are_padded(place):
    spec = EncoderSpec("digest", 7)
    with place.open(spec) as store:
        store.append("anna", items("a", "b", spec=spec))
        store.append("anna", items("c", spec=spec))
        assert torch.equal(store.get("anna").vectors, items("a", "b", "c", spec=spec).vectors)


def test_files_are_hardly_larger_than_the_vectors(folder, monkeypatch):
    monkeypatch.setattr(sqlite_store, "SHARDS", 1)
    spec, names = EncoderSpec("digest", 768), [f"item {i}" for i in range(60)]
    persona = items(*names, spec=spec, times=[1.7e9] * 60)
    with folder.open(spec) as store:
        for user in range(100):
            store.append(f"user {user}", persona)
        store.compact()
        assert store.stats().size <= 1.05 * 100 * 60 * 768 * 2


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_clear_error(place):
    many = items(*(f"item {i}" for i in range(20_000)))
    with place.open() as store:
        store.append("anna", items("a"))
        if place.kind == "folder":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        else:
            store._place._client.config_set("maxmemory", "1mb")
        try:
            with pytest.raises(StoreError, match=r"Nothing was written"):
                store.append("anna", many)
        finally:
            if place.kind == "folder":
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            else:
                store._place._client.config_set("maxmemory", "0")
        assert check(store.get("anna")) == ["a"]
        store.append("anna", items("b"))
        assert check(store.get("anna")) == ["a", "b"]


def flip(path, found):
    """Damage bytes of a file."""
    content = path.read_bytes()
    assert content.count(found) == 1
    path.write_bytes(content.replace(found, bytes(255 - byte for byte in found)))


@pytest.mark.parametrize("damage", ["vector", "ids"])
def test_a_damaged_row_costs_one_user(folder, damage):
    with folder.open() as store:
        for i in range(30):
            store.append(f"user {i}", items(f"item {i}", f"other {i}"))
        store.delete_user("nobody")
    key = Keys(SECRET).user("", "user 7").user
    bad = vector("item 7").numpy().tobytes() if damage == "vector" else b'"item 7","other 7"'
    with folder.open() as store:
        store.compact()
    path = next(path for path in folder.folder.rglob("*.sqlite") if bad in path.read_bytes())
    flip(path, bad)
    with folder.open() as store:
        with pytest.raises(DataError, match=f"items of user {key.hex()} are damaged"):
            store.get("user 7")
        for change in (lambda: store.append("user 7", items("new")), lambda: store.delete_items("user 7", ["item 7"])):
            with pytest.raises(DataError, match="damaged"):
                change()
        assert all(check(store.get(f"user {i}")) for i in range(30) if i != 7)
        assert store.delete_user("user 7").items == 2 and store.get("user 7") is None
        store.append("user 7", items("new"))
        assert check(store.get("user 7")) == ["new"]


@pytest.mark.parametrize("damage", ["header", "missing", "pages", "cut"])
def test_a_damaged_file_costs_its_users(folder, damage):
    users = [f"user {i}" for i in range(60)]
    with folder.open() as store:
        for user in users:
            store.append(user, items(*(f"{user} {i}" for i in range(100))))
        store.compact()
        victims = {
            user for user in users if store._backend._pool(Keys(SECRET).user("", user)).path.name == "03.sqlite"
        }
    path = folder.folder / "default" / "03.sqlite"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2 + 100])
    else:
        start = 0 if damage == "header" else 4096
        path.write_bytes(
            content[:start] + os.urandom(len(content) - start if start else 100) + content[start or 100 :]
        )
    with folder.open() as store:
        failed = set()
        for user in users:
            try:
                assert check(store.get(user)) == [f"{user} {i}" for i in range(100)]
            except DataError as error:
                failed.add(user)
                assert "03.sqlite" in str(error) or Keys(SECRET).user("", user).user.hex() in str(error)
        assert failed and failed <= victims


def test_a_store_of_something_else_is_refused(tmp_path, folder):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="is a file"):
        open_store(tmp_path / "file", SPEC, secret=SECRET)
    with folder.open():
        pass
    header = folder.folder / "default" / "namespace.json"
    for text in ("{", "[]", "{}", '{"spec": 3, "dtype": "float16"}'):
        header.write_text(text)
        with pytest.raises(DataError, match="damaged") as failed:
            folder.open()
        assert isinstance(failed.value, DamagedStoreError)
    (folder.folder / "store.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99"):
        folder.open()


def test_a_damaged_value_costs_one_user(server):
    with server.open() as store:
        store.append("anna", items("a"))
        store.append("ben", items("b"))
        names = store._backend._names(Keys(SECRET).user("", "anna"))
        store._place._client.append(names[1], b"x")
        with pytest.raises(DataError, match=r"items of user .* are damaged"):
            store.get("anna")
        assert check(store.get("ben")) == ["b"]
        store.delete_user("anna")
        assert store.get("anna") is None
        for facts in (b"[3],", b'["a","b"],', b"x"):
            store.append("anna", items("a"))
            store._place._client.setrange(names[0], 8, facts.ljust(30))
            for call in (store.get, lambda user: store.append(user, items("b"))):
                with pytest.raises(DamagedPersonaError, match=r"items of user .* are damaged"):
                    call("anna")
            store.delete_user("anna")
        for header in ("x", "{}"):
            store._place._client.hset("pplug:store", "namespace:default", header)
            with pytest.raises(DamagedStoreError, match="'namespace:default' of 'pplug:store' is damaged"):
                store.delete_user("anna")


def test_a_server_that_is_gone_is_a_clear_error(server, caplog):
    with server.open() as store:
        assert not caplog.records
        server.process.kill()
        server.process.wait()
        for call in (store.get, store.version, store.delete_user, lambda user: store.append(user, items("a"))):
            with pytest.raises(StoreError, match="server of the store"):
                call("anna")
    with pytest.raises(StoreError) as failed:
        open_store(server.place.replace("//", "//:password@"), SPEC, secret=SECRET)
    assert "password" not in str(failed.value)


@pytest.mark.parametrize("password", ["hunter/2", "hunter?2", "[hunter", "12:34/hunter"])
def test_a_password_that_breaks_the_url_is_in_no_message(password):
    with pytest.raises(ConfigurationError, match="percent-encoded") as failed:
        open_store(f"redis://:{password}@127.0.0.1:6379/0", SPEC, secret=SECRET)
    assert "hunter" not in str(failed.value) and failed.value.__suppress_context__


def test_many_users_are_counted_in_parts(server, monkeypatch):
    monkeypatch.setattr(resp_store, "COUNTED", 2)
    sizes = []
    with server.open() as store:
        for i in range(5):
            store.append(f"user {i}", items("a", "b"))
        pipeline = type(store._place._client.pipeline())
        execute = pipeline.execute
        monkeypatch.setattr(pipeline, "execute", lambda self: [sizes.append(len(self)), execute(self)][1])
        assert (store.stats().users, store.stats().items) == (5, 10)
    assert sizes == [2, 2, 1] * 2


def test_a_server_that_forgets_is_warned_of(server, caplog):
    with server.open() as store:
        store._place._client.config_set("appendfsync", "everysec")
        store._place._client.config_set("maxmemory-policy", "allkeys-lru")
    server.open().close()
    assert "loses its last changes" in caplog.text and "may evict users" in caplog.text


def test_a_cluster_keeps_a_user_in_one_slot(tmp_path):
    with resp_server(tmp_path, "--cluster-enabled", "yes") as (_, url):
        import redis

        with redis.Redis.from_url(url) as node:
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while b"cluster_state:ok" not in node.execute_command("CLUSTER", "INFO"):
                pass
        with open_store(url.replace("redis", "valkey", 1), SPEC, secret=SECRET) as store:
            for i in range(20):
                store.append(f"user {i}", items("a", f"item {i}"))
            assert [check(one) for one in store.get_many(["user 3", "user 4"])] == [["a", "item 3"], ["a", "item 4"]]
            assert store.stats().items == 40 and len(list(store.users())) == 20
            assert store.delete_items("user 3", ["a"]).items == 1 and store.delete_user("user 4").items == 2
            assert check(store.get("user 3")) == ["item 3"] and store.get("user 4") is None


def test_rows_are_cut_where_pages_end():
    sizes = [1560] * 50
    cuts = list(sqlite_store._cuts(sizes))
    assert [start for start, _ in cuts] == [0, *(end for _, end in cuts[:-1])] and cuts[-1][1] == 50
    assert all(sum(sizes[start:end]) <= sqlite_store.CHUNK for start, end in cuts)
    assert list(sqlite_store._cuts([10**6, 10**6])) == [(0, 1), (1, 2)] and list(sqlite_store._cuts([])) == []
    for size in range(1, 40_000, 7):  # what is left in a page of the table is the least
        total = np.arange(20, 29) + size + sqlite_store._filling(size) + sqlite_store.LOCAL
        local = sqlite_store.LOCAL + (total - sqlite_store.LOCAL) % sqlite_store.OVERFLOW
        assert (local > 4096 - 35).all()


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_looks_after_a_store(folder, capsys, monkeypatch):
    monkeypatch.setenv("PPLUG_STORE_SECRET", SECRET)
    with folder.open() as store:
        store.append("anna", items("a", "b", times=[1, 2]))
        store.tenant("acme").append("anna", items("c"))

    def run(*options):
        status = cli.main(["store", "--store", str(folder.folder), *options])
        got = capsys.readouterr()
        return json.loads(got.out) if status == 0 else got.err

    stats = run()
    assert (stats["users"], stats["items"], stats["namespace"]) == (1, 2, "default")
    assert stats["namespaces"] == {"default": str(SPEC)}
    output = folder.folder.parent / "export"
    assert run("--action", "export", "--user", "anna", "--output", str(output))["items"] == 2
    assert check(Persona.from_pretrained(output)) == ["a", "b"]
    assert run("--action", "delete-items", "--user", "anna", "--items", "a", "x")["items"] == 1
    assert run("--action", "delete-user", "--user", "anna")["items"] == 1
    assert run("--action", "compact", "--tenant", "acme")["items"] == 1
    assert "holds no item of this user" in run("--action", "export", "--user", "anna", "--output", str(output))
    assert "--action delete-items needs --items." in run("--action", "delete-items", "--user", "anna")
    assert "no namespace 'x', but default" in run("--namespace", "x")
    assert "There is no store" in run("--store", str(output)) and list(output.iterdir()) == [
        output / "persona.safetensors"
    ]
    assert "--action stats takes no --user" in run("--user", "anna")


def test_a_deletion_of_nobody_says_so(folder, capsys, monkeypatch):
    monkeypatch.setenv("PPLUG_STORE_SECRET", SECRET)
    with folder.open() as store:
        store.append("anna", items("a"))
    arguments = ["store", "--store", str(folder.folder), "--action", "delete-user", "--user"]
    assert cli.main([*arguments, "ana"]) == 0
    assert "Nothing was deleted" in capsys.readouterr().err
    assert cli.main([*arguments, "anna"]) == 0
    assert not capsys.readouterr().err
