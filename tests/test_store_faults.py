"""Persona stores that are damaged, full, out of reach, or something else."""

import os
import resource

import numpy as np
import pytest
from resp_server import resp_server
from stores import OTHER, SECRET, SPEC, check, items, vector

from pplug_hf import open_store
from pplug_hf.errors import (
    ConfigurationError,
    DamagedPersonaError,
    DamagedStoreError,
    DataError,
    StoreError,
)
from pplug_hf.serving import resp_store, sqlite_store
from pplug_hf.serving.keys import Keys


def test_a_full_disk_is_a_clear_error(store_place):
    many = items(*(f"item {i}" for i in range(20_000)))
    with store_place.open() as store:
        store.append("anna", items("a"))
        if store_place.kind == "folder":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        else:
            store._place._client.config_set("maxmemory", "1mb")
        try:
            with pytest.raises(StoreError, match=r"Nothing was written"):
                store.append("anna", many)
        finally:
            if store_place.kind == "folder":
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
def test_a_damaged_row_costs_one_user(store_folder, damage):
    with store_folder.open() as store:
        for i in range(30):
            store.append(f"user {i}", items(f"item {i}", f"other {i}"))
        store.delete_user("nobody")
    key = Keys(SECRET).user("", "user 7").user
    bad = vector("item 7").numpy().tobytes() if damage == "vector" else b'"item 7","other 7"'
    with store_folder.open() as store:
        store.compact()
    path = next(path for path in store_folder.folder.rglob("*.sqlite") if bad in path.read_bytes())
    flip(path, bad)
    with store_folder.open() as store:
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
def test_a_damaged_file_costs_its_users(store_folder, damage):
    users = [f"user {i}" for i in range(60)]
    with store_folder.open() as store:
        for user in users:
            store.append(user, items(*(f"{user} {i}" for i in range(100))))
        store.compact()
        victims = {
            user for user in users if store._backend._pool(Keys(SECRET).user("", user)).path.name == "03.sqlite"
        }
    path = store_folder.folder / "default" / "03.sqlite"
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
    with store_folder.open() as store:
        failed = set()
        for user in users:
            try:
                assert check(store.get(user)) == [f"{user} {i}" for i in range(100)]
            except DataError as error:
                failed.add(user)
                assert "03.sqlite" in str(error) or Keys(SECRET).user("", user).user.hex() in str(error)
        assert failed and failed <= victims


def test_a_store_of_something_else_is_refused(tmp_path, store_folder):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="is a file"):
        open_store(tmp_path / "file", SPEC, secret=SECRET)
    with store_folder.open():
        pass
    header = store_folder.folder / "default" / "namespace.json"
    for text in ("{", "[]", "{}", '{"spec": 3, "dtype": "float16"}'):
        header.write_text(text)
        with pytest.raises(DataError, match="damaged") as failed:
            store_folder.open()
        assert isinstance(failed.value, DamagedStoreError)
    (store_folder.folder / "store.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99"):
        store_folder.open()


@pytest.mark.parametrize("lost", ["store.json", "second/namespace.json", "default/namespace.json", "second"])
def test_a_store_that_has_lost_a_header_is_not_an_empty_one(store_folder, lost):
    with store_folder.open() as store, store_folder.open(OTHER, namespace="second") as new:
        store.append("anna", items("a"))
        new.append("anna", items("a", spec=OTHER))
        new.activate()
        path = store_folder.folder / lost
        path.rename(store_folder.folder / ".kept")
        for options in ({"spec": OTHER}, {"spec": None}):
            with pytest.raises(DamagedStoreError, match=f"{lost}.* is missing"):
                store_folder.open(**options)
        if path.parent.name == "second":
            with pytest.raises(StoreError):
                store.delete_user("anna")  # no receipt while vectors stay
        (store_folder.folder / ".kept").rename(path)
    with store_folder.open(OTHER) as new:
        assert new.get("anna").item_ids == ("a",) and new.delete_user("anna").items == 1


def test_a_folder_of_something_else_is_no_namespace(store_folder):
    (store_folder.folder / "default").mkdir(parents=True)
    (store_folder.folder / "default" / "notes.txt").write_text("x")
    with pytest.raises(ConfigurationError, match="default' holds something else"):
        store_folder.open()
    with store_folder.open(namespace="first") as store:
        store.append("anna", items("a"))
        assert check(store.get("anna")) == ["a"] and list(store.namespaces()) == ["first"]


def test_a_server_that_has_lost_its_active_namespace_is_damaged(store_server):
    with store_server.open() as store:
        store._place._client.hdel("pplug:store", "namespace:default")
    with pytest.raises(DamagedStoreError, match="default' is missing"):
        store_server.open()


def test_a_damaged_value_costs_one_user(store_server):
    with store_server.open() as store:
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
        store.append("anna", items("a", "b"))
        store._place._client.setrange(names[1], 0, b"\xff" * 4)  # NaN
        with pytest.raises(DamagedPersonaError, match=r"items of user .* are damaged"):
            store.get("anna")
        assert check(store.get("ben")) == ["b"]
        store.delete_user("anna")
        for header in ("x", "{}"):
            store._place._client.hset("pplug:store", "namespace:default", header)
            with pytest.raises(DamagedStoreError, match="'namespace:default' of 'pplug:store' is damaged"):
                store.delete_user("anna")


def test_a_server_that_is_gone_is_a_clear_error(store_server, caplog):
    with store_server.open() as store:
        assert not caplog.records
        store_server.process.kill()
        store_server.process.wait()
        for call in (store.get, store.version, store.delete_user, lambda user: store.append(user, items("a"))):
            with pytest.raises(StoreError, match="server of the store"):
                call("anna")
    with pytest.raises(StoreError) as failed:
        open_store(store_server.place.replace("//", "//:password@"), SPEC, secret=SECRET)
    assert "password" not in str(failed.value)


@pytest.mark.parametrize("password", ["hunter/2", "hunter?2", "[hunter", "12:34/hunter"])
def test_a_password_that_breaks_the_url_is_in_no_message(password):
    with pytest.raises(ConfigurationError, match="percent-encoded") as failed:
        open_store(f"redis://:{password}@127.0.0.1:6379/0", SPEC, secret=SECRET)
    assert "hunter" not in str(failed.value) and failed.value.__suppress_context__


def test_many_users_are_counted_in_parts(store_server, monkeypatch):
    monkeypatch.setattr(resp_store, "COUNTED", 2)
    sizes = []
    with store_server.open() as store:
        for i in range(5):
            store.append(f"user {i}", items("a", "b"))
        pipeline = type(store._place._client.pipeline())
        execute = pipeline.execute
        monkeypatch.setattr(pipeline, "execute", lambda self: [sizes.append(len(self)), execute(self)][1])
        assert (store.stats().users, store.stats().items) == (5, 10)
    assert sizes == [2, 2, 1] * 2


def test_a_server_that_forgets_is_warned_of(store_server, caplog):
    with store_server.open() as store:
        store._place._client.config_set("appendfsync", "everysec")
        store._place._client.config_set("maxmemory-policy", "allkeys-lru")
    store_server.open().close()
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
