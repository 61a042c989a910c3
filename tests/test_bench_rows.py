"""What every row of a bench shows the backbone, against the slow way."""

from dataclasses import replace

import pytest
import reference
import torch
from bench_data import SHELVES, make_world, save_plug

from pplug_hf import PPlugProcessor
from pplug_hf.data.histories import newest
from pplug_hf.data.lamp import Example, read_lamp
from pplug_hf.data.vectors import VectorStore
from pplug_hf.errors import DataError
from pplug_hf.evaluation.runner import Runner
from pplug_hf.methods.base import Retrieval
from pplug_hf.methods.decoding import nearest_histories, shuffle_histories
from pplug_hf.methods.names import method_of
from pplug_hf.methods.persona import Plug
from pplug_hf.methods.resources import Decoding, Resources


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    return make_world(places, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module", params=["plug0", "frozen", "mean", "gpt2"])
def asked(request, world):
    """Resources with one plug, the plug, the examples."""
    _, examples = read_lamp(world / "shelves", "dev", SHELVES)
    place = str(world / request.param)
    made = Resources(SHELVES, {"pplug": [place]}, vectors=str(world / "vectors"), seed=3)
    return made, made.plug(place), examples


def shown(asked, name):
    made, _, examples = asked
    (place,) = made.plugs["pplug"]
    return method_of(name, {"pplug": [place], "instruction-only": [place]}).inputs(examples, made)


def vectors_of(model, history):
    texts = [f"{item['tag']} {item['text']}" for item in history]
    return torch.stack([torch.tensor(model.history_encoder.encode(text)) for text in texts]) if texts else None


def expect_personas(asked, inputs, histories):
    _, model, _ = asked
    assert len(inputs.personas) == len(histories)
    for persona, history in zip(inputs.personas, histories, strict=True):
        assert len(persona) == len(history)
        if history:
            reference.close(persona.vectors, vectors_of(model, history))


def test_without_a_persona_there_is_the_input_alone(asked):
    for name in ("no-persona", "pplug:no-history", "instruction-only"):
        assert shown(asked, name)[:4] == ([e.prompt for e in asked[2]], None, None, None)


def test_a_plug_sees_the_whole_history_and_the_request(asked):
    _, model, examples = asked
    inputs = shown(asked, "pplug")
    expect_personas(asked, inputs, [e.history for e in examples])
    texts = [e.prompt.split("book: ")[1] for e in examples]
    if model.config.aggregator == "mean":
        assert inputs.queries is None
    elif model.plug.input_encoder is None:
        expected = torch.stack([torch.tensor(model.history_encoder.encode(text)) for text in texts])
        reference.close(inputs.queries, expected)
    else:
        assert inputs.queries == texts


def test_another_users_history(asked):
    made, _, examples = asked
    others = shuffle_histories(examples, made.seed)
    expect_personas(asked, shown(asked, "pplug:wrong-user"), [examples[other].history for other in others])
    assert all(examples[other].user != e.user for other, e in zip(others, examples, strict=True))


def test_the_most_similar_history_of_another_user(asked):
    """Against a loop over all pairs of examples."""
    made, model, examples = asked
    means = [vectors_of(model, e.history).double().mean(dim=0) if e.history else None for e in examples]
    expected = []
    for mean, e in zip(means, examples, strict=True):
        best, nearest = None, None
        for other, donor in sorted(zip(means, examples, strict=True), key=lambda pair: (pair[1].user, pair[1].id)):
            if donor.user == e.user or other is None:
                continue
            cosine = 0 if mean is None else torch.cosine_similarity(mean, other, dim=0).item()
            if best is None or cosine > best + 1e-9:
                best, nearest = cosine, donor
        expected.append(nearest.history)
    expect_personas(asked, shown(asked, "pplug:nearest-user"), expected)
    if model.config.aggregator != "mean":
        assert expected != [examples[i].history for i in shuffle_histories(examples, made.seed)]


def test_the_nearest_history_does_not_depend_on_the_order_and_is_never_ones_own(asked):
    _, _, examples = asked
    personas = shown(asked, "pplug").personas
    chosen = nearest_histories(examples, personas)
    assert all(
        examples[donor].user != e.user and examples[donor].history for donor, e in zip(chosen, examples, strict=True)
    )
    backwards = nearest_histories(examples[::-1], personas[::-1])
    assert [len(examples) - 1 - donor for donor in backwards[::-1]] == chosen
    lonely = [replace(e, user="me") for e in examples]
    with pytest.raises(DataError, match="nearest-user ablation needs at least 2 users, and these examples have 1"):
        nearest_histories(lonely, personas)
    made, _, _ = asked
    with pytest.raises(DataError, match="nearest-user ablation needs"):
        Plug("pplug", made.plugs["pplug"][0], history="nearest-user").check(lonely, made)
    empty = [replace(e, user=f"{i}", history=[]) for i, e in enumerate(examples[:2])]
    assert nearest_histories(empty, [personas[0].select([])] * 2) == [1, 0]


def test_the_top_items_by_weight(asked):
    _, model, examples = asked
    histories = []
    for e in examples:
        if len(e.history) <= 3:
            histories.append(e.history)
            continue
        texts = [f"{item['tag']} {item['text']}" for item in e.history]
        query, items = reference.read(model, texts, e.query)
        if model.config.aggregator == "mean":
            query = torch.tensor(model.history_encoder.encode(e.query)).double()
            scores = [torch.dot(query, item).item() for item in items]
        else:
            scores = reference.weights(model.plug, query, items)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:3]
        histories.append([e.history[i] for i in sorted(best)])
    expect_personas(asked, shown(asked, "pplug:top-3"), histories)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_the_newest_items(asked, most):
    histories = [sorted(e.history, key=lambda item: item["date"])[-most:] for e in asked[2]]
    expect_personas(asked, shown(asked, f"pplug:last-{most}"), histories)


def by_okapi(example, k):
    """The benchmark's retrieval; of equals the newer first."""
    documents = [item["text"].split() for item in example.history]
    if not documents:
        return []
    scores = reference.okapi(documents, example.query.split())
    return [example.history[i] for i in sorted(range(len(scores)), key=lambda i: (-scores[i], -i))[:k]]


@pytest.mark.parametrize("k", [1, 2, 50])
def test_retrieved_items_stand_in_front_of_the_input(asked, k):
    _, _, examples = asked
    expected = []
    for e in examples:
        items = [f"{item['text']} in {item['tag']}" for item in by_okapi(e, k)]
        expected.append(", and ".join(items) + " and " + e.prompt if items else e.prompt)
    made = asked[0]
    made.decoding = Decoding(max_length=2000)
    try:
        for name in (f"bm25@{k}", f"pplug+bm25@{k}", f"pplug+bm25@{k}:paper-order"):
            inputs = shown(asked, name)
            assert inputs.prompts == expected
            found = sum(min(k, len(e.history)) for e in examples)
            assert inputs.counts == {"retrieved_items": found, "shown_items": found, "prompts_without_items": 2}
            if name.startswith("pplug"):
                expect_personas(asked, inputs, [e.history for e in examples])
                assert (inputs.positions is not None) == name.endswith("paper-order")
    finally:
        made.decoding = Decoding()
    if not asked[1].config.is_encoder_decoder:
        return
    own = [len(e.prompt.split()) for e in examples]
    total = [len(prompt.split()) for prompt in expected]
    assert inputs.positions.tolist() == [t - o for t, o in zip(total, own, strict=True)]


def test_dense_retrieval_uses_the_plugs_vectors(asked, world):
    _, model, examples = asked
    found = Retrieval("dense", 2).items(examples, asked[0])
    for e, items in zip(examples, found, strict=True):
        if e.history:
            scores = vectors_of(model, e.history) @ torch.tensor(model.history_encoder.encode(e.query))
            best = scores.argsort(descending=True)[:2].tolist()
            assert [item["id"] for item in items] == [e.history[i]["id"] for i in best]
    shown(asked, "pplug")
    stores = [made for made, _ in asked[0]._made.values() if isinstance(made, VectorStore) and made.prompt == ""]
    assert len(stores) == 1  # personas and retrieval share it
    assert len(asked[0]._encoders) <= 2 and len({id(e) for e in asked[0]._encoders.values()}) == 1


def test_random_items_are_the_seeds(asked, world):
    made, _, examples = asked
    other = Resources(SHELVES, made.plugs, seed=4, vectors=made.vectors)
    one, four = Retrieval("random", 1), Retrieval("random", 4)
    assert four.items(examples, made) != four.items(examples, other)
    assert [items[:1] for items in four.items(examples, made)] == one.items(examples, made)


def test_answers_are_those_of_generate(asked):
    made, model, examples = asked
    processor = PPlugProcessor.from_model(model)
    for name in ("no-persona", "pplug:wrong-user", "pplug+bm25@1:paper-order"):
        method = method_of(name, made.plugs)
        (done,) = Runner(made, examples).run({name: [method]})
        inputs = shown(asked, name)
        generate = model.generate if isinstance(method, Plug) else model.backbone.generate
        for i, text in enumerate(done.answers.values()):
            batch = dict(processor(text=[inputs.prompts[i]], max_length=256))
            if isinstance(method, Plug):
                batch |= {"persona": [inputs.personas[i]]}
                batch |= {"query": inputs.queries[i : i + 1]} if inputs.queries is not None else {}
                batch |= {"persona_position": inputs.positions[i : i + 1]} if inputs.positions is not None else {}
            generated = generate(**batch, max_new_tokens=SHELVES.max_new_tokens, do_sample=False)
            assert processor.decode_answers(generated, batch["input_ids"].shape[1]) == [text]


def test_a_history_cut_to_its_newest_items():
    items = [{"text": t, "tag": "sea", "date": d} for t, d in (("b", "2002"), ("a", "2001"), ("c", "2003"))]
    example = Example("1", "u", "p", "q", "sea", items)
    assert [i["text"] for i in newest([example], 2)[0].history] == ["b", "c"]
    assert newest([example], 3)[0] is example and len(example.history) == 3


def test_rows_of_a_plug_behind_the_prompt_read_each_prompt_once(places, world, tmp_path):
    plug = save_plug(places, tmp_path / "late", 0, "gpt2", placement="answer", item_template="{tag} {text}")
    _, examples = read_lamp(world / "shelves", "dev", SHELVES)
    resources = Resources(SHELVES, {"late": [plug]}, vectors=str(tmp_path / "vectors"))
    read, answers = [], {}
    for name in ("late", "late:wrong-user", "late:no-history"):
        answers[name] = method_of(name, {"late": [plug]}).answer(examples, resources).texts
        read.append(resources.prompts.computed)
    assert read[0] > 0 and read[1:] == read[:1] * 2
    resources.plug(plug).prompt_cache = None
    for name, texts in answers.items():
        assert method_of(name, {"late": [plug]}).answer(examples, resources).texts == texts
