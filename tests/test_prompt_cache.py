"""The states of prompts: equal to those computed anew, whatever is shared, extended, on disk, damaged or not kept."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from reference import close
from transformers import AutoConfig, AutoModelForCausalLM

from pplug_hf.errors import ConfigurationError
from pplug_hf.modeling.backbone import freeze_backbone
from pplug_hf.modeling.prefix import cache_argument
from pplug_hf.modeling.prompt_cache import PromptCache, size_in_bytes
from pplug_hf.modeling.substitution import _Substitution

STEM = [10, 11, 12, 13]
ROWS = [[*STEM, 20, 21, 22], [*STEM, 30], [*STEM, 40, 41, 42, 43, 44, 45], [9, 8]]
NEXT = [50, 51, 52]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def backbone(request):
    return frozen(request.param)


@pytest.fixture(scope="module")
def llama():
    return frozen("llama")


def frozen(family, seed=0):
    backbone = tiny.backbone(family, seed)
    freeze_backbone(backbone)
    return backbone


@torch.no_grad()
def goes_on(backbone, states, mask):
    """The logits [B, 3, V] of three tokens behind prompts (as the decoder's, if there is one)."""
    ids = torch.tensor([NEXT] * len(mask))
    if backbone.config.is_encoder_decoder:
        return backbone(encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids).logits
    mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    places = (mask.cumsum(1) - 1)[:, -3:]
    return backbone(
        input_ids=ids, attention_mask=mask, position_ids=places, **{cache_argument(backbone): states}
    ).logits


@torch.no_grad()
def alone(backbone, row):
    """The same for one prompt, without any cache."""
    if backbone.config.is_encoder_decoder:
        return backbone(input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([NEXT])).logits[0]
    return backbone(input_ids=torch.tensor([[*row, *NEXT]])).logits[0, -3:]


def check(backbone, cache, rows):
    states, mask = cache.states(backbone, rows)
    assert mask.tolist() == [
        [0] * (mask.shape[1] - len(row)) + [1] * len(row)
        if not backbone.config.is_encoder_decoder
        else [1] * len(row) + [0] * (mask.shape[1] - len(row))
        for row in rows
    ]
    close(goes_on(backbone, states, mask), torch.stack([alone(backbone, row) for row in rows]))


def test_states_equal_those_computed_anew(backbone):
    cache = PromptCache()
    for rows in (ROWS[:2], ROWS, ROWS[::-1], ROWS[3:]):
        check(backbone, cache, rows)
    assert cache.computed == sum(map(len, ROWS)) and len(cache) == 4


def test_a_common_beginning_is_stored_once(llama):
    cache = PromptCache()
    cache.share(ROWS[:3])
    check(llama, cache, ROWS)
    check(llama, cache, ROWS)
    assert cache.computed == len(STEM) + 3 + 1 + 6 + 2 and len(cache) == 5
    parts = [len(states) for _, states in cache._memory.values()]
    assert sorted(parts) == [1, 2, 3, 4, 6]


def test_prompts_with_nothing_in_common_share_nothing(llama):
    cache = PromptCache()
    cache.share(ROWS)
    cache.share([])
    cache.share(ROWS[:1])
    check(llama, cache, ROWS)
    assert len(cache) == len(ROWS)


def test_a_later_turn_extends_the_entry_of_the_earlier_one(backbone):
    cache, turn = PromptCache(), [[5, 6, 7], [9, 8, 7, 6]]
    for more in ([], [20, 21], [22]):
        turn = [row + more for row in turn]
        check(backbone, cache, turn)
    seq2seq = backbone.config.is_encoder_decoder  # a state depends on what follows: all is read again
    assert cache.computed == (7 + 11 + 13 if seq2seq else 13)
    check(backbone, cache, [turn[0][:4], turn[1], [5, 6, 7, 30]])  # in the middle of an entry, and another branch


def test_rows_with_parents_of_any_length_are_computed_together(llama):
    cache = PromptCache()
    check(llama, cache, [[5, 6, 7, 8, 9, 10], [20], [30, 31]])
    check(llama, cache, [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23], [30, 31, 32], [40, 41], [40, 41, 42]])


def test_the_first_tokens_of_an_entry(llama):
    cache = PromptCache()
    cache.share(ROWS[:3])
    lengths = [5, 4, 3, 0]
    wanted = torch.tensor([[0] * (7 - n) + [1] * n for n in lengths])
    states, mask = cache.states(llama, ROWS, wanted)
    assert mask is wanted
    expected = torch.stack([alone(llama, row[:n]) for row, n in zip(ROWS, lengths, strict=True)])
    close(goes_on(llama, states, mask), expected)


def test_models_share_a_cache_and_do_not_mix(llama):
    cache = PromptCache()
    for model in (llama, frozen("llama", seed=1), frozen("gpt2"), llama):
        check(model, cache, ROWS[:1])
    assert len(cache) == 3


def test_states_under_autocast_are_others(llama):
    cache = PromptCache()
    check(llama, cache, ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.states(llama, ROWS)
    assert len(cache) == 2 * len(ROWS)
    check(llama, cache, ROWS)


# ---- budgets, files ---------------------------------------------------------------------------------------------


def bytes_of(backbone, rows):
    cache = PromptCache()
    cache.states(backbone, rows)
    return cache._memory.used


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("memory, disk", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 3)], ids=str)
def test_over_the_limits(backbone, tmp_path, evict, memory, disk):
    one = bytes_of(backbone, ROWS[:1])
    cache = PromptCache(memory * one, tmp_path, disk * one, evict=evict)
    cache.share(ROWS[:3])
    for _ in range(2):
        for row in ROWS:
            check(backbone, cache, [row])
        check(backbone, cache, ROWS)
        assert cache._memory.used <= memory * one
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= disk * one + 1000 * len(cache)


def test_what_is_dropped_is_what_was_not_used_for_longest(llama):
    rows = [[n, n + 1, n + 2] for n in range(10, 50, 10)]
    cache = PromptCache(3 * bytes_of(llama, rows[:1]))
    cache.states(llama, rows[:3])
    cache.states(llama, rows[:1])
    cache.states(llama, rows[3:])
    cache.computed = 0
    cache.states(llama, [rows[0], rows[2], rows[3]])
    assert cache.computed == 0
    cache.states(llama, [rows[1]])
    assert cache.computed == 3


def test_passes_over_a_data_set_keep_what_came_first(llama):
    rows = [[n, n + 1, n + 2] for n in range(10, 50, 10)]
    cache = PromptCache(3 * bytes_of(llama, rows[:1]), evict=False)
    for _ in range(2):
        cache.computed = 0
        for row in rows:
            cache.states(llama, [row])
    assert cache.computed == 3


def test_a_parent_stays_longer_than_its_children(llama):
    rows = [[*STEM, n] for n in range(20, 40)]
    cache = PromptCache(bytes_of(llama, [STEM]) + 3 * bytes_of(llama, [[1]]))
    cache.share(rows)
    for row in rows:
        check(llama, cache, [row])
    assert cache.computed == len(STEM) + len(rows)


def test_files_are_used_again_by_a_later_process(backbone, tmp_path):
    cache = PromptCache(0, tmp_path)
    cache.share(ROWS[:3])
    check(backbone, cache, ROWS)
    again = PromptCache("1GB", tmp_path)
    again.share(ROWS[:3])
    check(backbone, again, ROWS)
    check(backbone, again, ROWS)
    assert again.computed == 0 and len(again) == len(cache)
    longer = [[*row, 33] for row in ROWS]
    check(backbone, PromptCache(0, tmp_path), longer)


@pytest.mark.parametrize("damage", ["cut", "zeros", "other", "text", "gone", "no parent", "width"])
def test_a_damaged_file_is_computed_again(llama, tmp_path, damage):
    cache = PromptCache(0, tmp_path)
    cache.share(ROWS[:3])
    check(llama, cache, ROWS)
    if damage == "width":
        PromptCache(0, tmp_path / "other").states(frozen("gpt2"), ROWS)
        others = {path.stem.split("-", 1)[1]: path for path in (tmp_path / "other").iterdir()}
    for path in list(tmp_path.glob("*.safetensors")):
        content = path.read_bytes()
        if damage == "cut":
            path.write_bytes(content[:-20])
        elif damage == "zeros":
            path.write_bytes(content[:-20] + bytes(20))
        elif damage == "other":
            path.write_bytes(next(other for other in tmp_path.glob("*-7-*")).read_bytes())
        elif damage == "text":
            path.write_text("no tensors")
        elif damage == "gone" or (damage == "no parent" and "-4-" in path.name):
            path.unlink()
        elif damage == "width" and (other := others.get(path.stem.split("-", 1)[1])):
            path.write_bytes(other.read_bytes())
    for one in (PromptCache(0, tmp_path), cache):
        check(llama, one, ROWS)
    last = PromptCache(0, tmp_path)
    check(llama, last, ROWS)
    assert last.computed == 0


def test_other_files_of_the_folder_are_left_alone(llama, tmp_path):
    names = ["model.safetensors", "a-b-c.safetensors", "notes.txt"]
    for name in names:
        (tmp_path / name).write_text("mine")
    cache = PromptCache(0, tmp_path, 0)
    check(llama, cache, ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names) and not len(cache)


def test_files_of_another_model_are_stale(llama, tmp_path):
    PromptCache(0, tmp_path).states(llama, ROWS)
    cache = PromptCache(0, tmp_path)
    check(frozen("llama", seed=1), cache, ROWS)
    assert cache.computed == sum(map(len, ROWS))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_model_that_has_changed_counts_as_another(family):
    backbone, cache = frozen(family), PromptCache()
    check(backbone, cache, ROWS)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight *= 1.1
    check(backbone, cache, ROWS)
    backbone.bfloat16()
    states, mask = cache.states(backbone, ROWS)
    assert goes_on(backbone, states, mask).dtype == torch.bfloat16
    assert cache.computed == 3 * sum(map(len, ROWS))
    check(frozen(family), cache, ROWS)  # the first one's are still there
    assert cache.computed == 3 * sum(map(len, ROWS))


@pytest.mark.parametrize("evict", [True, False])
def test_a_full_disk_is_said_once_and_nothing_more_is_written(llama, tmp_path, monkeypatch, caplog, evict):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    cache = PromptCache(0, tmp_path, evict=evict)
    check(llama, cache, ROWS[:1])
    monkeypatch.setattr("pplug_hf.modeling.prompt_cache.save_file", full)
    for _ in range(2):
        check(llama, cache, ROWS)
    assert len([r for r in caplog.records if "No space left" in r.message]) == 1
    cache.computed = 0
    check(llama, cache, ROWS[:1])  # what was written before is still read
    assert cache.computed == 0 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_a_file_is_said_once(llama, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = PromptCache(0, tmp_path / "file")
    check(llama, cache, ROWS)
    check(llama, cache, ROWS)
    assert len([r for r in caplog.records if "read again each time" in r.message]) == 1


def test_a_process_killed_while_it_writes_leaves_no_half_file(llama, tmp_path, monkeypatch):
    from pplug_hf.modeling import prompt_cache

    def killed(tensors, path, *args):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    cache = PromptCache(0, tmp_path)
    check(llama, cache, ROWS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(prompt_cache, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.states(llama, ROWS)
    again = PromptCache(0, tmp_path)
    check(llama, again, ROWS)
    assert again.computed == sum(map(len, ROWS[1:]))


@pytest.mark.parametrize("evict", [True, False])
def test_threads_share_a_cache(llama, tmp_path, evict):
    cache = PromptCache(3 * bytes_of(llama, ROWS[:1]), tmp_path, 2 * bytes_of(llama, ROWS[:1]), evict=evict)
    cache.share(ROWS[:3])
    rows = [[*row, n] for row in ROWS for n in range(20, 26)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: check(llama, cache, rows[n : n + 2] + ROWS[:1]), [*range(len(rows) - 1)] * 2))


def test_a_hook_that_another_thread_has_half_registered_does_nothing():
    """torch notes that a hook wants keyword arguments only after it can be called."""
    substitution = _Substitution(torch.tensor([[1, 2]]))
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(substitution.give_ids, None, ()).result() is None
        assert (
            thread.submit(substitution.give_vectors, None, (torch.tensor([[1, 2]]),), torch.zeros(1, 2, 3)).result()
            is None
        )


# ---- backbones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "mamba",  # no keys and values
        "jamba",  # in some layers
        "qwen3_next",  # linear attention
        "roformer",  # counts positions with the padding
        "whisper",  # another generate
    ],
)
def test_a_backbone_that_remembers_otherwise_is_refused_once(name, caplog):
    import families

    backbone = families.backbone(name, "causal")
    freeze_backbone(backbone)
    cache = PromptCache()
    assert not cache.fits(backbone) and not cache.fits(backbone)
    assert len([r for r in caplog.records if "does not work with a prompt cache" in r.message]) == 1
    with pytest.raises(ConfigurationError, match=type(backbone).__name__):
        cache.states(backbone, ROWS)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0],
    "long_factor": [4.0, 8.0],
    "original_max_position_embeddings": 8,
}
ROPES = {
    "phi3": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 8},
    "llama": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 8},
    "gemma3_text": {
        "rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}},
    },
    "mistral": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
}


@pytest.mark.parametrize("family", ROPES)
def test_a_backbone_whose_positions_depend_on_the_length_is_refused(family, caplog):
    """The states of a text that is longer than some length differ from those that its beginning had."""
    shape = {"vocab_size": len(tiny.VOCABULARY), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "pad_token_id": tiny.PAD}
    config = AutoConfig.for_model(family, **shape, **ROPES[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = AutoModelForCausalLM.from_config(config).eval()
    freeze_backbone(backbone)
    cache = PromptCache()
    if family == "mistral":
        check(backbone, cache, [STEM])
        check(backbone, cache, [[*STEM, *range(20, 30)]])
    else:
        assert not cache.fits(backbone)
        assert "depend on the length" in caplog.text


@pytest.mark.parametrize(
    "name", ["mistral", "gemma2", "gemma3_text", "mpt", "bloom", "qwen3_moe", "deepseek_v3", "gemma3n_text"]
)
def test_other_families(name, caplog):
    import families

    backbone = families.backbone(name, "causal")
    freeze_backbone(backbone)
    caplog.set_level(logging.WARNING)
    cache = PromptCache()
    assert cache.fits(backbone), caplog.text
    rows = [[*range(10, 32)], [*range(12, 25)], [7, 8]]  # longer than the sliding windows, of 8 tokens
    for one in (rows[2:], [row[:12] for row in rows], rows):
        check(backbone, cache, one)


@pytest.mark.parametrize(
    "size, expected",
    [("4GB", 4 * 10**9), (17, 17), ("0", 0), ("1.5 kb", 1500), ("500 MB", 500 * 10**6), ("1T", 10**12)],
)
def test_sizes(size, expected):
    assert size_in_bytes(size) == expected


@pytest.mark.parametrize("size", ["much", "", "-1", "4 GiB", None, "1 2", "GB"])
def test_no_size(size):
    with pytest.raises(ConfigurationError, match="size"):
        size_in_bytes(size)
