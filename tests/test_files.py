"""Single files: replaced as a whole, whichever part of the package writes them, and read with a clear error."""

import json
import os
from pathlib import Path

import pytest
import torch

from pplug_hf import Persona
from pplug_hf.errors import DataError
from pplug_hf.modeling.persona import EncoderSpec
from pplug_hf.storage.files import atomic_write, read_json_object, write_text


def write_persona(path):
    Persona(torch.zeros(1, 4), EncoderSpec("d", 4)).save_pretrained(path)


WRITERS = {"text": lambda path: write_text(path, "new"), "persona": write_persona}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "a.safetensors"
    path.parent.mkdir()
    path.write_text("old")
    return path


@writers
def test_a_new_file_takes_the_place_of_the_old_one_and_leaves_nothing_else(write, path):
    with path.open() as reader:
        write(path)
        assert reader.read() == "old"  # who has opened the old file reads it to the end
    assert path.read_bytes() != b"old" and list(path.parent.iterdir()) == [path]
    write(path.parent / "new" / "b.safetensors")
    assert [p.name for p in (path.parent / "new").iterdir()] == ["b.safetensors"]


@writers
def test_a_failed_write_leaves_the_old_file_and_nothing_else(write, path, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write(path)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@writers
def test_a_killed_writer_leaves_the_old_file(write, path, monkeypatch):
    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "replace", lambda *args: os._exit(9))
        try:
            write(path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_text() == "old"
    assert list(path.parent.glob("*.safetensors")) == [path]  # what is left does not look like a file of the kind


def test_an_error_in_the_block_leaves_the_old_file(path):
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as staging:
        staging.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_text_is_written_in_utf_8_with_its_own_line_ends(tmp_path):
    write_text(tmp_path / "a", "é\r\nb\n")
    assert (tmp_path / "a").read_bytes() == "é\r\nb\n".encode()


@pytest.mark.parametrize(
    "content, why",
    [
        (b"[1]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"{", "line 1 column 2"),
        (b"\xff", "codec"),
        (b"[" * 10**5, "is damaged"),
    ],
)
def test_what_is_no_json_object_is_an_error(tmp_path, content, why):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(
        DataError, match=rf"^The notes is damaged \(.*{why if why != 'is damaged' else ''}.*\): save it again\.$"
    ):
        read_json_object(tmp_path / "a.json", "The notes", "save it again")


def test_a_json_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps({"a": "é"}), encoding="utf-8")
    assert read_json_object(Path(tmp_path, "a.json"), "The notes") == {"a": "é"}


def test_the_package_replaces_files_in_one_place():
    package = Path(__file__).parent.parent / "pplug_hf"
    users = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if "os.replace(" in p.read_text("utf-8")}
    assert users == {"storage/files.py", "storage/replace.py"}
