"""Deletion from persona stores: no byte is left, whatever happens meanwhile."""

import os
import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from stores import FORK, OTHER, SECRET, SPEC, check, items, vector

from pplug_hf.errors import (
    StoreError,
)
from pplug_hf.serving import sqlite_store
from pplug_hf.serving.keys import Keys
from pplug_hf.serving.packing import Packing


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_deleted_bytes_are_in_no_file(store_place, dtype, monkeypatch):
    monkeypatch.setattr(sqlite_store, "SHARDS", 1)  # many rows in one table, which SQLite moves between pages
    chance = random.Random(3)
    with store_place.open(dtype=dtype) as store, store_place.open() as reader:
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
        if store_place.kind == "server":
            store.compact()
        files = store_place.bytes()

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


def test_a_receipt_needs_readers_to_let_go(store_folder, monkeypatch):
    monkeypatch.setattr(sqlite_store, "BUSY_SECONDS", 0)
    monkeypatch.setattr(
        "pplug_hf.serving.sqlite_pool._SETTINGS", "PRAGMA busy_timeout = 50; PRAGMA secure_delete = ON;"
    )
    with store_folder.open() as store:
        store.append("anna", items("a"))
        pool = store._backend._pool(Keys(SECRET).user("", "anna"))
        with pool.lent() as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT * FROM users").fetchall()
            with pytest.raises(StoreError, match="a reader holds the log"):
                store.delete_user("anna")
            connection.execute("COMMIT")
        assert store.delete_items("anna", ["a"]).items == 0
        assert store.delete_user("anna").items == 1 and vector("a").numpy().tobytes() not in store_folder.bytes()
        assert store.delete_user("anna").items == 0


def test_deletions_at_once_wait_for_each_other(store_folder, monkeypatch):
    """A file has one checkpoint at a time, and SQLite refuses a second one at once."""
    monkeypatch.setattr(sqlite_store, "SHARDS", 1)
    users = [f"user {i}" for i in range(60)]
    with store_folder.open() as store, ThreadPoolExecutor(8) as pool:
        for user in users:
            store.append(user, items("a", "b"))
        assert [receipt.items for receipt in pool.map(store.delete_user, users)] == [2] * len(users)


def test_a_deletion_whose_log_cannot_be_written_back_does_not_say_that_nothing_was_written(store_folder, monkeypatch):
    class Broken(sqlite3.Connection):
        def execute(self, sql, *args):
            if "wal_checkpoint" in sql:
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *args)

    connect = sqlite3.connect
    with store_folder.open() as store:
        store.append("anna", items("a", "b"))
    with store_folder.open() as store:
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Broken, **options))
            with pytest.raises(StoreError, match=r"disk I/O error\. What was deleted stays deleted") as failed:
                store.delete_items("anna", ["a"])
        assert "Nothing was written" not in str(failed.value)
    with store_folder.open() as store:
        assert check(store.get("anna")) == ["b"]


def test_a_deletion_whose_answer_is_lost_is_confirmed_by_the_next(store_server, monkeypatch):
    import redis

    def lost(work, is_done):
        def call(*args):
            if is_done:
                work(*args)
            raise redis.TimeoutError("Timeout reading from socket")

        return call

    with store_server.open() as store:
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


def test_a_deletion_counts_what_only_another_namespace_holds(store_place):
    with store_place.open() as store, store_place.open(OTHER, namespace="second") as new:  # which is being filled
        store.append("anna", items("a", "b", "c"))
        new.append("ben", items("a", spec=OTHER))
        store.append("ben", items("a", "b"))
        assert new.delete_items("anna", ["a"]).items == 1
        assert new.delete_user("anna").items == 2 and store.get("anna") is None
        assert new.delete_user("ben").items == 2 and new.delete_user("ben").items == 0


def test_compacting_gives_space_back(store_folder, monkeypatch):
    monkeypatch.setattr(sqlite_store, "SHARDS", 1)
    with store_folder.open() as store:
        store.append("anna", items(*(f"item {i}" for i in range(20_000))))
        store.append("ben", items("a"))
        before = store.stats().size
        store.delete_user("anna")
        store.compact()
        assert store.stats().size < before / 2 and check(store.get("ben")) == ["a"]


def _drop(store_place, name):
    with store_place.open() as store:
        store.drop_namespace(name)


@pytest.mark.parametrize("seen", ["by a new process", "by an open store"])
def test_a_killed_drop_leaves_nothing_behind_a_receipt(store_place, seen, monkeypatch):
    def kill(*args, **kwargs):
        os._exit(1)

    with store_place.open() as store, store_place.open(OTHER, namespace="second") as second:
        store.append("ben", items("b"))
        second.append("anna", items("a", spec=OTHER))
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_store.shutil, "rmtree", kill)
            if store_place.kind == "server":
                patch.setattr(type(store._place._client), "unlink", kill)
            child = FORK.Process(target=_drop, args=(store_place, "second"))
            child.start()
            child.join()
            assert child.exitcode == 1
        bytes_of_anna = vector("a", 8).numpy().tobytes()
        assert bytes_of_anna in store_place.bytes()
        if seen == "by an open store":
            store.delete_user("anna")
    with store_place.open() as store:
        store.delete_user("anna")
        if store_place.kind == "server":
            store.compact()
        assert bytes_of_anna not in store_place.bytes() and check(store.get("ben")) == ["b"]


@pytest.mark.parametrize("spec", [OTHER, SPEC], ids=["same encoder", "another encoder"])
def test_a_deletion_reaches_a_namespace_that_was_made_again(store_place, spec):
    with (
        store_place.open() as store,
        store_place.open(OTHER, namespace="second") as stale,
        store_place.open() as another,
    ):
        stale.append("anna", items("a", spec=OTHER))
        assert store.delete_user("ben").items == 0  # this store has a connection to it now, too
        another.drop_namespace("second")
        with store_place.open(spec, namespace="second") as again:
            again.append("anna", items("b", "c", spec=spec))
            store.delete_items("anna", ["b"])
            assert again.get("anna").item_ids == ("c",)
            calls = [lambda user: stale.append(user, items("d", spec=OTHER))]
            if store_place.kind == "folder":
                calls += [stale.get, stale.version]
            for call in calls if spec == SPEC or store_place.kind == "folder" else []:
                with pytest.raises(StoreError, match="namespace 'second' was dropped"):
                    call("anna")
            stale.delete_user("anna")
            assert again.get("anna") is None


def test_a_namespace_that_is_dropped_meanwhile_is_passed_over(store_place, monkeypatch):
    with (
        store_place.open() as store,
        store_place.open(OTHER, namespace="second") as stale,
        store_place.open() as another,
    ):
        store.append("anna", items("a"))
        stale.append("anna", items("a", spec=OTHER))
        headers = store._place.headers()
        another.drop_namespace("second")
        monkeypatch.setattr(type(store._place), "headers", lambda self: headers)
        assert store.delete_user("anna").items == 1 and store.get("anna") is None
        with pytest.raises(StoreError, match="namespace 'second' was dropped"):
            stale.append("anna", items("b", spec=OTHER))


def test_a_deletion_reaches_what_was_written_into_a_namespace_while_it_was_dropped(store_server, monkeypatch):
    with store_server.open() as store, store_server.open(OTHER, namespace="second") as stale:
        script = stale._backend._script

        def drops_first(*args):
            store.drop_namespace("second")
            return script(*args)

        with monkeypatch.context() as patch:
            patch.setattr(stale._backend, "_script", drops_first)
            stale.append("anna", items("a", "b", spec=OTHER))
        assert len(stale.get("anna")) == 2  # and nobody else sees them
        assert stale.delete_user("anna").items == 2 and stale.get("anna") is None
