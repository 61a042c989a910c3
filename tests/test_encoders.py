"""Equations 1 and 2: any SentenceTransformer, used exactly as it uses itself."""

import pytest
import tiny
import torch
from reference import close
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Dense, Router, StaticEmbedding

from pplug_hf import PPlugForConditionalGeneration, PPlugModel, PPlugProcessor, VectorStore
from pplug_hf.errors import ConfigurationError, DataError, MissingFileError
from pplug_hf.modeling.encoders import (
    embed,
    embed_with_gradient,
    encoder_size,
    fingerprint,
    freeze_encoder,
    load_encoder,
    origin,
    trainable_copy,
)

ENCODERS = {
    "cls": {},
    "mean": {"pooling": "mean"},
    "not normalised": {"normalize": False},
    "dense head": {"dense": 7},
    "truncated": {"truncate_dim": 5, "normalize": False},
    "prompt not pooled": {"pooling": "mean", "include_prompt": False},
}
TEXTS = [*tiny.HISTORY, "sea", tiny.HISTORY[0], ""]


@pytest.fixture(scope="module", params=ENCODERS.values(), ids=ENCODERS)
def encoder(request):
    return tiny.encoder(**request.param)


# ---- vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "a film about "])
def test_vectors_are_those_of_encode(encoder, prompt):
    expected = torch.tensor(encoder.encode(TEXTS, prompt=prompt))
    frozen = embed(encoder, TEXTS, prompt=prompt)
    assert frozen.shape == (len(TEXTS), encoder_size(encoder)) and frozen.dtype == torch.float32
    close(frozen, expected)
    with_gradient = embed_with_gradient(encoder, TEXTS, prompt=prompt)
    close(with_gradient, expected)
    assert with_gradient.requires_grad and not frozen.requires_grad and not frozen.is_inference()


def test_mixed_precision_is_near_and_leaves_what_is_around_it_alone(encoder):
    encoder = trainable_copy(encoder)
    plain, mixed = embed_with_gradient(encoder, TEXTS), embed_with_gradient(encoder, TEXTS, bf16=True)
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, plain)
    close(mixed, plain, tolerance=3e-2)
    mixed.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in encoder.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed_with_gradient(encoder, TEXTS).float(), mixed), "a Trainer's mixed precision is kept"


def test_vectors_of_a_real_encoder_are_those_of_encode(minilm):
    texts = ["A film about the sea.", "Ein Buch über den Sommer", "🌧️", "word " * 600, ""]
    expected = torch.tensor(minilm.encode(texts))
    close(embed(minilm, texts), expected)
    close(embed_with_gradient(minilm.eval(), texts), expected)
    assert encoder_size(minilm) == 384


def test_widths():
    assert encoder_size(tiny.encoder()) == 12
    assert encoder_size(tiny.encoder(dense=7)) == 7
    assert encoder_size(tiny.encoder(truncate_dim=5)) == 5


def test_each_distinct_text_is_encoded_once(monkeypatch):
    encoder, seen = tiny.encoder(), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts, **kwargs: (seen.extend(texts), encode(texts, **kwargs))[1])
    vectors = embed(encoder, ["sea", "moon", "sea", "sea"])
    assert seen == ["sea", "moon"]
    assert torch.equal(vectors[0], vectors[2]) and torch.equal(vectors[0], vectors[3])
    vectors[0] = 0  # rows are copies
    assert vectors[2].abs().sum() > 0


def test_histories_of_a_batch_share_one_pass(monkeypatch):
    encoder, seen = tiny.encoder(), []
    model = tiny.from_backbone(tiny.backbone("gpt2"), encoder, tokenizer=tiny.tokenizer("gpt2"))
    encode = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda texts, **kwargs: (seen.append(list(texts)), encode(texts, **kwargs))[1]
    )
    personas = model.encode_persona([["sea", "moon"], [], ["moon", "sea", "dog"]])
    assert seen == [["sea", "moon", "dog"]]
    assert [len(persona) for persona in personas] == [2, 0, 3]


def test_batch_size_does_not_matter():
    encoder = tiny.encoder()
    close(embed(encoder, TEXTS, batch_size=1), embed(encoder, TEXTS, batch_size=100))


# ---- the trained copy -------------------------------------------------------------------------------------------


def test_the_trained_copy_starts_as_the_frozen_encoder(encoder):
    frozen = freeze_encoder(encoder)
    trained = trainable_copy(frozen)
    close(embed(trained, TEXTS), embed(frozen, TEXTS))
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    ours, theirs = ({p.data_ptr() for p in e.parameters()} for e in (trained, frozen))
    assert not ours & theirs


def test_every_trained_parameter_gets_a_gradient(encoder):
    trained = trainable_copy(encoder)
    (embed_with_gradient(trained, tiny.HISTORY) * tiny.vectors(4, encoder_size(encoder))).sum().backward()
    without = [name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = [name for name, p in trained.named_parameters() if not p.requires_grad]
    assert frozen and all(".pooler." in name for name in frozen)  # sentence vectors do not pass through it


def test_the_trained_copy_of_a_half_precision_encoder_is_full_precision():
    trained = trainable_copy(tiny.encoder().bfloat16())
    assert {p.dtype for p in trained.parameters()} == {torch.float32}


# ---- fingerprints -----------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_what_changes_vectors():
    prints = {
        fingerprint(encoder, prompt)["digest"] + prompt
        for encoder, prompt in [
            (tiny.encoder(), ""),
            (tiny.encoder(), "a film "),
            (tiny.encoder(seed=1), ""),
            (tiny.encoder(pooling="mean"), ""),
            (tiny.encoder(pooling="mean", include_prompt=False), ""),
            (tiny.encoder(normalize=False), ""),
            (tiny.encoder(truncate_dim=5), ""),
            (tiny.encoder(dense=12), ""),
        ]
    }
    assert len(prints) == 8
    shorter = tiny.encoder()
    shorter.max_seq_length = 3
    assert fingerprint(shorter) != fingerprint(tiny.encoder())
    nudged = tiny.encoder()
    with torch.no_grad():
        nudged[0].auto_model.encoder.layer[1].output.dense.weight[3, 4] += 0.1
    assert fingerprint(nudged) != fingerprint(tiny.encoder())
    assert fingerprint(tiny.encoder(), "a")["history_prompt"] == "a"


def test_a_fingerprint_does_not_change_with_how_the_encoder_is_loaded(places):
    path = str(places / "encoder")
    expected = fingerprint(tiny.encoder())
    assert fingerprint(SentenceTransformer(path)) == expected
    assert fingerprint(SentenceTransformer(path, model_kwargs={"dtype": "bfloat16"})) == expected
    assert fingerprint(SentenceTransformer(path).train()) == expected
    assert fingerprint(freeze_encoder(tiny.encoder())) == expected


def test_a_fingerprint_says_what_it_is_of(minilm):
    assert fingerprint(minilm, "p: ") == {
        "model_type": "bert",
        "embedding_size": 384,
        "vocab_size": 30522,
        "digest": fingerprint(minilm)["digest"],
        "history_prompt": "p: ",
    }


# ---- loading ----------------------------------------------------------------------------------------------------


def test_loading(places):
    encoder = load_encoder(str(places / "encoder"))
    assert origin(encoder) == (str(places / "encoder"), None)
    assert load_encoder(encoder) is encoder


@pytest.mark.parametrize("name", ["nobody/no-such-encoder", "no-such-encoder", "./no/such/folder", "/no/such/folder"])
def test_unknown_names_give_one_clear_error(name):
    with pytest.raises(MissingFileError, match="Cannot load the sentence encoder") as error:
        load_encoder(name)
    assert name in str(error.value)


def test_a_subfolder_that_cannot_be_loaded_is_not_passed_over(places):
    for name in (str(places / "encoder"), "me/encoder"):
        with pytest.raises(ConfigurationError, match="pass the path of that folder"):
            load_encoder(name, subfolder="none")


# ---- on a model -------------------------------------------------------------------------------------------------


def on(encoder, **choices):
    return tiny.from_backbone(tiny.backbone("gpt2"), encoder, tokenizer=tiny.tokenizer("gpt2"), **choices)


def test_a_dense_head_survives_attaching_and_loading(tmp_path, places):
    """transformers re-initialises what it did not load itself."""
    encoder = tiny.encoder(dense=7)
    encoder.save(str(tmp_path / "encoder"))
    expected = torch.tensor(encoder.encode(tiny.HISTORY))
    model = tiny.from_backbone(str(places / "gpt2"), encoder=str(tmp_path / "encoder"))
    model.save_pretrained(tmp_path / "plug")
    for one in (model, PPlugModel.from_pretrained(tmp_path / "plug")):
        assert isinstance(one.plug.input_encoder[2], Dense)
        close(one.encode_persona(tiny.HISTORY).vectors, expected)
        close(embed_with_gradient(one.plug.input_encoder, tiny.HISTORY), expected)


def test_prompts_of_the_encoder_are_picked_up():
    encoder = tiny.encoder(prompts={"query": "what is ", "document": "a film about "})
    model = on(encoder)
    assert (model.config.query_prompt, model.config.history_prompt) == ("what is ", "a film about ")
    expected = torch.tensor(encoder.encode(tiny.HISTORY, prompt_name="document"))
    close(model.encode_persona(tiny.HISTORY).vectors, expected)
    vector = torch.tensor(encoder.encode(["the sea"], prompt_name="query"))
    close(model.soft_prompt(tiny.HISTORY, query="the sea"), model.soft_prompt(tiny.HISTORY, query=vector))


def test_prompts_may_be_chosen_and_a_default_prompt_is_not_added():
    encoder = tiny.encoder(prompts={"query": "what is "}, default_prompt_name="query")
    assert on(encoder, query_prompt="like ").config.query_prompt == "like "
    model = on(encoder)
    assert (model.config.query_prompt, model.config.history_prompt) == ("what is ", "")
    expected = torch.tensor(encoder.encode(tiny.HISTORY, prompt=""))
    close(model.encode_persona(tiny.HISTORY).vectors, expected)


@pytest.mark.parametrize("choices", ENCODERS.values(), ids=ENCODERS)
def test_every_kind_of_encoder_carries_a_model(choices):
    encoder = tiny.encoder(**choices)
    model = on(encoder, history_prompt="a film about ")
    expected = torch.tensor(encoder.encode(tiny.HISTORY, prompt="a film about "))
    close(model.encode_persona(tiny.HISTORY).vectors, expected)
    vector = torch.tensor(encoder.encode(["the sea"]))
    close(model.soft_prompt(tiny.HISTORY, query="the sea"), model.soft_prompt(tiny.HISTORY, query=vector))


def test_a_real_encoder_carries_a_model_that_finds_the_item_that_fits(minilm):
    model = on(minilm, attention_temperature=0.05)
    history = ["A thriller about a bank robbery.", "How to grow tomatoes on a balcony.", "The history of jazz."]
    weights = model.persona_weights([history] * 2, query=["my vegetable garden", "a saxophone record"])
    assert weights.argmax(dim=1).tolist() == [1, 2]


def test_a_half_precision_encoder_gives_full_precision_vectors(places):
    model = on(SentenceTransformer(str(places / "encoder"), model_kwargs={"dtype": "bfloat16"}))
    persona = model.encode_persona(tiny.HISTORY)
    assert persona.vectors.dtype == torch.float32
    close(persona.vectors, tiny.model().encode_persona(tiny.HISTORY).vectors, 0.1)
    assert model.soft_prompt(persona, query="the sea").dtype == torch.float32


# ---- encoders with two sides ----------------------------------------------------------------------------------------


def routed(**choices):
    words = tiny.tokenizer("encoder").backend_tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sides = [[StaticEmbedding(words, embedding_dim=12)] for _ in range(2)]
    return SentenceTransformer(modules=[Router.for_query_document(*sides, **choices)], device="cpu")


@pytest.mark.parametrize("trained", [True, False])
def test_queries_and_history_go_through_sides_of_their_own(trained, tmp_path):
    encoder = routed()
    model = tiny.from_backbone(
        tiny.backbone("gpt2"), encoder, tokenizer=tiny.tokenizer("gpt2"), train_input_encoder=trained
    )
    assert torch.allclose(
        model.encode_persona(tiny.HISTORY).vectors, torch.tensor(encoder.encode_document(tiny.HISTORY))
    )
    weights = model.persona_weights(tiny.HISTORY, query="the sea")[0]
    asked = torch.tensor(encoder.encode_query(["the sea"]))
    assert torch.allclose(weights, model.persona_weights(tiny.HISTORY, query=asked)[0], atol=1e-5)
    names = [name for name, _ in model.plug.named_parameters() if name.startswith("input_encoder")]
    assert bool(names) == trained and not any("document" in name for name in names)
    for name in names:  # whatever is trained has a gradient
        model.zero_grad()
        model(
            torch.tensor([[9, 10]]), labels=torch.tensor([[9, 10]]), persona=tiny.HISTORY, query="sea"
        ).loss.backward()
        assert model.plug.get_parameter(name).grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = PPlugForConditionalGeneration.from_pretrained(tmp_path, backbone=model.backbone, encoder=routed())
    assert torch.allclose(again.persona_weights(tiny.HISTORY, query="the sea")[0], weights, atol=1e-6)


def test_a_store_keeps_the_sides_apart(tmp_path):
    encoder = routed()
    items, queries = VectorStore(encoder, folder=tmp_path), VectorStore(encoder, folder=tmp_path, task="query")
    assert torch.allclose(items(["sea"]), torch.tensor(encoder.encode_document(["sea"])), atol=1e-6)
    assert torch.allclose(queries(["sea"]), torch.tensor(encoder.encode_query(["sea"])), atol=1e-6)
    plain = tiny.shared_encoder()
    assert VectorStore(plain, folder=tmp_path).folder == VectorStore(plain, folder=tmp_path, task="query").folder


# ---- objects of the wrong kind --------------------------------------------------------------------------------------


class Holder:
    """As DataParallel, a pipeline or torch.compile hold a model."""

    def __init__(self, **held):
        vars(self).update(held)


@pytest.mark.parametrize(
    "backbone, message",
    [
        (lambda: tiny.backbone("gpt2").transformer, "GPT2Model: load it with AutoModelForCausalLM"),
        (lambda: Holder(module=tiny.backbone("gpt2")), "pass its .module"),
        (lambda: Holder(model=tiny.backbone("gpt2"), tokenizer=None), "pass its .model"),
        (lambda: Holder(merge_and_unload=None), "merge the adapter"),
        (lambda: tiny.model("gpt2"), "pass its .backbone"),
        (lambda: None, "got NoneType"),
    ],
)
def test_a_backbone_of_another_kind(backbone, message):
    with pytest.raises(ConfigurationError, match=message):
        tiny.from_backbone(backbone(), tiny.shared_encoder())


@pytest.mark.parametrize("encoder", [None, 3, "transformer", "sparse"])
def test_an_encoder_of_another_kind(encoder):
    made = {
        "transformer": lambda: tiny.encoder()[0].auto_model,
        "sparse": lambda: SparseEncoder(modules=[tiny.encoder()[0]]),
    }
    given = made[encoder]() if encoder in made else encoder
    with pytest.raises(ConfigurationError, match="encoder must be a SentenceTransformer that gives dense vectors"):
        tiny.from_backbone(tiny.backbone("gpt2"), given, tokenizer=tiny.tokenizer("gpt2"))


def test_a_tokenizer_of_another_kind():
    for given, advice in (("gpt2", "AutoTokenizer"), (Holder(tokenizer=tiny.tokenizer()), r"pass its \.tokenizer")):
        with pytest.raises(ConfigurationError, match=advice):
            tiny.from_backbone(tiny.backbone("gpt2"), tiny.shared_encoder(), tokenizer=given)
        with pytest.raises(ConfigurationError, match=advice):
            PPlugProcessor.from_model(tiny.model("gpt2"), tokenizer=given)
    with pytest.raises(ConfigurationError, match="takes a plug, got GPT2LMHeadModel"):
        PPlugProcessor.from_model(tiny.backbone("gpt2"))


def test_an_adapter_folder_is_no_backbone(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigurationError, match="is an adapter, not a whole model"):
        tiny.from_backbone(str(tmp_path), tiny.shared_encoder())


def test_a_batch_that_is_not_unpacked_is_said():
    model = tiny.model("gpt2")
    with pytest.raises(DataError, match=r"pass a processor's batch as \*\*batch"):
        model.generate(model.tokenizer("the sea", return_tensors="pt"), persona=tiny.HISTORY)
