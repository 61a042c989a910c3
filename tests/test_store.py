"""One suite for both kinds of persona store: a folder of SQLite files, and a real server on loopback."""

import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from stores import FORK, OTHER, SECRET, SPEC, check, items

from pplug_hf import EncoderSpec, Persona, cli, open_store
from pplug_hf.errors import (
    ConfigurationError,
    DataError,
    MismatchError,
)
from pplug_hf.serving import sqlite_store
from pplug_hf.serving.keys import Key
from pplug_hf.serving.packing import Packing
from pplug_hf.serving.recent import Recent

# ---- reading again ------------------------------------------------------------------------------------------------


def test_a_user_who_asks_again_is_not_read_again_until_anybody_changes_them(store_place):
    with store_place.open() as store, store_place.open() as another:
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


def test_a_forked_process_reads_for_itself(store_folder):
    with store_folder.open() as store:
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


def test_items_come_back_with_their_ids_and_times(store_place):
    with store_place.open() as store:
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
    with store_place.open() as store:
        assert check(store.get("anna")) == ["a", "b", "c", "d"]


def test_an_item_is_kept_once(store_place):
    with store_place.open() as store:
        version = store.append("anna", items("a", "b", "a"))
        assert store.append("anna", items("b", "a")) == version == store.version("anna")
        assert store.append("anna", items("b", "c")) > version
        assert check(store.get("anna")) == ["a", "b", "c"]


def test_long_histories_are_read_as_written(store_place):
    names = [f"item {i}" for i in range(3000)]
    with store_place.open() as store:
        for start in range(0, 3000, 1100):
            store.append("anna", items(*names[start : start + 1100]))
        assert check(store.get("anna")) == names
        assert store.delete_items("anna", names[5:2990]).items == 2985
        assert check(store.get("anna")) == names[:5] + names[2990:]


def test_one_text_is_forgotten_without_encoding_anything_again(store_place):
    with store_place.open() as store:
        version = store.append("anna", items("a", "b", "c", times=[1, 2, 3]))
        assert store.delete_items("anna", "b").items == 1
        assert check(store.get("anna")) == ["a", "c"] and store.get("anna").timestamps.tolist() == [1, 3]
        assert store.version("anna") > version
        assert store.delete_items("anna", ["b", "x"]).items == 0  # not there is no error
        assert store.delete_items("anna", ["a", "c"]).items == 2
        assert store.get("anna") is None and store.version("anna") == 0 and list(store.users()) == []


def test_items_are_replaced(store_place):
    with store_place.open() as store:
        version = store.append("anna", items(*"abcdefghijklmnopqrstuvwxyz"))
        assert store.replace("anna", items("z", "y")) > version
        assert check(store.get("anna")) == ["z", "y"]
        assert store.replace("ben", items()) == store.replace("anna", items()) == 0
        assert store.get("anna") is None and store.stats().users == 0


def test_a_version_is_expected(store_place):
    with store_place.open() as store:
        with pytest.raises(MismatchError, match="at version 0, and version 3 was expected"):
            store.append("anna", items("a"), expected_version=3)
        version = store.append("anna", items("a"), expected_version=0)
        with pytest.raises(MismatchError, match="somebody else has changed"):
            store.replace("anna", items("b"), expected_version=version - 1)
        store.delete_user("anna")
        assert store.append("anna", items("b")) > version  # no version of before comes again
        assert check(store.get("anna")) == ["b"]


def test_two_tenants_share_nothing(store_place):
    with store_place.open() as store, store_place.open(tenant="acme") as opened:
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


def test_every_id_is_a_user_of_its_own(store_place):
    with store_place.open() as store:
        for i, user in enumerate(HOSTILE):
            store.append(user, items(f"item {i}"))
        for i, user in enumerate(HOSTILE):
            assert store.get(user).item_ids == (f"item {i}",)
        keys = list(store.users())
        assert len(keys) == len(set(keys)) == len(HOSTILE) == store.stats().users
        assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)
        assert store.delete_user("*").items == 1 and store.stats().users == len(HOSTILE) - 1
        assert b"passwd" not in store_place.bytes()
        store.append("items", items(*HOSTILE))
        assert store.get("items").item_ids == tuple(HOSTILE)
        assert store.delete_items("items", HOSTILE[1:]).items == len(HOSTILE) - 1
    assert {path.name for path in store_place.folder.parent.iterdir()} == {"store"}


@pytest.mark.parametrize("user", ["", "a" * 257, "a" * 2**20, None, 3, b"anna"])
def test_what_is_no_id_is_refused(store_place, user):
    with store_place.open() as store:
        for call in (store.get, store.version, store.delete_user, lambda user: store.append(user, items("a"))):
            with pytest.raises(DataError, match="texts of 1 to 256 characters"):
                call(user)
        with pytest.raises(DataError, match="texts of 1 to 256 characters"):
            store.delete_items("anna", [user])
        with pytest.raises(DataError, match="texts of 1 to 256 characters"):
            store.append("anna", Persona(torch.zeros(1, 12), SPEC, (user,)))
        assert store.stats().users == 0


def test_items_that_cannot_be_stored_are_refused(store_place):
    with store_place.open() as store:
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


def test_a_store_agrees_with_a_dictionary(store_place):
    class Machine(AgainstADictionary):
        make = staticmethod(store_place.open)

    Machine.TestCase.settings = settings(
        max_examples=12, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
    )
    Machine.TestCase().runTest()


# ---- other encoders, secrets and types ------------------------------------------------------------------------------


def test_another_encoder_or_secret_is_refused(store_place):
    with store_place.open() as store:
        store.append("anna", items("a"))
    with pytest.raises(MismatchError, match=r"digest of an encoder.*digest of another"):
        store_place.open(OTHER)
    with pytest.raises(MismatchError, match="secret is not the one"):
        store_place.open(secret="another secret of tests")
    with pytest.raises(MismatchError, match="holds float16, not int8"):
        store_place.open(dtype="int8")
    with pytest.raises(ConfigurationError, match="at least 16 characters long, got 5"):
        store_place.open(secret="short")
    for name in ("../x", "", ".x", "a/b", "a" * 65, "a\n"):
        if name:
            with pytest.raises(ConfigurationError, match="cannot be a name"):
                store_place.open(namespace=name)
    with pytest.raises(ConfigurationError, match="float32, float16, int8"):
        store_place.open(namespace="new", dtype="float8")
    with pytest.raises(ConfigurationError, match="width is known"):
        store_place.open(EncoderSpec("digest", None), namespace="new")
    with store_place.open() as store:
        assert list(store.namespaces()) == ["default"] and check(store.get("anna")) == ["a"]


def test_a_new_encoder_is_a_new_namespace(store_place):
    old = store_place.open()
    old.append("anna", items("a", "b"))
    old.append("ben", items("a"))
    with store_place.open(OTHER, namespace="second", dtype="int8") as new:
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
        store_place.open()
    with store_place.open(namespace="default") as again, store_place.open(OTHER) as new:
        assert again.get("anna").item_ids == new.get("anna").item_ids == ("b",)
        again.close()
        new = store_place.open(OTHER)
        new.drop_namespace("default")
        assert list(new.namespaces()) == ["second"] and new.get("anna").item_ids == ("b",)
        with pytest.raises(ConfigurationError, match="no namespace 'default'"):
            new.drop_namespace("default")
        new.close()
    old.close()


def test_a_folder_has_its_own_secret(store_folder, monkeypatch):
    with store_folder.open(secret=None) as store:
        store.append("anna", items("a"))
    path = store_folder.folder / "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_text()) == 64
    assert stat.S_IMODE(store_folder.folder.stat().st_mode) == 0o700
    monkeypatch.setenv("PPLUG_STORE_SECRET", path.read_text())
    path.unlink()
    with store_folder.open(secret=None) as store:
        assert check(store.get("anna")) == ["a"] and not path.exists()
    monkeypatch.delenv("PPLUG_STORE_SECRET")
    with pytest.raises(MismatchError, match="secret is not the one"):
        store_folder.open(secret=None)


@pytest.mark.parametrize("left", ["empty file", "full disk"])
def test_a_secret_that_could_not_be_written_is_made_anew(tmp_path, monkeypatch, left):
    monkeypatch.delenv("PPLUG_STORE_SECRET", raising=False)
    if left == "empty file":
        (tmp_path / "secret").touch()
    else:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(os, "fsync", Mock(side_effect=OSError("no space left")))
            open_store(tmp_path, SPEC)
        assert not list(tmp_path.iterdir())
    with ThreadPoolExecutor(8) as pool:  # nobody gets another secret than the others
        stores = [*pool.map(lambda _: open_store(tmp_path, SPEC), range(8))]
    stores[0].append("anna", items("a"))
    assert all(check(store.get("anna")) == ["a"] for store in stores)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    for store in stores:
        store.close()


def test_a_server_needs_a_secret(store_server, monkeypatch):
    monkeypatch.delenv("PPLUG_STORE_SECRET", raising=False)
    with pytest.raises(ConfigurationError, match="at least 16 characters"):
        store_server.open(secret=None)
    monkeypatch.setenv("PPLUG_STORE_SECRET", SECRET)
    store_server.open(secret=None).close()


@pytest.mark.parametrize(
    "dtype, cosine, share", [("float32", 1.0, 2), ("float16", 0.9999999, 1), ("int8", 0.9999, 0.52)]
)
def test_small_types_stay_close(store_place, dtype, cosine, share):
    spec = EncoderSpec("digest", 768)
    vectors = torch.nn.functional.normalize(torch.randn(40, 768, generator=torch.Generator().manual_seed(0)))
    vectors[3] = 0
    with store_place.open(spec, dtype=dtype) as store:
        store.append("anna", Persona(vectors, spec, tuple(map(str, range(40)))))
        got = store.get("anna").vectors.float()
        similar = torch.nn.functional.cosine_similarity(got, vectors)
        assert similar[torch.arange(40) != 3].min() >= cosine - 1e-6 and not got[3].any()
        assert Packing(spec, dtype).row_size <= share * 768 * 2
    with store_place.open(spec) as store:  # the type of before
        assert store.get("anna").vectors.dtype == (torch.float16 if dtype == "float16" else torch.float32)


def test_odd_widths_are_padded(store_place):
    spec = EncoderSpec("digest", 7)
    with store_place.open(spec) as store:
        store.append("anna", items("a", "b", spec=spec))
        store.append("anna", items("c", spec=spec))
        assert torch.equal(store.get("anna").vectors, items("a", "b", "c", spec=spec).vectors)


def test_files_are_hardly_larger_than_the_vectors(store_folder, monkeypatch):
    monkeypatch.setattr(sqlite_store, "SHARDS", 1)
    spec, names = EncoderSpec("digest", 768), [f"item {i}" for i in range(60)]
    persona = items(*names, spec=spec, times=[1.7e9] * 60)
    with store_folder.open(spec) as store:
        for user in range(100):
            store.append(f"user {user}", persona)
        store.compact()
        assert store.stats().size <= 1.05 * 100 * 60 * 768 * 2


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_looks_after_a_store(store_folder, capsys, monkeypatch):
    monkeypatch.setenv("PPLUG_STORE_SECRET", SECRET)
    with store_folder.open() as store:
        store.append("anna", items("a", "b", times=[1, 2]))
        store.tenant("acme").append("anna", items("c"))

    def run(*options):
        status = cli.main(["store", "--store", str(store_folder.folder), *options])
        got = capsys.readouterr()
        return json.loads(got.out) if status == 0 else got.err

    stats = run()
    assert (stats["users"], stats["items"], stats["namespace"]) == (1, 2, "default")
    assert stats["namespaces"] == {"default": str(SPEC)}
    output = store_folder.folder.parent / "export"
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
    assert "--action stats takes no --user: leave it out, or name another one" in run("--user", "anna")
    bo = ("--user", "bo", "--items", "a")
    with store_folder.open() as store:
        store.append("bo", items("a", "b"))
    assert "delete-user takes no --items: leave it out, or name another one, --action delete-items." in run(
        "--action", "delete-user", *bo
    )
    assert "takes no --items or --output: leave it out." in run("--action", "delete-user", *bo, "--output", "x")
    assert "export takes no --items" in run("--action", "export", *bo, "--output", str(output))
    with store_folder.open() as store:
        assert check(store.get("bo")) == ["a", "b"]


def test_a_deletion_of_nobody_says_so(store_folder, capsys, monkeypatch):
    monkeypatch.setenv("PPLUG_STORE_SECRET", SECRET)
    with store_folder.open() as store:
        store.append("anna", items("a"))
    arguments = ["store", "--store", str(store_folder.folder), "--action", "delete-user", "--user"]
    assert cli.main([*arguments, "ana"]) == 0
    assert "Nothing was deleted" in capsys.readouterr().err
    assert cli.main([*arguments, "anna"]) == 0
    assert not capsys.readouterr().err
