"""A soft prompt in front of the answer: where it stands, compared with explicit loops over the bare backbone."""

import pytest
import reference
import tiny
import torch
from reference import close
from transformers.modeling_outputs import BaseModelOutput

from pplug_hf import PPlugModel, PPlugProcessor
from pplug_hf.errors import ConfigurationError
from pplug_hf.modeling.backbone import embedding_norm, state_norm

FAMILIES = tiny.FAMILIES
NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny.model(request.param, placement="answer", attention_temperature=0.2)


def processor_of(model):
    return PPlugProcessor.from_model(model)


def next_logits(model, soft, prompt, answer):
    """Logits of the token behind `answer`, the soft prompt right behind the prompt."""
    if not model.config.is_encoder_decoder:
        return reference.next_logits(model, soft, prompt, answer, position=len(prompt))
    backbone = model.backbone
    states = backbone.get_encoder()(input_ids=torch.tensor([prompt])).last_hidden_state
    states = BaseModelOutput(torch.cat([states, soft[None]], dim=1))
    decoder = torch.tensor([[backbone.config.decoder_start_token_id, *answer]])
    return backbone(encoder_outputs=states, decoder_input_ids=decoder).logits[0, -1]


def rows(model):
    """Soft prompt and prompt ids of each row."""
    unit = 1.0
    if model.config.is_encoder_decoder:  # among the encoder's states, not its words
        unit = state_norm(model.backbone, len(model.tokenizer)) / embedding_norm(model.backbone, len(model.tokenizer))
    made = zip(tiny.HISTORIES, tiny.PROMPTS, strict=True)
    return [(unit * reference.soft_prompt(model, history, text), reference.row(model, text)) for history, text in made]


def test_the_loss_is_that_of_a_loop(model):
    processor = processor_of(model)
    batch = processor(tiny.PROMPTS, persona=tiny.HISTORIES, query=tiny.PROMPTS, labels=tiny.ANSWERS)
    nll, count = 0.0, 0
    for (soft, prompt), answer in zip(rows(model), processor.answer_ids(tiny.ANSWERS), strict=True):
        for t, token in enumerate(answer):
            nll -= next_logits(model, soft, prompt, answer[:t]).log_softmax(-1)[token].item()
            count += 1
    for mode in (True, False):
        model.train(mode).plug.input_encoder.eval()  # which drops out
        close(model(**batch).loss.detach(), torch.tensor(nll / count))


def test_gradients_reach_the_plug_alone(model):
    batch = processor_of(model)(tiny.PROMPTS, persona=tiny.HISTORIES, query=tiny.PROMPTS, labels=tiny.ANSWERS)
    model.train()(**batch).loss.backward()
    assert model.plug.projector.output.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_are_those_of_a_loop(model, beams):
    processor = processor_of(model)
    batch = processor(tiny.PROMPTS, persona=tiny.HISTORIES, query=tiny.PROMPTS)
    skip = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    generated = model.generate(**batch, **NEW, num_beams=beams)[:, skip:]
    alone = []
    for b, (soft, prompt) in enumerate(rows(model)):
        one = processor(tiny.PROMPTS[b], persona=tiny.HISTORIES[b], query=tiny.PROMPTS[b])
        at = 1 if model.config.is_encoder_decoder else one["input_ids"].shape[1]
        alone.append(model.generate(**one, **NEW, num_beams=beams)[0, at:].tolist())
        if beams == 1:
            expected = reference.greedy(lambda so_far, s=soft, p=prompt: next_logits(model, s, p, so_far), 6, tiny.EOS)
            assert generated[b][: len(expected)].tolist() == expected
    for row, expected in zip(generated.tolist(), alone, strict=True):
        assert row[: len(expected)] == expected


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_predict_the_next_token(family, side):
    model = tiny.model(family, placement="answer", attention_temperature=0.2)
    soft, prompt = rows(model)[0]
    answer = [30, 40, 21]
    row = [*prompt, *answer]
    pad = [tiny.PAD] * 2
    ids = torch.tensor([pad + row if side == "left" else row + pad])
    mask = (ids != tiny.PAD).long()
    labels = ids.masked_fill(ids == tiny.PAD, -100)
    at = (len(pad) if side == "left" else 0) + len(prompt)
    labels[:, :at] = -100
    output = model(ids, mask, labels=labels, persona=[tiny.HISTORY], query=tiny.PROMPTS[:1])
    for t in range(len(answer)):
        close(output.logits[0, at + t - 1], next_logits(model, soft, prompt, answer[:t]))
    alone = model(torch.tensor([prompt]), persona=[tiny.HISTORY], query=tiny.PROMPTS[:1])
    close(alone.logits[0, -1], next_logits(model, soft, prompt, []))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_batch_may_differ(family, tmp_path):
    model = tiny.model(family, attention_temperature=0.2)
    tiny.model(family, placement="answer", attention_temperature=0.2).save_pretrained(tmp_path)
    model.load_plug(tmp_path, "late")
    batch = processor_of(model)(tiny.PROMPTS, persona=tiny.HISTORIES, query=tiny.PROMPTS)
    plugs = ["late", "default", None]
    both = model.generate(**batch, **NEW, plug=plugs)
    for b, plug in enumerate(plugs):
        asked = {"persona": tiny.HISTORIES[b : b + 1], "query": tiny.PROMPTS[b : b + 1], "plug": [plug]}
        alone = model.generate(
            batch["input_ids"][b : b + 1], attention_mask=batch["attention_mask"][b : b + 1], **asked, **NEW
        )
        assert both[b, : alone.shape[1]].tolist() == alone[0].tolist()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoders_states_give_the_unit(family):
    late, early = tiny.model(family, placement="answer"), tiny.model(family)
    assert late.config.embedding_norm == pytest.approx(state_norm(late.backbone, len(late.tokenizer)))
    assert early.config.embedding_norm == pytest.approx(embedding_norm(early.backbone, len(early.tokenizer)))


def test_an_encoder_of_another_width_is_refused(monkeypatch):
    backbone = tiny.backbone("t5")
    own = backbone.encoder.forward
    wide = lambda **kwargs: BaseModelOutput(own(**kwargs).last_hidden_state.repeat(1, 1, 2))  # noqa: E731
    monkeypatch.setattr(backbone.encoder, "forward", wide)
    with pytest.raises(ConfigurationError, match=r"states of width 32 for words of width 16.*placement='prompt'"):
        state_norm(backbone)


def test_a_plug_remembers_where_it_stands(tmp_path):
    model = tiny.model("llama", placement="answer")
    model.save_pretrained(tmp_path)
    loaded = PPlugModel.from_pretrained(tmp_path, backbone=model.backbone, encoder=model.history_encoder)
    assert loaded.config.placement == processor_of(loaded).placement == "answer"
    with pytest.raises(ConfigurationError, match="placement must be one of prompt, answer; got 'behind'"):
        tiny.model("llama", placement="behind")
