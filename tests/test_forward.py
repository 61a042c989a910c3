"""Equations 1 to 6 on five families of language models, against the explicit reference."""

import pytest
import reference
import tiny
import torch
from reference import close

from pplug_hf import Persona, PPlugProcessor

CHOICES = {
    "paper": {},
    "learned temperature": {"attention_temperature": 0.3, "learn_temperature": True},
    "sharp": {"attention_temperature": 0.05},
    "mean": {"aggregator": "mean"},
    "four tokens": {"num_persona_tokens": 4},
    "no instruction": {"instruction": False},
    "frozen input encoder": {"train_input_encoder": False},
    "prompts": {"query_prompt": "like ", "history_prompt": "a film "},
}


def padded(rows, side, value=tiny.PAD):
    """[B, T] of rows of numbers, and its mask."""
    width = max(map(len, rows)) + 1  # one more than needed
    fill = [[value] * (width - len(row)) for row in rows]
    both = [(f + row, [0] * len(f) + [1] * len(row)) for row, f in zip(rows, fill, strict=True)]
    if side == "right":
        both = [(row + f, [1] * len(row) + [0] * len(f)) for row, f in zip(rows, fill, strict=True)]
    ids, mask = zip(*both, strict=True)
    return torch.tensor(ids), torch.tensor(mask)


def processed(model, **kwargs):
    return PPlugProcessor.from_model(model)(tiny.PROMPTS, persona=tiny.HISTORIES, query=tiny.PROMPTS, **kwargs)


# ---- against the equations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_personas_equal_the_equations(family, choices):
    check_personas(tiny.model(family, **choices))


def test_personas_equal_the_equations_on_every_family(model):
    check_personas(model)


def check_personas(model):
    weights = model.persona_weights(tiny.HISTORIES, query=tiny.PROMPTS)
    persona = model.persona_embedding(tiny.HISTORIES, query=tiny.PROMPTS)
    soft = model.soft_prompt(tiny.HISTORIES, query=tiny.PROMPTS)
    scale = reference.scale(model.backbone)
    assert weights.shape == (3, 4)
    for b, (history, query) in enumerate(zip(tiny.HISTORIES, tiny.PROMPTS, strict=True)):
        x, items = reference.read(model, history, query)
        expected = reference.weights(model.plug, x, items) if items else []
        assert weights[b].tolist() == pytest.approx(expected + [0.0] * (4 - len(items)), abs=1e-5)
        expected = scale * reference.persona_embedding(model.plug, x, items)
        close(persona[b], expected.float())
        close(soft[b], reference.soft_prompt(model, history, query))


@pytest.mark.parametrize("choices", [{}, {"num_persona_tokens": 4, "instruction": False}], ids=["paper", "P=4"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_equals_equation_6(family, choices):
    model = tiny.model(family, **choices)
    batch = processed(model, labels=tiny.ANSWERS)
    logs = []
    for prompt, history, answer in zip(tiny.PROMPTS, tiny.HISTORIES, tiny.ANSWERS, strict=True):
        soft = reference.soft_prompt(model, history, prompt)
        answer_ids = [i for i in reference.row(model, answer) if i != tiny.BOS or family == "bart"]
        if answer_ids[-1] != tiny.EOS:
            answer_ids.append(tiny.EOS)
        logs += reference.log_likelihood(model, soft, reference.row(model, prompt), answer_ids)
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(-sum(logs) / len(logs), rel=1e-4)
        total = model(**batch, num_items_in_batch=5).loss.item()  # of a batch accumulated over several steps
    assert total == pytest.approx(-sum(logs) / 5, rel=1e-4)


@torch.no_grad()
def test_logits_equal_those_of_the_backbone_on_the_whole_sequence(model):
    batch = processed(model, labels=tiny.ANSWERS)
    logits = model(**batch).logits
    for b, (history, query) in enumerate(zip(tiny.HISTORIES, tiny.PROMPTS, strict=True)):
        soft = reference.soft_prompt(model, history, query)
        ids = batch["input_ids"][b][batch["attention_mask"][b].bool()].tolist()
        if model.config.is_encoder_decoder:
            labels = [i for i in batch["labels"][b].tolist() if i >= 0]
            expected = [reference.next_logits(model, soft, ids, labels[:t]) for t in range(len(labels))]
            got = logits[b, : len(labels)]
        else:  # aligned with input_ids; behind BOS, where there is one, the next thing to see is the prefix
            bos = int(ids[0] == tiny.BOS)
            expected = [reference.next_logits(model, soft, ids[: t + 1], []) for t in range(bos, len(ids))]
            got = logits[b, batch["attention_mask"][b].bool()][bos:]
        close(got, torch.stack(expected))


# ---- what must not matter ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(model, side):
    seq2seq = model.config.is_encoder_decoder
    rows = [reference.row(model, prompt) for prompt in tiny.PROMPTS]
    answers = [reference.row(model, answer) for answer in tiny.ANSWERS]
    ids, mask = padded(rows, side)
    labels = padded(answers if seq2seq else rows, "right" if seq2seq else side, value=-100)[0]
    together = model(ids, mask, labels, persona=tiny.HISTORIES, query=tiny.PROMPTS)
    losses, counts = [], []
    for b, row in enumerate(rows):
        own = torch.tensor([answers[b] if seq2seq else row])
        alone = model(torch.tensor([row]), labels=own, persona=[tiny.HISTORIES[b]], query=tiny.PROMPTS[b])
        real = slice(len(answers[b])) if seq2seq else mask[b].bool()
        close(together.logits[b][real], alone.logits[0])
        counts.append(own.numel() - int(not seq2seq and row[0] == tiny.BOS))  # nothing stands in front of a first BOS
        losses.append(alone.loss.item() * counts[-1])
    assert together.loss.item() == pytest.approx(sum(losses) / sum(counts), rel=1e-4)


@torch.no_grad()
def test_kind_of_mask_and_what_stands_in_the_padding_do_not_matter(model):
    ids, mask = padded([reference.row(model, prompt) for prompt in tiny.PROMPTS], "left")
    asked = {"persona": tiny.HISTORIES, "query": tiny.PROMPTS}
    if model.config.is_encoder_decoder:
        asked["labels"] = torch.tensor([[9, tiny.EOS]] * 3)
    real = mask.bool() if not model.config.is_encoder_decoder else ...
    expected = model(ids, mask, **asked).logits[real]
    close(model(ids, mask.bool(), **asked).logits[real], expected)
    close(model(ids, mask.float(), **asked).logits[real], expected)
    close(model(ids.masked_fill(mask == 0, 9), mask, **asked).logits[real], expected)


@torch.no_grad()
def test_minus_100_is_not_predicted(model):
    batch = processed(model, labels=tiny.ANSWERS)
    batch["labels"][1:] = -100
    only = PPlugProcessor.from_model(model)(
        tiny.PROMPTS[0], persona=tiny.HISTORIES[:1], query=tiny.PROMPTS[0], labels=tiny.ANSWERS[0]
    )
    assert model(**batch).loss.item() == pytest.approx(model(**only).loss.item(), rel=1e-4)


@torch.no_grad()
def test_no_persona_is_an_empty_history(model):
    ids = torch.tensor([[9, 10, 11]] * 2)
    labels = torch.tensor([[12, 13, 14]] * 2)
    nothing = model(ids, labels=labels).logits
    assert nothing.isfinite().all()
    for empty in ([[], []], [None, []], [model.encode_persona([])] * 2):
        close(model(ids, labels=labels, persona=empty).logits, nothing)
    somebody = model(ids, labels=labels, persona=[tiny.HISTORY] * 2, query=["the", "moon"]).logits
    assert not torch.allclose(somebody, nothing, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 10_000])
def test_histories_of_any_length(gpt2, n):
    persona = Persona(tiny.vectors(n), gpt2.personalizer.spec)
    weights = gpt2.persona_weights(persona, query="the sea")
    assert weights.shape == (1, n) and weights.sum().item() == pytest.approx(float(n > 0), abs=1e-4)
    assert gpt2(torch.tensor([[9, 10]]), persona=persona, query="the sea").logits.isfinite().all()


# ---- requests ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_request_is_the_prompt_if_none_is_given(model):
    """Of a causal model without the answer that follows it."""
    batch = PPlugProcessor.from_model(model)(tiny.PROMPTS, persona=tiny.HISTORIES, labels=tiny.ANSWERS)
    logits = model(**batch).logits
    close(logits, model(**batch, query=tiny.PROMPTS).logits)
    assert not torch.allclose(logits, model(**batch, query=tiny.PROMPTS[::-1]).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_request_may_be_a_vector(gpt2):
    vectors = torch.tensor(gpt2.plug.input_encoder.encode(tiny.PROMPTS))
    close(gpt2.soft_prompt(tiny.HISTORIES, query=vectors), gpt2.soft_prompt(tiny.HISTORIES, query=tiny.PROMPTS))


def test_the_mean_needs_no_request():
    model = tiny.model("gpt2", aggregator="mean")
    assert model.plug.input_encoder is None
    close(model.soft_prompt(tiny.HISTORY), model.soft_prompt(tiny.HISTORY, query="the sea"))
    model.tokenizer = None
    assert model(torch.tensor([[9, 10]]), persona=tiny.HISTORY).logits.isfinite().all()


# ---- where the prefix stands ------------------------------------------------------------------------------------


@torch.no_grad()
def test_bos_stays_first():
    model = tiny.model("llama")
    soft = model.soft_prompt(tiny.HISTORY, query="the sea")[0]
    words = model.backbone.get_input_embeddings()(torch.tensor([tiny.BOS, 20, 30]))
    by_hand = torch.cat([words[:1], soft, words[1:]])[None]
    expected = model.backbone(inputs_embeds=by_hand).logits[0, -3:]  # BOS predicts from behind the soft prompt
    got = model(torch.tensor([[tiny.BOS, 20, 30]]), persona=tiny.HISTORY, query="the sea").logits[0]
    close(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_prefix_stands_where_one_wants_it(model, side):
    rows, position = [[20, 30, 40, 21], [50, 22], [23]], [3, 0, 1]
    ids, mask = padded(rows, side)
    asked = {"persona": tiny.HISTORIES, "query": tiny.PROMPTS, "persona_position": torch.tensor(position)}
    if model.config.is_encoder_decoder:
        asked["labels"] = torch.tensor([[9]] * 3)
    logits = model(ids, mask, **asked).logits
    table = reference.word_table(model.backbone)
    for b, (row, p) in enumerate(zip(rows, position, strict=True)):
        words = table(torch.tensor(row))
        soft = reference.soft_prompt(model, tiny.HISTORIES[b], tiny.PROMPTS[b])
        by_hand = torch.cat([words[:p], soft, words[p:]])[None]
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.backbone.config.decoder_start_token_id]])
            expected, got = model.backbone(inputs_embeds=by_hand, decoder_input_ids=start).logits[0, -1], logits[b, -1]
        else:
            expected = model.backbone(inputs_embeds=by_hand).logits[0, -1]  # also where the soft prompt is last
            got = logits[b][mask[b].bool()][-1]
        close(got, expected)


def test_arguments_reach_the_backbone(model):
    more = {"labels": torch.tensor([[9, 10]])} if model.config.is_encoder_decoder else {}
    output = model(torch.tensor([[9, 10]]), persona=tiny.HISTORY, output_hidden_states=True, **more)
    hidden = output.encoder_hidden_states if model.config.is_encoder_decoder else output.hidden_states
    assert hidden[0].shape == (1, 2 + model.config.prefix_length, 16)
