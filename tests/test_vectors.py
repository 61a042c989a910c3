"""The store of vectors: every text is encoded once, ever, and never written down."""

from pathlib import Path

import pytest
import tiny
import torch
from reference import close
from safetensors.torch import save_file

from pplug_hf.data.vectors import TextTable, VectorStore
from pplug_hf.errors import DataError

TEXTS = ["the sea", "i like rain and snow", "my dog", "the best book of the summer", "cold"]


@pytest.fixture
def encoder(monkeypatch):
    """An encoder that notes what it is asked; `limit` makes it fail once that many texts have been asked for."""
    encoder, asked = tiny.shared_encoder(), []
    encode = type(encoder).encode

    def noted(texts, **kwargs):
        if len(asked) + len(texts) > noted.limit:
            raise KeyboardInterrupt
        asked.extend(texts)
        return encode(encoder, texts, **kwargs)

    noted.limit = float("inf")
    monkeypatch.setattr(encoder, "encode", noted)
    encoder.asked, encoder.noted = asked, noted
    return encoder


def store_of(encoder, folder, prompt=""):
    """A store, and nothing noted yet: a store measures the encoder's width by itself."""
    store = VectorStore(encoder, prompt, folder)
    encoder.asked.clear()
    return store


def expected(texts, prompt="", encoder=None):
    encoder = encoder or tiny.shared_encoder()
    return torch.stack([torch.tensor(type(encoder).encode(encoder, prompt + text)) for text in texts])


@pytest.mark.parametrize("batch_size, chunk_size", [(64, 4096), (2, 3), (1, 1), (5, 2)])
def test_gives_what_the_encoder_gives_in_the_order_asked(encoder, tmp_path, batch_size, chunk_size):
    texts = [*TEXTS, TEXTS[1], "sea", TEXTS[0]]
    store = store_of(encoder, tmp_path)
    vectors = store(texts, batch_size=batch_size, chunk_size=chunk_size, show_progress=False)
    assert vectors.dtype == torch.float32 and not vectors.is_inference()
    close(vectors, expected(texts), 1e-5)
    assert sorted(encoder.asked) == sorted(set(texts))  # each distinct text once
    assert store.encoded == len(store) == len(set(texts))
    assert len(list(tmp_path.rglob("*.safetensors"))) == -(-len(set(texts)) // chunk_size)


def test_only_new_texts_are_encoded(encoder, tmp_path):
    store = store_of(encoder, tmp_path)
    first = store(TEXTS[:3], show_progress=False)
    encoder.asked.clear()
    both = store([TEXTS[4], *TEXTS[:3]], show_progress=False)
    assert encoder.asked == [TEXTS[4]] and store.encoded == 4
    assert torch.equal(both[1:], first)


def test_a_second_store_on_the_same_folder_encodes_nothing(encoder, tmp_path):
    first = store_of(encoder, tmp_path)(TEXTS, chunk_size=2, show_progress=False)
    again = store_of(encoder, tmp_path)
    assert len(again) == len(TEXTS)
    assert torch.equal(again(TEXTS[::-1], show_progress=False), first.flip(0))
    assert encoder.asked == [] and again.encoded == 0


def test_rows_stay_what_they_are_while_more_texts_are_asked_for(encoder, tmp_path):
    store_of(encoder, tmp_path)(TEXTS[2:], chunk_size=2, show_progress=False)
    store = store_of(encoder, tmp_path)
    rows = {}
    for asked in (TEXTS[3:4], TEXTS[:2], [], TEXTS[::-1], [*TEXTS, TEXTS[0], "sea"]):
        rows.update(zip(asked, store.rows(asked, show_progress=False), strict=True))
        assert sorted(set(rows.values())) == list(range(len(store.vectors))) == list(range(len(rows)))
        close(store.vectors[[*rows.values()]], expected([*rows]) if rows else torch.zeros(0, 12), 1e-5)
    assert torch.equal(store([*rows], show_progress=False), store.vectors[[*rows.values()]])


class Zeros(TextTable):
    def compute(self, texts):
        return torch.zeros(len(texts), 1024)


def resident():
    """The bytes of memory that this process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssFile:")))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux says how much memory a process has")
def test_what_is_not_asked_for_is_not_read(tmp_path):
    """The folder is shared by all data sets that an encoder has read."""
    texts = [str(i) for i in range(20_000)]
    assert len(Zeros(tmp_path, 1024, "")(texts, batch_size=4096, show_progress=False)) == len(texts)
    before = resident()
    store = Zeros(tmp_path, 1024, "")
    assert store(texts[:2]).shape == (2, 1024) and store.rows(texts[5:7]) == [0, 1] and len(store) == len(texts)
    assert resident() - before < 20_000 * 1024  # a quarter of the vectors


def test_stores_that_write_at_the_same_time_share_a_folder(encoder, tmp_path):
    one, two = store_of(encoder, tmp_path), store_of(encoder, tmp_path)
    one(TEXTS[:3], show_progress=False)
    two(TEXTS[1:], show_progress=False)  # finds what one wrote meanwhile
    assert (one.encoded, two.encoded) == (3, 2) and sorted(encoder.asked) == sorted(TEXTS)
    third = store_of(encoder, tmp_path)
    close(third(TEXTS, show_progress=False), expected(TEXTS), 1e-5)
    assert third.encoded == 0


@pytest.mark.parametrize("prompt", ["", "i like ", "ich mag Öl: "])
def test_the_prompt_counts(encoder, tmp_path, prompt):
    for other in ("", "write about "):
        store_of(encoder, tmp_path, other)(TEXTS[:1], show_progress=False)
    store = store_of(encoder, tmp_path, prompt)
    close(store(TEXTS, show_progress=False), expected(TEXTS, prompt), 1e-5)
    assert store.encoded == len(TEXTS) - (prompt == "")


def test_the_weights_of_the_encoder_count(tmp_path):
    one, other = tiny.encoder(seed=1), tiny.encoder(seed=2)
    VectorStore(one, folder=tmp_path)(TEXTS, show_progress=False)
    store = VectorStore(other, folder=tmp_path)
    close(store(TEXTS, show_progress=False), expected(TEXTS, encoder=other), 1e-5)
    assert store.encoded == len(TEXTS)
    with torch.no_grad():
        next(one.parameters()).mul_(1.5)  # the same object, trained on
    trained = VectorStore(one, folder=tmp_path)
    close(trained(TEXTS, show_progress=False), expected(TEXTS, encoder=one), 1e-5)
    assert trained.encoded == len(TEXTS)
    assert VectorStore(tiny.encoder(seed=2), folder=tmp_path).folder == store.folder  # a copy finds what is there


def test_a_killed_run_keeps_its_finished_chunks(encoder, tmp_path):
    killed = store_of(encoder, tmp_path)
    encoder.noted.limit = 3  # of five texts in chunks of two: dies in the second chunk
    with pytest.raises(KeyboardInterrupt):
        killed(TEXTS, batch_size=1, chunk_size=2, show_progress=False)
    assert len(encoder.asked) == 3
    kept = {text for text in encoder.asked[:2]}
    (killed.folder / "tmp_abc").mkdir()  # as a kill in the middle of writing leaves it
    (killed.folder / "tmp_abc" / "part").write_bytes(b"half")

    encoder.noted.limit = float("inf")
    resumed = store_of(encoder, tmp_path)
    assert len(resumed) == 2
    close(resumed(TEXTS, show_progress=False), expected(TEXTS), 1e-5)
    assert set(encoder.asked) == set(TEXTS) - kept and resumed.encoded == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other tensors"])
def test_a_damaged_file_is_named(encoder, tmp_path, damage):
    store_of(encoder, tmp_path)(TEXTS, show_progress=False)
    (path,) = tmp_path.rglob("*.safetensors")
    if damage == "other tensors":
        save_file({"weights": torch.zeros(2)}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-40], "empty": b"", "text": b"<html>" * 20}[damage])
    with pytest.raises(DataError, match=path.name) as error:
        VectorStore(encoder, folder=tmp_path)
    assert str(path.parent) in str(error.value) and "delete it" in str(error.value)
    path.unlink()  # ... which is what the message says
    close(VectorStore(encoder, folder=tmp_path)(TEXTS, show_progress=False), expected(TEXTS), 1e-5)


def test_no_text_is_written(encoder, tmp_path, capsys):
    secrets = ["my old dark secret", "das Geheimnis von Jörg", "秘密の海", "🌊 water"]
    store_of(encoder, tmp_path, "the prompt of mine ")(secrets)
    shown = "".join(capsys.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for text in [*secrets, "secret", "Geheimnis", "秘密", "prompt of mine"]:
        assert text not in shown
        for path in files:
            assert text not in str(path)
            for encoding in ("utf-8", "utf-16-le"):
                assert text.encode(encoding) not in path.read_bytes()


def test_texts_in_any_script(encoder, tmp_path):
    texts = ["the sea", "das Meer süß", "海", "the 海 sea", "🌊 sea 🌊", "e\u0301", "é", "", " ", "sea\nsea", "sea\0"]
    store = store_of(encoder, tmp_path)
    close(store(texts, show_progress=False), expected(texts), 1e-5)
    assert store.encoded == len(texts)  # composed and decomposed, empty and blank: different texts
    assert torch.equal(store_of(encoder, tmp_path)(texts, show_progress=False), store(texts, show_progress=False))


def test_no_texts_at_all(encoder, tmp_path):
    store = store_of(encoder, tmp_path / "not" / "yet")
    assert store([]).shape == (0, 12) and len(store) == store.encoded == 0
    assert encoder.asked == [] and not (tmp_path / "not").exists()
    store(TEXTS[:1], show_progress=False)
    assert store([]).shape == (0, 12)


@pytest.mark.parametrize("rank, shown", [(None, True), ("0", True), ("1", False)])
def test_one_process_of_a_training_shows_a_bar(rank, shown, encoder, tmp_path, monkeypatch, capsys):
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    store_of(encoder, tmp_path)(TEXTS)
    assert ("Encoding texts" in capsys.readouterr().err) == shown
