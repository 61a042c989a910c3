"""Bulk encoding on a Ray cluster of this machine: killed actors and a killed caller change nothing in the store."""

import copy
import importlib.util
import os
import signal
import subprocess
import sys

import pytest
from test_bulk import LOG, MemoryStore, assert_same, make_log, personalizer, run, stored, write  # noqa: F401

from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.serving import bulk_ray
from pplug_hf.serving.open_store import open_store

if importlib.util.find_spec("ray") is None:  # imported later, with a token
    pytest.skip("ray is not installed", allow_module_level=True)
CALLER = """
import os
import signal
import sys

from pplug_hf import Personalizer
from pplug_hf.serving.bulk import encode_items
from pplug_hf.serving.open_store import open_store

plug, source, folder = sys.argv[1:]
personalizer = Personalizer.from_pretrained(plug, encode_only=True)
with open_store(folder, personalizer.spec) as store:
    append, calls = store.append, []
    def killed(*items):
        calls.append(1)
        return append(*items) if len(calls) < 24 else os.kill(os.getpid(), signal.SIGKILL)
    store.append = killed
    encode_items(personalizer, store, [source], markers=folder + "/encoded", part_size=8, engine="ray")
"""


@pytest.fixture(scope="module")
def cluster():
    with bulk_ray._cluster(2):
        yield


def test_a_killed_actor_loses_and_doubles_nothing(cluster, personalizer, tmp_path):  # noqa: F811
    flag, folder = tmp_path / "killed", tmp_path / "log"
    for number in range(3):
        write(folder / f"{number}.parquet", LOG[number * 20 : number * 20 + 20])
    expected, _ = run(personalizer, [folder])

    class Fatal(type(personalizer.history_encoder)):
        def encode(self, *texts, **options):
            if not flag.exists():
                flag.touch()
                os._exit(1)
            return super().encode(*texts, **options)

    fatal = copy.copy(personalizer)
    fatal.history_encoder = copy.deepcopy(personalizer.history_encoder)
    fatal.history_encoder.__class__ = Fatal
    store, report = run(fatal, [folder], engine="ray", workers=2)
    assert flag.exists() and report.encoded == 60
    assert_same(store, expected, tolerance=1e-5)

    with pytest.raises(DataError, match=r"^[^\n]*gone\.jsonl is not valid JSON Lines[^\n]*$"):
        (tmp_path / "gone.jsonl").write_text("no JSON")
        run(personalizer, [tmp_path / "gone.jsonl"], engine="ray")
    with pytest.raises(ConfigurationError, match=r"has \d+ CPUs, and 400 workers and a reader need 201: choose fewer"):
        run(personalizer, [folder], engine="ray", workers=400)


def test_a_killed_caller_continues(cluster, personalizer, tmp_path):  # noqa: F811
    source, folder = write(tmp_path / "log.parquet", make_log(items=160)), tmp_path / "store"
    command = [sys.executable, "-c", CALLER, personalizer.plug_folder, source, folder]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    }  # a cluster of its own
    environment |= {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, capture_output=True, env=environment).returncode == -signal.SIGKILL
    with open_store(folder, personalizer.spec) as store:
        _, report = run(personalizer, [source], store, markers=folder / "encoded", engine="ray")
        assert 0 < report.done < 160 and report.done + report.encoded == 160
        expected, _ = run(personalizer, [source], MemoryStore(store.spec))
        assert_same(stored(store), expected, tolerance=1e-3)  # of fp16
