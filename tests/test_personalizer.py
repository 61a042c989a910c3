"""A personalizer: soft prompts without a language model, the same as the model's."""

import itertools
import sys
from pathlib import Path

import pytest
import tiny
import torch
from reference import close

import pplug_hf
from pplug_hf import EncoderSpec, Personalizer, PPlugModel
from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.modeling.plug import SoftPrompt

QUERIES = ["the night sky", "a good film", "the"]
CHOICES = {
    "paper": {},
    "small": {"train_input_encoder": False, "num_persona_tokens": 3, "projector_size": 5, "learn_temperature": True},
    "mean": {"aggregator": "mean", "instruction": False},
}


@pytest.fixture(scope="module", params=CHOICES)
def saved(request, places, tmp_path_factory):
    """A plug folder and the model that wrote it."""
    folder = tmp_path_factory.mktemp("plug")
    model = tiny.model("llama", **CHOICES[request.param])
    model.config.encoder = str(places / "encoder")
    model.save_pretrained(folder)
    return folder, PPlugModel.from_pretrained(folder, backbone=tiny.backbone("llama"))


def test_soft_prompts_are_the_models_bit_for_bit(saved, monkeypatch):
    folder, model = saved

    def no_language_model(*args, **kwargs):
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr("pplug_hf.modeling.backbone.load_backbone", no_language_model)
    personalizer = Personalizer.from_pretrained(folder)
    persona = personalizer.encode(tiny.HISTORY)
    assert persona.spec == model.personalizer.spec == EncoderSpec.of(model.config)
    for users in (tiny.HISTORIES, personalizer.encode(tiny.HISTORIES), [persona] * 3, [None] * 3):
        assert torch.equal(personalizer.soft_prompt(users, query=QUERIES), model.soft_prompt(users, query=QUERIES))
        assert torch.equal(personalizer.embedding(users, query=QUERIES), model.persona_embedding(users, query=QUERIES))
        assert torch.equal(personalizer.weights(users, query=QUERIES), model.persona_weights(users, query=QUERIES))
    assert torch.equal(personalizer.soft_prompt(persona, query="sea"), model.soft_prompt(persona, query="sea"))


def test_a_batch_has_a_mask_and_gradients(saved):
    personalizer = Personalizer.from_pretrained(saved[0]).train()
    assert not personalizer.history_encoder.training  # which stays frozen
    prompt = personalizer(tiny.HISTORIES, QUERIES)
    P = personalizer.config.prefix_length
    assert isinstance(prompt, SoftPrompt) and prompt.confidence is None
    assert prompt.mask.tolist() == [[1] * P] * 3 and prompt.embeddings.shape[:2] == (3, P)
    prompt.embeddings.sum().backward()
    assert personalizer.plug.projector.output.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in personalizer.history_encoder.parameters())


def test_a_query_is_asked_for_only_where_it_is_looked_at(saved):
    personalizer = Personalizer.from_pretrained(saved[0])
    asked = []

    def queries():
        asked.append(True)
        return QUERIES[:1]

    personalizer([[]], queries)
    assert not asked
    personalizer([tiny.HISTORY], queries)
    assert bool(asked) is personalizer.plug.aggregator.needs_query
    if personalizer.plug.aggregator.needs_query:
        with pytest.raises(ConfigurationError, match=r"query= is missing.*Pass query=<text>"):
            personalizer.soft_prompt(tiny.HISTORY)


def test_the_plain_equations_give_what_the_batch_gives(saved):
    """`PersonaPlug.of_one_user` is the paper's text; the batched form must equal it, values and gradients."""
    plug = Personalizer.from_pretrained(saved[0]).plug.double()
    queries, histories = tiny.vectors(3).double(), [tiny.vectors(n, seed=n).double() for n in (5, 1, 0)]
    together = plug(queries, histories)
    for row, query, items in zip(together, queries, histories, strict=True):
        close(row, plug.of_one_user(query, items), 1e-6)
    together.square().sum().backward()
    batched = {name: p.grad.clone() for name, p in plug.named_parameters() if p.grad is not None}
    plug.zero_grad()
    sum(plug.of_one_user(q, h).square().sum() for q, h in zip(queries, histories, strict=True)).backward()
    for name, gradient in batched.items():
        close(dict(plug.named_parameters())[name].grad, gradient, 1e-9)


def test_encode_only_reads_no_weights_and_says_so_when_they_are_needed(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved[0] / "config.json").read_bytes())
    personalizer = Personalizer.from_pretrained(tmp_path, encode_only=True)
    assert all(parameter.is_meta for parameter in personalizer.plug.parameters())
    assert torch.equal(personalizer.encode(tiny.HISTORY).vectors, saved[1].encode_persona(tiny.HISTORY).vectors)
    with pytest.raises(ConfigurationError, match="loaded with encode_only=True"):
        personalizer.soft_prompt(tiny.HISTORY, query="sea")


def test_an_encoder_that_gives_nan_is_said(monkeypatch):
    model = tiny.model("gpt2")
    monkeypatch.setattr(
        "pplug_hf.modeling.encoders.embed",
        lambda encoder, texts, *args, **kwargs: torch.full((len(texts), 12), torch.nan),
    )
    with pytest.raises(DataError, match="4 of 4 item vectors hold NaN"):
        model.soft_prompt(tiny.HISTORY, query=torch.ones(1, 12))


def test_generate_goes_a_short_way():
    """A history's way into `generate`: few calls, few files, few changes of file."""
    root, calls = str(Path(pplug_hf.__file__).parent), []
    model, ids = tiny.model("gpt2"), torch.tensor([[9, 10, 11]])

    def note(frame, event, argument):
        if event == "call" and (frame.f_code.co_filename or "").startswith(root):
            calls.append(frame.f_code.co_filename)

    model.generate(ids, persona=tiny.HISTORY, max_new_tokens=2)
    sys.setprofile(note)
    try:
        model.generate(ids, persona=tiny.HISTORY, max_new_tokens=2)
    finally:
        sys.setprofile(None)
    changes = sum(a != b for a, b in itertools.pairwise(calls))
    assert (len(calls) <= 46, len(set(calls)) <= 7, changes <= 16) == (True,) * 3, (len(calls), set(calls), changes)
