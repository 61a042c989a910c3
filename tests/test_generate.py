"""generate against decoding loops written by hand, which call the backbone's forward on the whole sequence."""

import pytest
import reference
import tiny
import torch
from reference import close
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

from pplug_hf.errors import ConfigurationError, DataError

PROMPT = tiny.PROMPTS[0]


def inputs(model, prompts=PROMPT, side="right"):
    """What a user has: the tokenizer's output."""
    return dict(model.tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side))


def new_tokens(model, generated, width):
    """Rows of new tokens up to EOS, out of what generate returned for prompts of `width` tokens."""
    rows = [row[1 if model.config.is_encoder_decoder else width :] for row in generated.tolist()]
    return [row[: row.index(tiny.EOS) + 1] if tiny.EOS in row else row for row in rows]


def answer(model, history=tiny.HISTORY, prompt=PROMPT, **kwargs):
    batch = inputs(model, prompt)
    return new_tokens(model, model.generate(**batch, persona=history, **kwargs), batch["input_ids"].shape[1])[0]


def step(model, history=tiny.HISTORY, prompt=PROMPT, position=None):
    """The reference's logits behind the tokens so far."""
    soft = reference.soft_prompt(model, history, prompt)
    return lambda so_far: reference.next_logits(model, soft, reference.row(model, prompt), so_far, position)


def seen_ids(model, so_far, prompt=PROMPT):
    """The ids that rules about repetition look at: a causal model's prompt and answer, a decoder's own tokens."""
    if model.config.is_encoder_decoder:
        return [model.backbone.config.decoder_start_token_id, *so_far]
    return [*reference.row(model, prompt), *so_far]


# ---- decoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [{}, {"num_persona_tokens": 4}, {"instruction": False}], ids=["paper", "K=4", "P"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy(family, choices):
    model = tiny.model(family, **choices)
    for history, prompt in zip(tiny.HISTORIES, tiny.PROMPTS, strict=True):
        expected = reference.greedy(step(model, history, prompt), 8, tiny.EOS)
        assert answer(model, history, prompt, max_new_tokens=8) == expected


def test_the_persona_changes_the_answer(model):
    said = {tuple(answer(model, history, max_new_tokens=8)) for history in tiny.HISTORIES}
    assert len(said) > 1


def test_beam_search(model):
    best = reference.beam(step(model), 5, tiny.EOS, beams=4)
    assert answer(model, max_new_tokens=5, min_new_tokens=5, num_beams=4) == best[0]
    batch = inputs(model)
    several = model.generate(
        **batch, persona=tiny.HISTORY, max_new_tokens=5, min_new_tokens=5, num_beams=4, num_return_sequences=4
    )
    assert new_tokens(model, several, batch["input_ids"].shape[1]) == best


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 3, "early_stopping": True}]
)
def test_beam_search_that_may_end_equals_the_backbones_own(model, options):
    """The backbone gets the sequence built by hand, from the reference's soft prompt."""
    ids = inputs(model)["input_ids"]
    bos = int(ids[0, 0] == tiny.BOS and not model.config.is_encoder_decoder)
    words = reference.word_table(model.backbone)(ids)
    soft = reference.soft_prompt(model, tiny.HISTORY, PROMPT)[None]
    by_hand = torch.cat([words[:, :bos], soft, words[:, bos:]], dim=1)
    if model.config.is_encoder_decoder:
        encoded = model.backbone.get_encoder()(inputs_embeds=by_hand).last_hidden_state
        expected = model.backbone.generate(encoder_outputs=BaseModelOutput(encoded), max_new_tokens=12, **options)
    else:
        expected = model.backbone.generate(inputs_embeds=by_hand, max_new_tokens=12, **options)
    assert answer(model, max_new_tokens=12, **options) == new_tokens(model, expected, 0)[0]


@pytest.mark.parametrize("seed", range(3))
def test_sampling(model, seed):
    torch.manual_seed(seed)
    expected = reference.sample(step(model), 8, tiny.EOS, temperature=1.7)
    torch.manual_seed(seed)
    assert answer(model, max_new_tokens=8, do_sample=True, temperature=1.7, top_k=0) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_padded_batch_equals_its_rows(model, side, options):
    options |= {"max_new_tokens": 8}
    batch = inputs(model, tiny.PROMPTS, side)
    generated = model.generate(**batch, persona=tiny.HISTORIES, **options)
    alone = [answer(model, h, p, **options) for h, p in zip(tiny.HISTORIES, tiny.PROMPTS, strict=True)]
    assert new_tokens(model, generated, batch["input_ids"].shape[1]) == alone
    again = model.generate(
        **batch | {"attention_mask": batch["attention_mask"].bool()}, persona=tiny.HISTORIES, **options
    )
    assert torch.equal(again, generated)


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_mask_padding_is_recognised_as_in_transformers(model, side, caplog):
    batch = inputs(model, tiny.PROMPTS, side)
    expected = model.generate(**batch, persona=tiny.HISTORIES, max_new_tokens=6)
    ids = batch["input_ids"]
    assert torch.equal(model.generate(ids, persona=tiny.HISTORIES, max_new_tokens=6), expected)
    assert not caplog.messages
    options = {"max_new_tokens": 6, "pad_token_id": tiny.EOS}  # may be a text's end: nothing is padding
    ids = torch.where(ids == tiny.PAD, tiny.EOS, ids)
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), persona=tiny.HISTORIES, **options)
    assert torch.equal(model.generate(ids, persona=tiny.HISTORIES, **options), whole)
    assert any("pass attention_mask" in message for message in caplog.messages)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_the_cache_does_not_matter(model, options):
    assert answer(model, max_new_tokens=8, **options) == answer(model, max_new_tokens=8)


def test_the_prefix_stands_where_one_wants_it(model):
    expected = reference.greedy(step(model, position=0 if model.config.is_encoder_decoder else 4), 8, tiny.EOS)
    if model.config.is_encoder_decoder:
        assert answer(model, max_new_tokens=8, persona_position=[0]) == expected
    else:
        assert answer(model, max_new_tokens=8, persona_position=torch.tensor([4])) == expected


def test_no_persona_is_an_empty_history(model):
    said = answer(model, None, max_new_tokens=8)
    assert said == answer(model, [], max_new_tokens=8)
    assert said == reference.greedy(step(model, []), 8, tiny.EOS)


def test_one_user_one_prompt_in_every_form(model):
    batch = inputs(model)
    persona = model.encode_persona(tiny.HISTORY)
    forms = [tiny.HISTORY, [tiny.HISTORY], tuple(tiny.HISTORY), persona, [persona]]
    said = [model.generate(**batch, persona=form, max_new_tokens=8) for form in forms]
    said.append(model.generate(batch["input_ids"], persona=persona, max_new_tokens=8))
    said.append(model.generate(inputs=batch["input_ids"], persona=persona, max_new_tokens=8))
    assert all(torch.equal(one, said[0]) for one in said)


# ---- options behave as they do without a prefix -----------------------------------------------------------------


def test_a_causal_model_returns_the_prompt_as_it_came(model):
    if model.config.is_encoder_decoder:
        pytest.skip("an encoder-decoder model returns no prompt")
    for side in ("left", "right"):
        batch = inputs(model, tiny.PROMPTS, side)
        for options in (
            {},
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 2},
        ):
            generated = model.generate(**batch, persona=tiny.HISTORIES, max_new_tokens=3, **options)
            prompts = batch["input_ids"].repeat_interleave(options.get("num_return_sequences", 1), dim=0)
            assert torch.equal(generated[:, : prompts.shape[1]], prompts)
            assert generated.shape[1] <= prompts.shape[1] + 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 14},
        {"max_length": 14, "min_length": 14},
        {"max_new_tokens": 5},
        {"max_new_tokens": 5, "num_beams": 2},
        {"max_new_tokens": 9, "min_new_tokens": 9},
    ],
    ids=str,
)
def test_lengths_are_those_of_the_backbone_without_a_prefix(model, options):
    batch = inputs(model)
    endless = {"suppress_tokens": [tiny.EOS], **options}
    expected = model.backbone.generate(**batch, **endless).shape
    assert model.generate(**batch, persona=tiny.HISTORY, **endless).shape == expected
    config = GenerationConfig(**endless)
    assert model.generate(**batch, persona=tiny.HISTORY, generation_config=config).shape == expected
    assert config.to_diff_dict() == GenerationConfig(**endless).to_diff_dict()


def test_lengths_may_come_from_the_models_own_configuration(model):
    batch, before = inputs(model), model.generation_config
    try:
        model.generation_config = GenerationConfig(
            **before.to_dict() | {"max_length": 13, "min_length": 13, "_from_model_config": False}
        )
        assert model.generate(**batch, persona=tiny.HISTORY).shape[1] == 13
        assert model.generate(**batch, persona=tiny.HISTORY).shape[1] == 13  # nothing was added up
        partial = GenerationConfig(repetition_penalty=2.0)  # the rest still comes from the model's own
        assert model.generate(**batch, persona=tiny.HISTORY, generation_config=partial).shape[1] == 13
        assert model.generate(**batch, persona=tiny.HISTORY, max_length=15, min_length=15).shape[1] == 15
        start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        assert model.generate(**batch, persona=tiny.HISTORY, max_new_tokens=2, min_length=0).shape[1] <= start + 2
    finally:
        model.generation_config = before


def test_min_length_counts_the_prompt_of_a_causal_model(model):
    shortest = 12

    def rule(so_far, logits):
        if len(seen_ids(model, so_far)) < shortest:
            logits[tiny.EOS] = -torch.inf
        return logits + ends  # wants to end as soon as it may

    ends = torch.zeros(len(tiny.VOCABULARY)).index_fill(0, torch.tensor([tiny.EOS]), 100.0)
    processor = LogitsProcessorList([lambda ids, scores: scores + ends])
    expected = reference.greedy(step(model), 20, tiny.EOS, rule)
    assert answer(model, max_new_tokens=20, min_length=shortest, logits_processor=processor) == expected
    assert len(seen_ids(model, expected)) == shortest + 1


def test_repetition_penalty_sees_the_prompt_and_nothing_new(model):
    def rule(so_far, logits):
        for token in set(seen_ids(model, so_far)):
            logits[token] = logits[token] / 3 if logits[token] > 0 else logits[token] * 3
        return logits

    expected = reference.greedy(step(model), 12, tiny.EOS, rule)
    assert answer(model, max_new_tokens=12, repetition_penalty=3.0) == expected
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 1}
    scores = model.generate(**inputs(model), persona=tiny.HISTORY, repetition_penalty=3.0, **options).scores[0][0]
    close(scores, rule([], step(model)([])), 1e-3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_repeat_ngram_sees_the_prompt_and_nothing_new(model, n):
    def rule(so_far, logits):
        seen = seen_ids(model, so_far)
        for i in range(len(seen) - n + 1):
            if seen[i : i + n - 1] == seen[len(seen) - n + 1 :]:
                logits[seen[i + n - 1]] = -torch.inf
        return logits

    expected = reference.greedy(step(model), 12, tiny.EOS, rule)
    assert answer(model, max_new_tokens=12, no_repeat_ngram_size=n) == expected


@pytest.mark.parametrize("position", range(6))
def test_no_repeat_ngram_does_not_depend_on_where_the_prefix_stands(position):
    """The prefix must neither cut an n-gram of the prompt nor make one of its own."""
    model = tiny.model("gpt2", num_persona_tokens=4)
    prompt = "cat moon the sea the"  # bigrams that begin with the last word: "the sea"
    scores = model.generate(
        **inputs(model, prompt),
        persona=tiny.HISTORY,
        persona_position=torch.tensor([position]),
        no_repeat_ngram_size=2,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
    ).scores[0][0]
    assert [tiny.VOCABULARY[i] for i in scores.isinf().nonzero()] == ["sea"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_return_dict(model, options):
    batch = inputs(model, tiny.PROMPTS)
    options = options | {"max_new_tokens": 4, "min_new_tokens": 4, "persona": tiny.HISTORIES}
    output = model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert torch.equal(output.sequences, model.generate(**batch, **options))
    assert len(output.scores) == len(output.logits) == 4
    if "num_beams" in options:
        assert output.sequences_scores.shape == (6,)
    else:
        for b, (history, prompt) in enumerate(zip(tiny.HISTORIES, tiny.PROMPTS, strict=True)):
            close(output.logits[0][b], step(model, history, prompt)([]))


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_sees_what_it_would_see_without_a_prefix(model):
    streamer, plain, batch = Recorder(), Recorder(), inputs(model)
    model.backbone.generate(**batch, max_new_tokens=6, min_new_tokens=6, streamer=plain)
    generated = model.generate(**batch, persona=tiny.HISTORY, max_new_tokens=6, min_new_tokens=6, streamer=streamer)
    assert streamer.ended
    assert streamer.values[0] == plain.values[0] and len(streamer.values) == len(plain.values)
    assert (
        torch.tensor([x for v in streamer.values for x in torch.tensor(v).flatten().tolist()]).tolist()
        == generated[0].tolist()
    )


def test_other_arguments_of_generate_arrive(model):
    expected = answer(model, max_new_tokens=8, min_new_tokens=8)
    assert answer(model, max_new_tokens=8, eos_token_id=expected[0]) == expected[:1]
    banned = answer(model, max_new_tokens=8, bad_words_ids=[[expected[0]]])
    assert expected[0] not in banned
    criteria = StoppingCriteriaList([MaxTimeCriteria(0.0)])
    assert len(answer(model, max_new_tokens=8, min_new_tokens=8, stopping_criteria=criteria)) == 1


def test_labels_are_ignored(model):
    """The Trainer passes its whole batch."""
    labels = torch.tensor([[9, 10]])
    assert answer(model, max_new_tokens=4, labels=labels) == answer(model, max_new_tokens=4)


def test_the_configurations_stay_as_they_were(model):
    before = [c.to_dict() for c in (model.generation_config, model.backbone.generation_config, model.backbone.config)]
    answer(model, max_new_tokens=4, num_beams=2, repetition_penalty=2.0)
    after = [c.to_dict() for c in (model.generation_config, model.backbone.generation_config, model.backbone.config)]
    assert before == after


@pytest.mark.parametrize(
    "refused",
    [
        {"assistant_model": object()},
        {"prompt_lookup_num_tokens": 1},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_would_not_see_the_persona_are_refused(model, refused):
    (name,) = refused
    if model.config.is_encoder_decoder and name in ("guidance_scale", "prefill_chunk_size"):
        pytest.skip("works on encoder-decoder models")
    with pytest.raises(ConfigurationError, match=f"{name}=.*does not work with a persona"):
        answer(model, max_new_tokens=2, **refused)
    if name != "assistant_model":
        with pytest.raises(ConfigurationError, match=f"{name}=.*does not work with a persona"):
            answer(model, generation_config=GenerationConfig(max_new_tokens=2, **refused))


def test_neutral_values_of_refused_options_are_not_refused(model):
    assert answer(model, max_new_tokens=4, assistant_model=None, guidance_scale=1.0) == answer(model, max_new_tokens=4)


def test_unknown_arguments_raise_as_they_do_without_a_prefix(model):
    with pytest.raises(ValueError, match="no_such_option"):
        answer(model, max_new_tokens=2, no_such_option=3)


# ---- what looks at ids sees those of the backbone alone ------------------------------------------------------------


class Seen:
    """Notes the ids that a rule is shown, as a criterion, a processor or a prefix function."""

    def __init__(self):
        self.ids = []

    def stop(self, input_ids, scores, **kwargs):
        self.ids.append(input_ids.tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def score(self, input_ids, scores):
        self.ids.append(input_ids.tolist())
        return torch.zeros_like(scores).index_fill(1, torch.tensor([9]), 1.0)  # every model says the same

    def allow(self, row, ids):
        self.ids.append([row, ids.tolist()])
        return [9]


@pytest.mark.parametrize("position", [None, [0, 2, 1]], ids=["usual", "elsewhere"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "samples"],
)
def test_rules_see_the_ids_that_they_see_without_a_persona(model, options, position):
    if position and model.config.is_encoder_decoder:
        position = [0, 0, 0]
    side = "right" if model.config.is_encoder_decoder else "left"
    batch, seen = inputs(model, tiny.PROMPTS, side), []
    for generate, whose in (
        (model.backbone.generate, {}),
        (model.generate, {"persona": tiny.HISTORIES, "persona_position": position}),
    ):
        note = Seen()
        shared = {**batch, **whose, **options, "max_new_tokens": 3, "min_new_tokens": 3}
        torch.manual_seed(0)
        generate(**shared, stopping_criteria=[note.stop], logits_processor=[note.score])
        generate(**shared, prefix_allowed_tokens_fn=note.allow)
        seen.append(note.ids)
    assert seen[0] == seen[1]


def test_a_criterion_of_the_users_replaces_generates_own(model):
    batch = inputs(model)
    longest = [MaxLengthCriteria(batch["input_ids"].shape[1] + 5)]
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "suppress_tokens": [tiny.EOS], "stopping_criteria": longest}
    expected = model.backbone.generate(**batch, **options).shape
    assert model.generate(**batch, persona=tiny.HISTORY, **options).shape == expected


def test_the_prefix_makes_no_ngram_of_its_own():
    """A prompt's first word may follow itself, unless the prompt says it twice."""
    model = tiny.model("gpt2", num_persona_tokens=4)
    wanted = {"sequence_bias": [[[tiny.VOCABULARY.index("cat")], 1000.0]]}
    batch = inputs(model, "cat moon")
    assert answer(model, prompt="cat moon", no_repeat_ngram_size=2, max_new_tokens=2, **wanted) == [
        *batch["input_ids"][0, :1].tolist() * 2
    ]


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_rules_about_the_encoders_words_see_the_prompt(family, beams):
    model = tiny.model(family)
    batch = inputs(model, ["cat moon the sea", "the night"])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "persona": tiny.HISTORIES[:2]}
    said = model.generate(
        **batch, encoder_no_repeat_ngram_size=1, sequence_bias=[[[i], 50.0] for i in range(7, 60)], **options
    )
    for row, prompt in zip(said.tolist(), batch["input_ids"].tolist(), strict=True):
        assert not set(row[1:]) & (set(prompt) - {tiny.PAD, tiny.EOS})
    scores = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate(**batch, encoder_repetition_penalty=0.5, **scores, **options | {"num_beams": 1})
    raw, scored = output.logits[1], output.scores[1]
    for b, prompt in enumerate(batch["input_ids"].tolist()):
        expected = raw[b].clone()
        for token in set(prompt):
            expected[token] = raw[b, token] * 0.5 if raw[b, token] > 0 else raw[b, token] / 0.5
        expected[tiny.EOS] = -torch.inf  # min_new_tokens
        close(scored[b], expected, 1e-4)


def test_a_penalty_sees_the_whole_prompt_of_a_row_without_a_plug():
    model = tiny.model("gpt2")
    batch = inputs(model, ["cat moon the sea", "the night"], "left")
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate(**batch, plug=["default", None], repetition_penalty=2.0, **options)
    for b in range(2):
        changed = (output.scores[0][b] != output.logits[0][b]).nonzero().flatten().tolist()
        prompt = set(batch["input_ids"][b][batch["attention_mask"][b].bool()].tolist())
        assert prompt <= set(changed) <= prompt | {tiny.PAD}


def test_transition_scores_are_the_backbones(model):
    """With beams and no length penalty they add up to the score of each sequence."""
    output = model.generate(
        **inputs(model),
        persona=tiny.HISTORY,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=4,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    close(scores.sum(dim=1), output.sequences_scores, 1e-4)


@pytest.mark.parametrize(
    "option", [{"token_healing": True}, {"assistant_early_exit": 1}, {"cache_implementation": "paged"}]
)
def test_more_options_that_would_not_see_the_persona(option):
    with pytest.raises(ConfigurationError, match="does not work with a persona"):
        answer(tiny.model("gpt2"), max_new_tokens=2, **option)


def test_continuous_batching_is_refused():
    with pytest.raises(ConfigurationError, match="would not see a persona"):
        tiny.model("gpt2").generate_batch([[9, 10]])


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_the_prefix_counts_among_the_positions(family):
    model = tiny.model(family)
    ids = torch.randint(8, 60, (1, 127), generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="127 tokens and the persona's 2 are 1 more than the backbone's 128 positions"):
        model.generate(ids, persona=tiny.HISTORY, query="sea", max_new_tokens=1)
    with pytest.raises(DataError, match="max_length=126"):
        model(ids, persona=tiny.HISTORY, query="sea", labels=ids)
    assert model.generate(ids[:, :126], persona=tiny.HISTORY, query="sea", max_new_tokens=1).shape[0] == 1


def test_answers_end_where_the_positions_end(caplog):
    model = tiny.model("gpt2")
    ids = torch.randint(8, 60, (1, 120), generator=torch.Generator().manual_seed(0))
    options = {"persona": tiny.HISTORY, "query": "sea", "suppress_tokens": [tiny.EOS]}
    assert model.generate(ids, max_new_tokens=7, **options).shape[1] == 127
    assert not caplog.records
    assert model.generate(ids, max_new_tokens=12, **options).shape[1] == 127
    assert "12 new tokens are 5 more than the backbone's 128 positions allow" in caplog.text
    assert model.generate(ids, **options).shape[1] == 127  # 20 are only a default


@pytest.mark.parametrize("family", ["t5", "llama", "qwen3"])
def test_models_without_a_table_of_positions_go_on(family):
    model = tiny.model(family)
    ids = torch.randint(8, 60, (1, 140), generator=torch.Generator().manual_seed(0))
    assert model.generate(ids, persona=tiny.HISTORY, query="sea", max_new_tokens=2).shape[0] == 1
