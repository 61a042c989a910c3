"""Training and answering with a prompt cache: the same as without, and as an explicit loop, on five families."""

import copy

import pytest
import tiny
import torch
from reference import close, word_table
from transformers import LogitsProcessorList, StoppingCriteriaList

from pplug_hf.errors import ConfigurationError
from pplug_hf.modeling.prompt_cache import PromptCache

STEM = [10, 11, 12, 13]
HEADS = [[*STEM, 20, 21, 22], [*STEM, 30], [*STEM, 40, 41, 42, 43, 44, 45]]  # in front of the soft prompt
HEADERS = [[5, 6], [5, 6], [5, 6, 7]]  # behind it, as a chat template has them
ANSWERS = [[50, 51, 52, tiny.EOS], [60, tiny.EOS], [53, 54, tiny.EOS]]
QUERIES = ["the sea", "a film", "the moon"]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request):
    return plug_on(request.param, num_persona_tokens=2)


@pytest.fixture(scope="module")
def llama():
    return plug_on("llama")


def plug_on(family, **choices):
    """Without noise in training: the drop-out of the input encoder has nothing to do with caches."""
    choices |= {"attention_temperature": 0.2, "train_input_encoder": False, "placement": "answer"}
    return tiny.model(family, **choices)


def padded(rows, value, left):
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for row, f in zip(rows, fill, strict=True)])


def batch_of(model, heads=HEADS, headers=HEADERS, answers=ANSWERS):
    """A batch as the processor makes it; without answers, one to generate from."""
    causal = not model.config.is_encoder_decoder
    prompts = [head + header for head, header in zip(heads, headers, strict=True)]
    rows = [p + a for p, a in zip(prompts, answers, strict=True)] if causal and answers else prompts
    batch = {
        "input_ids": padded(rows, tiny.PAD, causal),
        "attention_mask": padded([[1] * len(row) for row in rows], 0, causal),
        "persona_position": torch.tensor(list(map(len, heads))),
        "persona": [model.encode_persona(history) for history in tiny.HISTORIES],
        "query": QUERIES,
    }
    if answers and causal:
        batch["labels"] = padded([[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)], -100, True)
    elif answers:
        batch["labels"] = padded(answers, -100, False)
    return batch


def by_hand(model):
    """The mean loss, one user and one answer token at a time, every prompt read anew."""
    backbone, table = model.backbone, word_table(model.backbone)

    def words(ids):
        return table.weight[torch.tensor(ids, dtype=torch.long)] * getattr(table, "embed_scale", 1.0)

    logs = []
    for head, header, answer, history, query in zip(HEADS, HEADERS, ANSWERS, tiny.HISTORIES, QUERIES, strict=True):
        soft = model.personalizer([model.encode_persona(history)], [query]).embeddings[0]  # [P, H]
        for t, token in enumerate(answer):
            if model.config.is_encoder_decoder:
                states = backbone.get_encoder()(input_ids=torch.tensor([head + header])).last_hidden_state
                decoder = torch.tensor([[backbone.config.decoder_start_token_id, *answer[:t]]])
                read = {"encoder_outputs": (torch.cat([states, soft[None]], dim=1),), "decoder_input_ids": decoder}
            else:
                read = {"inputs_embeds": torch.cat([words(head), soft, words(header + answer[:t])])[None]}
            logs.append(backbone(**read).logits[0, -1].log_softmax(-1)[token])
    return -torch.stack(logs).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def cached(model):
    model.prompt_cache = PromptCache()
    yield model
    model.prompt_cache = None
    model.eval()


def counted(cache):
    """Tokens read since the last look."""
    seen, cache.computed = cache.computed, 0
    return seen


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradients_equal_those_without_and_of_an_explicit_loop(cached, shared):
    model, cache, causal = cached.train(), cached.prompt_cache, not cached.config.is_encoder_decoder
    expected = gradients(model, loop := by_hand(model))
    model.prompt_cache = None
    plain = model(**batch_of(model))
    close(plain.loss, loop)
    model.prompt_cache = cache
    if shared:
        cache.share(HEADS)
    read = sum(map(len, HEADS)) - 2 * len(STEM) * shared if causal else sum(map(len, HEADS + HEADERS))
    for computed in (read, 0):
        output = model(**batch_of(model))
        close(output.loss, loop)
        close(output.logits, plain.logits)
        got = gradients(model, output.loss)
        assert set(got) == set(expected)
        for name in got:
            close(got[name], expected[name])
        assert counted(cache) == computed
    assert len(cache) == 3 + (shared and causal)


def test_only_the_tail_is_read(cached):
    model = cached.train()
    batch = batch_of(model)
    model(**batch)
    read = []
    reader = model.backbone if not model.config.is_encoder_decoder else model.backbone.get_encoder()
    hook = reader.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs), with_kwargs=True)
    model(**batch)
    hook.remove()
    if model.config.is_encoder_decoder:
        assert not read
    else:
        longest = 3 + max(len(h) + len(a) for h, a in zip(HEADERS, ANSWERS, strict=True))
        assert [kwargs["inputs_embeds"].shape[1] for kwargs in read] == [
            longest - 1
        ]  # the last label predicts nothing


@torch.no_grad()
def test_loss_without_gradients(cached):
    model, cache = cached.eval(), cached.prompt_cache
    batch = batch_of(model)
    losses = [model(**batch, num_items_in_batch=n).loss for n in (None, 5)]
    logits = model(**batch).logits
    model.prompt_cache = None
    for n, loss in zip((None, 5), losses, strict=True):
        close(loss, model(**batch, num_items_in_batch=n).loss)
    with torch.enable_grad():
        close(logits, model.train()(**batch).logits)  # no more than the loss needs
    assert counted(cache)


@torch.no_grad()
def test_without_labels_nothing_is_cached(cached):
    if cached.config.is_encoder_decoder:
        pytest.skip("asks for decoder_input_ids")
    batch = batch_of(cached, answers=None)
    logits = cached(**batch).logits
    assert logits.shape[1] == batch["input_ids"].shape[1] and not cached.prompt_cache.computed


def test_labels_in_the_prompt_are_learnt_without_a_cache(cached):
    if cached.config.is_encoder_decoder:
        pytest.skip("labels are the decoder's")
    model, cache = cached.train(), cached.prompt_cache
    batch = batch_of(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch).loss
    model.prompt_cache = None
    close(loss, model(**batch).loss)
    assert not cache.computed


def test_rows_of_any_place_and_plug(cached):
    """Rows without a plug, without header, and whose soft prompt stands in front."""
    model = cached.train()
    cache = model.prompt_cache
    batch = batch_of(model, headers=[[], [5, 6], []])
    plugs = [None, ["default", None, "default"], [None] * 3]
    places = [batch["persona_position"], torch.tensor([2, 5, 0]), None]
    for plug in plugs:
        for place in places:
            one = batch | {"persona_position": place, "plug": plug}
            model.prompt_cache = None
            expected = model(**one).loss
            model.prompt_cache = cache
            close(model(**one).loss, expected)
    assert counted(cache)


def test_padding_of_the_users_own(cached):
    model = cached.train()
    cache, batch = model.prompt_cache, batch_of(model)
    model.prompt_cache = None
    expected = model(**batch).loss
    model.prompt_cache = cache
    for pad in [(3, 0), (0, 3), (2, 1)]:
        wide = {"input_ids": tiny.PAD, "attention_mask": 0}
        if not model.config.is_encoder_decoder:
            wide["labels"] = -100
        one = batch | {name: torch.nn.functional.pad(batch[name], pad, value=v) for name, v in wide.items()}
        close(model(**one).loss, expected)


def test_with_gradient_checkpointing_every_prompt_is_read(cached):
    model, cache = cached.train(), cached.prompt_cache
    expected = gradients(model, model(**batch_of(model)).loss)
    counted(cache)
    model.gradient_checkpointing_enable()
    try:
        got = gradients(model, model(**batch_of(model, heads=[[*head, 33] for head in HEADS])).loss)
        assert not cache.computed
        got = gradients(model, model(**batch_of(model)).loss)
    finally:
        model.gradient_checkpointing_disable()
    for name in got:
        close(got[name], expected[name])


def test_a_backbone_without_such_a_cache_is_read_anew(caplog):
    import families

    mamba = families.backbone("mamba", "causal")
    model = tiny.from_backbone(
        mamba,
        tiny.shared_encoder(),
        tokenizer=tiny.tokenizer("llama"),
        placement="answer",
        train_input_encoder=False,
    ).train()
    expected = model(**batch_of(model)).loss
    model.prompt_cache = PromptCache()
    for _ in range(2):
        close(model(**batch_of(model)).loss, expected)
    assert len([r for r in caplog.records if "does not work with a prompt cache" in r.message]) == 1


def test_a_backbone_that_is_given_ids():
    import families

    for name, kind in (("deepseek_v4", "causal"), ("gemma3n_text", "causal"), ("pegasus", "encoder-decoder")):
        model = tiny.from_backbone(
            families.backbone(name, kind),
            tiny.shared_encoder(),
            tokenizer=tiny.tokenizer("llama"),
            placement="answer",
            train_input_encoder=False,
        ).train()
        assert model._reading.by_ids
        tiny.randomise(model.plug)
        batch, asked = batch_of(model), batch_of(model, answers=None)
        expected = model(**batch).loss
        answers = model.generate(**asked, max_new_tokens=4, do_sample=False)
        model.prompt_cache = PromptCache()
        for _ in range(2):
            close(model(**batch).loss, expected, 1e-3)
            assert torch.equal(model.generate(**asked, max_new_tokens=4, do_sample=False), answers)


@pytest.mark.parametrize("call", ["forward", "generate", "plug"])
def test_a_soft_prompt_in_front_is_refused(call):
    model = tiny.model("llama")
    batch = batch_of(model, answers=ANSWERS if call == "forward" else None)
    with pytest.raises(ConfigurationError, match="placement='answer'"):
        if call == "forward":
            model.prompt_cache = PromptCache()
            model(**batch)
        else:
            more = {"plug": [None, "default", None]} if call == "plug" else {}
            model.generate(**batch, **more, prompt_cache=PromptCache(), max_new_tokens=2)


def test_a_copy_of_a_model_shares_its_cache(llama):
    llama.prompt_cache = PromptCache()
    try:
        assert copy.deepcopy(llama).prompt_cache is llama.prompt_cache
    finally:
        llama.prompt_cache = None


# ---- answers ----------------------------------------------------------------------------------------------------

DECODING = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2},
    "lengths": {"max_length": 16, "min_length": 15},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "attentions": {"return_dict_in_generate": True, "output_attentions": True},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("decoding", DECODING.values(), ids=DECODING)
def test_answers_equal_those_without(model, decoding):
    model.eval()
    options = {"max_new_tokens": 6, "do_sample": False} | decoding
    if "max_length" in decoding:
        del options["max_new_tokens"]
        if model.config.is_encoder_decoder:
            options |= {"max_length": 6, "min_length": 5}
    cache = PromptCache()
    cache.share(HEADS)
    for headers in (HEADERS, [[], [], []], [[5, 6]] * 3):
        batch = batch_of(model, headers=headers, answers=None)
        torch.manual_seed(0)
        expected = model.generate(**batch, **options)
        for _ in range(2):
            torch.manual_seed(0)
            got = model.generate(**batch, **options, prompt_cache=cache)
            if "return_dict_in_generate" in decoding:
                for a, b in zip(got.get("logits") or (), expected.get("logits") or (), strict=True):
                    close(a, b)
                got, wanted = got.sequences, expected.sequences
            else:
                wanted = expected
            assert torch.equal(got, wanted)
    assert bool(counted(cache)) == ("output_attentions" not in options and "cache_implementation" not in options)


def test_answers_with_mixed_plugs_and_given_places(model):
    cache = PromptCache()
    batch = batch_of(model, answers=None)
    for plug in (["default", None, "default"], [None] * 3):
        for place in (batch["persona_position"], torch.tensor([2, 5, 0]), None):
            one = batch | {"plug": plug, "persona_position": place, "max_new_tokens": 5, "do_sample": False}
            expected = model.generate(**one)
            for _ in range(2):
                assert torch.equal(model.generate(**one, prompt_cache=cache), expected)


def test_processors_criteria_and_streams_see_what_they_see_without(model):
    batch = batch_of(model, answers=None)

    def seen_by(**more):
        seen = []

        class Stream:
            def put(self, value):
                seen.append(value.tolist())

            def end(self):
                seen.append("end")

        def look(ids, scores, **kwargs):
            seen.append(ids.tolist())
            return scores if scores is None or scores.ndim > 1 else torch.zeros(len(ids), dtype=torch.bool)

        def never(ids, scores, **kwargs):
            seen.append(ids.tolist())
            return torch.zeros(len(ids), dtype=torch.bool)

        rules = {"logits_processor": LogitsProcessorList([look]), "stopping_criteria": StoppingCriteriaList([never])}
        one = {name: value[:1] for name, value in batch.items()}
        model.generate(**one, **rules, streamer=Stream(), max_new_tokens=4, do_sample=False, **more)
        return seen

    cache = PromptCache()
    expected = seen_by()
    assert seen_by(prompt_cache=cache) == seen_by(prompt_cache=cache) == expected


def test_a_prompt_is_read_once_for_all_users(llama):
    cache = PromptCache()
    for history in tiny.HISTORIES:
        batch = batch_of(llama, answers=None) | {"persona": [history] * 3}
        expected = llama.generate(**batch, max_new_tokens=4, do_sample=False)
        assert torch.equal(llama.generate(**batch, max_new_tokens=4, do_sample=False, prompt_cache=cache), expected)
    assert cache.computed == sum(map(len, HEADS))


def test_a_conversation_goes_on_where_it_was(model):
    cache, ids, read = PromptCache(), HEADS[0], []
    for more in ([], [23, 24], [25]):
        ids = ids + more
        header = [5, 6]
        batch = batch_of(model, [ids], [header], None) | {"persona": [tiny.HISTORY], "query": ["sea"]}
        expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
        got = model.generate(**batch, max_new_tokens=3, do_sample=False, prompt_cache=cache)
        assert torch.equal(got, expected)
        answer = got[0, batch["input_ids"].shape[1] :].tolist() if not model.config.is_encoder_decoder else []
        ids = ids + header + answer
        read.append(counted(cache))
    if not model.config.is_encoder_decoder:
        assert sum(read) == len(ids) - len(header) - len(answer) and read[0] == len(HEADS[0])


def test_a_models_own_cache_is_its_default(llama):
    batch = batch_of(llama, answers=None) | {"max_new_tokens": 3}
    llama.prompt_cache = own = PromptCache()
    other = PromptCache()
    try:
        llama.generate(**batch, prompt_cache=other)
        assert other.computed and not own.computed
        llama.generate(**batch)
        assert own.computed
    finally:
        llama.prompt_cache = None


def test_over_budget_answers_are_the_same(llama, tmp_path):
    batch = batch_of(llama, answers=None) | {"max_new_tokens": 4, "do_sample": False}
    expected = llama.generate(**batch)
    for cache in (PromptCache(0), PromptCache(0, tmp_path), PromptCache(500, tmp_path, 500)):
        cache.share(HEADS)
        for _ in range(3):
            assert torch.equal(llama.generate(**batch, prompt_cache=cache), expected)


def test_states_need_half_the_memory_in_half_precision():
    model = plug_on("llama")
    full = PromptCache()
    model.generate(**batch_of(model, answers=None), max_new_tokens=2, prompt_cache=full)
    model.backbone.bfloat16()
    half = PromptCache()
    batch = batch_of(model, answers=None) | {"max_new_tokens": 2}
    assert model.generate(**batch, prompt_cache=half).shape == model.generate(**batch).shape
    assert half._memory.used * 2 == full._memory.used
