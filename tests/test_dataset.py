"""Rows with personas: who has which items, and which of them an epoch leaves out."""

import copy
import io
import pickle
import random
from multiprocessing.reduction import ForkingPickler

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close

from pplug_hf import EncoderSpec
from pplug_hf.data.dataset import PersonaDataset
from pplug_hf.data.lamp import Example
from pplug_hf.data.vectors import VectorStore
from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.modeling.encoders import item_texts
from pplug_hf.modeling.persona import item_facts


class Numbers:
    """Stands for a store: the vector of the text "7" is [7]."""

    fingerprint = {"digest": "numbers", "history_prompt": ""}  # noqa: RUF012

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return torch.tensor([[float(text)] for text in texts]).view(-1, 1)


def example(history=(), number=0):
    return Example(f"q{number}", "u", f"prompt {number}", f"query {number}", f"target {number}", list(history))


def numbered(*lengths, **kwargs):
    """A dataset of histories "0", "1", ... of these lengths."""
    examples = [example(map(str, range(length)), i) for i, length in enumerate(lengths)]
    return PersonaDataset(examples, Numbers(), **kwargs)


def items(dataset, index):
    return dataset[index]["persona"].vectors.flatten().int().tolist()


def everything(dataset):
    return [items(dataset, i) for i in range(len(dataset))]


# ---- rows -------------------------------------------------------------------------------------------------------


def test_a_row_holds_an_example_and_its_encoded_history(tmp_path):
    store = VectorStore(tiny.shared_encoder(), folder=tmp_path)
    dataset = PersonaDataset([example(history, i) for i, history in enumerate(tiny.HISTORIES)], store)
    assert len(dataset) == 3
    for i, history in enumerate(tiny.HISTORIES):
        row = dataset[i]
        assert set(row) == {"text", "query", "target", "persona"}
        assert (row["text"], row["query"], row["target"]) == (f"prompt {i}", f"query {i}", f"target {i}")
        assert row["persona"].spec == EncoderSpec.from_fingerprint(store.fingerprint, None) and row[
            "persona"
        ].vectors.shape == (
            len(history),
            12,
        )
        for vector, text in zip(row["persona"].vectors, history, strict=True):
            close(vector, torch.tensor(tiny.shared_encoder().encode(text)), 1e-5)
    assert store.encoded == len(set(tiny.HISTORY))


def test_each_distinct_text_is_asked_for_once():
    store = Numbers()
    dataset = PersonaDataset([example(["3", "1", "3"]), example(["1", "2"]), example(["3", "1"])], store)
    assert sorted(store.calls[0]) == ["1", "2", "3"] and len(store.calls) == 1
    assert everything(dataset) == [[3, 1, 3], [1, 2], [3, 1]]


def test_items_become_texts_by_the_template():
    history = [{"a": "1", "b": "2"}, {"a": "3", "b": "4", "date": "2001"}]
    assert items(PersonaDataset([example(history)], Numbers(), item_template="{a}{b}"), 0) == [12, 34]
    with pytest.raises(DataError, match="item_template"):
        PersonaDataset([example(history)], Numbers())


class Counted(dict):
    """An item that counts how often it is read."""

    reads = 0

    def __getitem__(self, name):
        Counted.reads += 1
        return super().__getitem__(name)

    def get(self, name, default=None):
        Counted.reads += 1
        return super().get(name, default)


def test_an_item_of_many_histories_is_read_once():
    """As of `history_examples`, which make N examples of N items: their work must not grow with the square."""
    reads = {}
    for n in (10, 40):
        history = [Counted(id=f"i{i}", a=str(i % 7), date=f"2024-05-{i % 28 + 1:02}") for i in range(n)]
        other = [{"id": "x", "a": "8"}, *history[1:3], {"a": "3", "date": "2020"}]
        histories = [history, *(history[:i] for i in range(n)), history[3:6], other, other[:1], history[4:2:-1] * 2]
        Counted.reads = 0
        dataset = PersonaDataset([example(one) for one in histories], Numbers(), "{a}")
        reads[n], rows = Counted.reads, [dataset[i]["persona"] for i in range(len(dataset))]
        assert Counted.reads == reads[n]
        for row, one in zip(rows, histories, strict=True):
            assert row.vectors.flatten().int().tolist() == [int(text) for text in item_texts(one, "{a}")]
            ids, times = item_facts(one)
            assert row.item_ids == ids and (row.timestamps is None) == (times is None)
            assert times is None or torch.equal(row.timestamps, times)
        assert len({id(one.base) for one in dataset.rows[: n + 1]}) == 2  # views of one array, and the empty one
    assert reads[40] <= 4 * reads[10]


@pytest.mark.parametrize("history", ["abc", {"a": "1"}, 7])
def test_what_is_no_history_is_refused(history):
    one = example()
    one.history = history
    with pytest.raises(DataError, match="A history is a list of texts"):
        PersonaDataset([one], Numbers(), "{a}")


def test_without_histories_everybody_is_new():
    store = Numbers()
    dataset = PersonaDataset([example(["1", "2"]), example(["3"])], store, use_history=False, history_dropout=0.5)
    assert store.calls == [[]]
    assert [row["persona"].vectors.shape for row in dataset] == [(0, 1), (0, 1)]
    assert dataset[1]["persona"].spec == EncoderSpec.from_fingerprint(Numbers.fingerprint, None)


def test_vectors_of_requests_take_the_place_of_their_texts():
    queries = tiny.vectors(2)
    dataset = PersonaDataset([example(["1"]), example()], Numbers(), queries=queries)
    assert [torch.equal(row["query"], query) for row, query in zip(dataset, queries, strict=True)] == [True, True]


@pytest.mark.parametrize("share", [-0.1, 1.1, 50, float("nan"), float("inf")])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ConfigurationError, match="history_dropout"):
        numbered(3, history_dropout=share)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_of_new_users_is_refused(share):
    with pytest.raises(ConfigurationError, match="new_users"):
        numbered(3, new_users=share)


# ---- drop-out ---------------------------------------------------------------------------------------------------


def test_no_drop_out_keeps_everything():
    dataset = numbered(0, 1, 5, 40)
    for epoch in range(5):
        dataset.set_epoch(epoch)
        assert everything(dataset) == [list(range(n)) for n in (0, 1, 5, 40)]


@settings(deadline=None, max_examples=60)
@given(length=st.integers(0, 60), share=st.floats(0, 1), seed=st.integers(0, 2**32), epoch=st.integers(0, 500))
def test_the_share_that_is_left_out_is_within_bounds_and_the_order_stays(length, share, seed, epoch):
    dataset = numbered(2, length, history_dropout=share, seed=seed)
    dataset.set_epoch(epoch)
    kept = items(dataset, 1)
    assert kept == sorted(set(kept)) and set(kept) <= set(range(length))
    assert length - len(kept) <= share * length + 0.5  # whole items


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 20),
    order=st.randoms(use_true_random=False),
)
def test_what_is_left_out_does_not_depend_on_what_was_asked_before(lengths, seed, epoch, order):
    dataset = numbered(*lengths, history_dropout=0.7, seed=seed)
    dataset.set_epoch(epoch)
    expected = everything(dataset)
    other = numbered(*lengths, history_dropout=0.7, seed=seed)
    for before in range(order.randrange(3)):  # has been through other epochs
        other.set_epoch(before)
        everything(other)
    other.set_epoch(epoch)
    indices = [order.randrange(len(lengths)) for _ in range(12)]
    random.seed(0)
    torch.manual_seed(seed + 1)
    assert [items(other, i) for i in indices] == [expected[i] for i in indices]


def test_epoch_row_and_seed_each_change_what_is_left_out():
    dataset = numbered(*[30] * 6, history_dropout=0.9)
    epochs = []
    for epoch in range(6):
        dataset.set_epoch(epoch)
        epochs.append(everything(dataset))
    flat = [tuple(kept) for rows in epochs for kept in rows]
    assert len(set(flat)) >= len(flat) - 3  # hardly any two alike
    other = numbered(*[30] * 6, history_dropout=0.9, seed=1)
    assert sum(one == two for one, two in zip(epochs[0], everything(other), strict=True)) <= 1
    assert numbered(30, history_dropout=0.9).rows[0].tolist() == list(range(30))  # the history itself stays


def sent(dataset):
    """The dataset as a worker process gets it that is started afresh."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(dataset)
    return pickle.loads(buffer.getvalue())


def test_a_worker_follows_the_epoch_and_a_copy_has_its_own():
    dataset = numbered(*[30] * 4, history_dropout=0.9)
    worker, *copies = sent(dataset), copy.copy(dataset), copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))
    before = everything(dataset)
    dataset.set_epoch(3)
    assert worker.epoch == 3 and everything(worker) == everything(dataset) != before
    for one in copies:
        assert one.epoch == 0 and everything(one) == before
        follower = sent(one)
        one.set_epoch(2)
        assert follower.epoch == 2 and dataset.epoch == 3


def test_every_item_is_left_out_about_equally_often():
    dataset = numbered(10, history_dropout=0.8)
    kept, sizes = [0] * 10, set()
    for epoch in range(1500):
        dataset.set_epoch(epoch)
        one = items(dataset, 0)
        sizes.add(len(one))
        for item in one:
            kept[item] += 1
    assert sizes == set(range(2, 11))
    # 0.4 of the items are left out on average; a standard deviation of each share is 0.013.
    assert all(abs(count / 1500 - 0.6) < 0.06 for count in kept)


# ---- the paper's repeats ----------------------------------------------------------------------------------------


def test_repeats_are_copies_that_lose_items_of_examples_with_more_than_two():
    dataset = numbered(0, 2, 3, 40, history_dropout=0.5, repeats=10)
    assert len(dataset) == 4 + 2 * 10
    for epoch in range(5):
        dataset.set_epoch(epoch)
        rows = everything(dataset)
        assert rows[:4] == [list(range(n)) for n in (0, 2, 3, 40)]  # the originals are whole
        assert all(1 <= len(row) <= 3 and set(row) <= set(range(3)) for row in rows[4:14])
        assert all(20 <= len(row) <= 40 and set(row) <= set(range(40)) for row in rows[14:])
        assert len(set(map(tuple, rows[14:]))) > 5
        assert {dataset[i]["target"] for i in range(14, 24)} == {dataset[3]["target"]}


def test_the_control_makes_as_many_steps():
    dataset = numbered(1, 5, history_dropout=0.5, repeats=3, use_history=False)
    assert len(dataset) == 2 + 3 and everything(dataset) == [[]] * 5


def test_new_users_have_no_history_and_all_others_theirs():
    lengths = [0, *range(1, 60)]
    dataset, without = (numbered(*lengths, history_dropout=0.5, seed=7, new_users=share) for share in (0.3, 0.0))
    empty = []
    for epoch in range(20):
        dataset.set_epoch(epoch)
        without.set_epoch(epoch)
        pairs = list(zip(everything(dataset), everything(without), strict=True))[1:]
        assert all(found in ([], expected) for found, expected in pairs)
        empty.append([not found for found, expected in pairs if expected])
    assert 0.27 < sum(map(sum, empty)) / sum(map(len, empty)) < 0.33
    assert len(set(map(tuple, empty))) == 20  # others in every epoch
    assert everything(numbered(*lengths, new_users=1.0)) == [[]] * 60


@pytest.mark.parametrize("options", [{"repeats": -1}, {"repeats": 2, "history_dropout": 0.0}])
def test_repeats_that_cannot_work(options):
    with pytest.raises(ConfigurationError, match="history_repeats is"):
        numbered(3, **options)
