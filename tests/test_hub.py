"""A plug on the Hub and back, with the real client against a stand-in (hub_server.py), over the loopback alone."""

import ast
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import tiny
import transformers
from hub_client import Client, Refused
from hub_server import File, Hub
from huggingface_hub import ModelCard

TOKEN, READ, OTHER = "hf_AAAAsecretAAAA", "hf_BBBBsecret_read", "hf_CCCCsecretCCCC"

MAKE = """
import tiny
model = tiny.from_backbone("me/gpt2", "me/encoder")
tiny.randomise(model.plug)
"""
ANSWER = """
ids = torch.tensor([[9, 10, 11]])
result = model.generate(ids, persona=tiny.HISTORY, query="the sea", max_new_tokens=8).tolist()
result += model.soft_prompt(tiny.HISTORIES, tiny.PROMPTS).tolist()
"""


@pytest.fixture(scope="module")
def hub(places):
    """With a private backbone and a private encoder, of which the plug's versions are not the newest any more."""
    with Hub({TOKEN: "me", READ: "me", OTHER: "you"}) as server:
        server.part_size, server.places = 4096, places
        for part in ("gpt2", "encoder"):
            server.repo(f"me/{part}", private=True).add(places / part)
        yield server


@pytest.fixture(scope="module")
def me(hub, tmp_path_factory):
    """A process of the owner, logged in."""
    folder = tmp_path_factory.mktemp("me")
    with Client(hub.environment(TOKEN, folder / "home"), folder / "log") as client:
        yield client


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """A fresh process with an empty cache and no token."""
    folder = tmp_path_factory.mktemp("stranger")
    with Client(hub.environment(None, folder / "home"), folder / "log") as client:
        yield client


@pytest.fixture(scope="module")
def pushed(hub, me, tmp_path_factory):
    """The plug "me/plug", private. Returns its answers and the commits of backbone and encoder."""
    me(MAKE)
    url = me('result = str(model.push_to_hub("me/plug", private=True, commit_message="first"))')
    answers, commits = me(ANSWER), {part: hub.repos[f"me/{part}"].refs["main"] for part in ("gpt2", "encoder")}
    moved = tmp_path_factory.mktemp("moved")
    tiny.backbone("gpt2", seed=1).save_pretrained(moved / "gpt2")
    tiny.encoder(seed=1).save(str(moved / "encoder"))
    for part in commits:
        hub.repos[f"me/{part}"].add(moved / part)
    assert url.startswith(f"{hub.endpoint}/me/plug/")
    return answers, commits


@pytest.fixture
def requests(hub):
    """What is asked for from now on, as "METHOD path"."""
    hub.requests.clear()
    yield lambda: [f"{method} {path}" for method, path, _ in hub.requests]
    hub.faults.clear()


def tiny_folder(hub, family):
    """A backbone with its tokenizer, as a folder."""
    return hub.places / family


def refused(client, code, **given):
    with pytest.raises(Refused) as error:
        client(code, **given)
    return str(error.value), error.value.kinds


LOAD = "model = PPlugModel.from_pretrained(name, **given)"


def load(client, name="me/plug", **given):
    return client(LOAD, name=name, given=given)


# ---- there and back ---------------------------------------------------------------------------------------------


def test_what_is_pushed(hub, pushed):
    _, commits = pushed
    repo = hub.repos["me/plug"]
    files = repo.files()
    assert repo.private and set(files) == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "modeling_pplug.py"),
    }
    assert files["model.safetensors"].is_large
    config = json.loads(files["config.json"].data)
    assert (config["backbone"], config["backbone_revision"]) == ("me/gpt2", commits["gpt2"])
    assert (config["encoder"], config["encoder_revision"]) == ("me/encoder", commits["encoder"])
    assert repo.messages[repo.refs["main"]] == ("first", "")
    assert len(repo.commits) == 2  # the empty repository, and everything


def test_a_fresh_process_gives_the_same_answers_bit_for_bit(hub, pushed, stranger):
    """From the commits that were recorded: the branches have moved on. Everything is asked for with the call's token."""
    answers, commits = pushed
    message, kinds = refused(stranger, LOAD, name="me/plug", given={})
    assert "no such repository, or a private one" in message and "hf auth login" in message
    assert {"MissingFileError", "FileNotFoundError"} <= set(kinds)
    load(stranger, token=TOKEN)
    assert stranger(ANSWER) == answers
    sources = "from pplug_hf.modeling import backbone, encoders; result = [backbone.origin(model.backbone)]"
    found = stranger(sources + "; result.append(encoders.origin(model.history_encoder))")
    assert found == [["me/gpt2", commits["gpt2"]], ["me/encoder", commits["encoder"]]]
    stranger("processor = PPlugProcessor.from_pretrained('me/plug', token=token)", token=TOKEN)
    stranger("alone = Personalizer.from_pretrained('me/plug', token=token)", token=TOKEN)
    stranger("a = {'token': token}", token=TOKEN)
    stranger("fresh = tiny.from_backbone('me/gpt2', 'me/encoder', backbone_kwargs=a, encoder_kwargs=a)")
    assert stranger("result = fresh.tokenizer is not None")
    assert stranger("result = fresh.config.backbone_revision") == hub.repos["me/gpt2"].refs["main"]
    assert stranger("result = fresh.config.encoder_revision") == hub.repos["me/encoder"].refs["main"]


def test_the_auto_classes_and_the_pipeline_load_it_too(hub, pushed, stranger, requests):
    """With the call's token for backbone and encoder; the code that is there for others is not even asked for."""
    answers, _ = pushed
    stranger("from transformers import AutoModelForCausalLM, AutoProcessor, pipeline")
    stranger("model = AutoModelForCausalLM.from_pretrained('me/plug', token=token)", token=TOKEN)
    assert stranger(ANSWER) == answers
    stranger("processor = AutoProcessor.from_pretrained('me/plug', token=token)", token=TOKEN)
    assert stranger("result = type(processor).__name__") == "PPlugProcessor"
    stranger("pipe = pipeline('personalized-text-generation', model='me/plug', token=token)", token=TOKEN)
    text = stranger("result = pipe('the sea', persona=tiny.HISTORY, query='the sea', max_new_tokens=8)")
    assert text[0]["generated_text"].startswith("the sea") and len(text[0]["generated_text"]) > len("the sea")
    assert requests() and not [line for line in requests() if ".py" in line]


def test_the_commit_of_what_the_user_loaded(hub, pushed, me):
    """transformers does not say it any more; the cache does while it holds one commit only."""
    hub.repo("me/bart", private=True).add(tiny_folder(hub, "bart"))
    load_it = "from transformers import AutoModelForSeq2SeqLM as M; bart = M.from_pretrained('me/bart')"
    make = "result = tiny.from_backbone(bart, 'me/encoder').config.backbone_revision"
    me(load_it)
    first = hub.repos["me/bart"].refs["main"]
    assert me(make) == first
    hub.repos["me/bart"].commit("main", {**hub.repos["me/bart"].files(), "notes.txt": File(b"", False)})
    me(load_it)
    assert me(make) is None  # it may be either
    me("odd = tiny.from_backbone(bart, 'me/encoder')")
    me("odd.push_to_hub('me/odd')")  # the repository as it is now, with a warning
    config = json.loads(hub.repos["me/odd"].files()["config.json"].data)
    assert (config["backbone"], config["backbone_revision"]) == ("me/bart", hub.repos["me/bart"].refs["main"])
    me("odd.config.backbone = 'me/nowhere'; odd.push_to_hub('me/odd')")
    config = json.loads(hub.repos["me/odd"].files()["config.json"].data)
    assert config["backbone"] is None
    assert me.log.read_text().count("commit of the backbone") == 2


def test_a_gguf_file_of_a_repository(hub, pushed, me, stranger, tmp_path):
    """Its name, path and commit are recorded, and nothing else of the repository is fetched."""
    pytest.importorskip("gguf")
    (tmp_path / "q8").mkdir()
    tiny.gguf(tmp_path / "q8" / "tiny.gguf")
    repo = hub.repo("me/files", private=True)
    commit = repo.add(tmp_path)
    make = "model = tiny.from_backbone('me/files', 'me/encoder', backbone_kwargs=given)"
    me(make, given={"gguf_file": "q8/tiny.gguf"})
    me("tiny.randomise(model.plug); model.push_to_hub('me/gguf-plug', private=True)")
    answers, files = me(ANSWER), hub.repos["me/gguf-plug"].files()
    config = json.loads(files["config.json"].data)
    assert (config["backbone"], config["backbone_revision"]) == ("me/files/q8/tiny.gguf", commit)
    assert ModelCard(files["README.md"].data.decode()).data.base_model == "me/files"
    tiny.gguf(tmp_path / "q8" / "tiny.gguf", seed=1)
    repo.add(tmp_path)
    load(stranger, "me/gguf-plug", token=TOKEN)
    assert stranger(ANSWER) == answers
    load(stranger, "me/gguf-plug", local_files_only=True)
    assert stranger(ANSWER) == answers
    text, kinds = refused(me, make, given={"gguf_file": "q4.gguf"})
    assert "Cannot load q4.gguf of the backbone" in text and "MissingFileError" in kinds
    for name in ("me/files/../../q8/tiny.gguf", "/etc/tiny.gguf"):
        hostile = {**files, "config.json": File(json.dumps(config | {"backbone": name}).encode(), False)}
        hub.repos["me/gguf-plug"].commit("main", hostile)
        _, kinds = refused(me, LOAD, name="me/gguf-plug", given={})
        assert "ConfigurationError" in kinds


def test_a_backbone_in_a_folder_of_a_repository(hub, pushed, me, stranger, tmp_path):
    """Its place is recorded and found again, whatever the root of the repository holds."""
    shutil.copytree(hub.places / "gpt2", tmp_path / "inner")
    tiny.backbone("gpt2", seed=1).save_pretrained(tmp_path)
    commit = hub.repo("me/nested", private=True).add(tmp_path)
    me("model = tiny.from_backbone('me/nested', 'me/encoder', backbone_kwargs={'subfolder': 'inner'})")
    me("tiny.randomise(model.plug); model.push_to_hub('me/inner-plug', private=True)")
    answers, files = me(ANSWER), hub.repos["me/inner-plug"].files()
    config = json.loads(files["config.json"].data)
    assert (config["backbone"], config["backbone_revision"]) == ("me/nested/inner", commit)
    assert ModelCard(files["README.md"].data.decode()).data.base_model == "me/nested"
    for given in ({"token": TOKEN}, {"local_files_only": True}):
        load(stranger, "me/inner-plug", **given)
        assert stranger(ANSWER) == answers
    assert stranger("result = model.tokenizer is not None")


def test_a_download_that_was_cut_off_is_no_plug_offline(hub, pushed, me, requests, tmp_path):
    """Not even if the weights are there: what would be missing then changes answers without a word."""
    hub.fail("GET", "plug/resolve/.*/(generation_config|tokenizer_config).json", status=500)
    refused(me, LOAD, name="me/plug", given={"cache_dir": str(tmp_path)})
    hub.faults.clear()
    given = {"cache_dir": str(tmp_path), "local_files_only": True}
    text, kinds = refused(me, LOAD, name="me/plug", given=given)
    assert "model.safetensors" in text and "no such file in the cache" in text and "FileNotFoundError" in kinds


def test_a_persona_and_a_save_that_is_pushed(hub, pushed, me, tmp_path):
    load(me)
    me(
        "model.save_pretrained(folder, push_to_hub=True, repo_id='me/saved', private=True)",
        folder=str(tmp_path / "plug"),
    )
    assert hub.repos["me/saved"].private and "model.safetensors" in hub.repos["me/saved"].files()
    me(
        "persona = model.encode_persona(tiny.HISTORY); persona.save_pretrained(folder)",
        folder=str(tmp_path / "persona"),
    )
    hub.repo("me/persona", private=True).add(tmp_path / "persona")
    for given in ({}, {"local_files_only": True}):
        me("again = Persona.from_pretrained('me/persona', **given)", given=given)
        assert me("result = torch.equal(again.vectors, persona.vectors)")


def test_all_files_of_a_load_come_from_one_commit(hub, pushed, requests, tmp_path, me):
    """While the branch moves during the load: after the commit is known, nothing is asked of the branch any more."""
    load(me, cache_dir=str(tmp_path))
    asked = [line for line in requests() if "me/plug" in line]
    assert asked[0].startswith("GET /api/models/me/plug")
    head = hub.repos["me/plug"].refs["main"]
    for line in asked[1:]:
        assert re.search(rf"/(resolve|tree)/{head}", line), line
    assert me(ANSWER) == pushed[0]


def test_from_the_cache_alone(hub, pushed, requests, tmp_path, me):
    load(me, cache_dir=str(tmp_path))
    assert requests()
    hub.requests.clear()
    load(me, cache_dir=str(tmp_path), local_files_only=True)
    assert me(ANSWER) == pushed[0] and not requests()
    processor = "processor = PPlugProcessor.from_pretrained('me/plug', cache_dir=cache, local_files_only=True)"
    me(processor, cache=str(tmp_path))
    assert not requests()
    snapshot = tmp_path / "models--me--plug" / "snapshots" / hub.repos["me/plug"].refs["main"]
    assert (snapshot / "config.json").is_symlink()
    load(me, str(snapshot))  # a folder of links into the cache
    assert me(ANSWER) == pushed[0]
    message, kinds = refused(me, LOAD, name="me/plug", given={"cache_dir": "/nowhere", "local_files_only": True})
    assert "neither the cache nor the Hub answered" in message and "FileNotFoundError" in kinds


def test_when_the_hub_is_down_the_cache_serves(hub, pushed, requests, me):
    load(me)
    for method in ("GET", "HEAD", "POST"):
        hub.fail(method, "", status=503)
    load(me)
    assert me(ANSWER) == pushed[0]
    hub.faults.clear()
    hub.fail("GET", "^/api/models/me/plug", status=403)  # access was withdrawn: as of any file in the cache
    load(me)
    assert me(ANSWER) == pushed[0]
    offline = "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = {}"
    hub.requests.clear()
    me(offline.format(True))
    try:
        load(me)
        assert me(ANSWER) == pushed[0] and not requests()
    finally:
        me(offline.format(False))


def test_a_second_load_asks_for_no_file(hub, pushed, requests, me):
    load(me)
    hub.requests.clear()
    load(me)
    assert not [line for line in requests() if line.startswith("GET") and "/resolve/" in line]
    assert not [line for line in requests() if "/me/gpt2" in line]  # nothing at all of what is at a known commit


def test_force_download_reaches_every_part(hub, pushed, requests, me):
    load(me)
    hub.requests.clear()
    load(me, force_download=True)
    fetched = [line.split("/large/")[-1] for line in requests() if line.startswith("GET") and "/large/" in line]
    weights = {
        name: hub.repos[f"me/{name}"].files(commit)["model.safetensors"].oid
        for name, commit in {**pushed[1], "plug": hub.repos["me/plug"].refs["main"]}.items()
    }
    assert sorted(fetched) == sorted(weights.values())  # once each
    message, kinds = refused(me, LOAD, name="me/plug", given={"force_download": True, "local_files_only": True})
    assert "contradict each other" in message and "ConfigurationError" in kinds


# ---- branches, pull requests, folders ---------------------------------------------------------------------------


def test_branch_pull_request_subfolder_tag_and_commit(hub, pushed, me, requests):
    repo = hub.repos["me/plug"]
    first = repo.refs["main"]
    me("model = PPlugModel.from_pretrained('me/plug')")
    me("with torch.no_grad(): model.plug.instruction += 1")
    changed = me(ANSWER)
    assert changed != pushed[0]
    me("model.push_to_hub('me/plug', revision='two', commit_message='m', commit_description='more')")
    assert repo.refs["main"] == first and repo.messages[repo.refs["two"]] == ("m", "more")
    me("model.push_to_hub('me/plug', revision='two')")  # nothing has changed: no second commit
    url = me("result = model.push_to_hub('me/plug', create_pr=True).pr_url")
    assert url == f"{hub.endpoint}/me/plug/discussions/1" and repo.refs["main"] == first
    me("model.push_to_hub('me/plug', subfolder='tasks/two')")
    assert {"model.safetensors", "tasks/two/model.safetensors", "tasks/two/README.md"} <= set(repo.files())
    repo.refs["v1"] = first
    for given, expected in (
        ({}, pushed[0]),
        ({"revision": "v1"}, pushed[0]),
        ({"revision": first}, pushed[0]),
        ({"revision": "two"}, changed),
        ({"revision": "refs/pr/1"}, changed),
        ({"subfolder": "tasks/two"}, changed),
    ):
        load(me, **given)
        assert me(ANSWER) == expected, given
        me("processor = PPlugProcessor.from_pretrained('me/plug', **given)")
    for given, message in (
        ({"revision": "three"}, "no such branch, tag or commit. Check revision="),
        ({"subfolder": "three"}, "no such file in its repository"),
        ({"revision": "two", "subfolder": "tasks/two"}, "no such file in its repository"),
    ):
        text, kinds = refused(me, LOAD, name="me/plug", given=given)
        assert message in text and "FileNotFoundError" in kinds
    for subfolder in ("..", "tasks/../..", "/etc"):
        text, kinds = refused(me, LOAD, name="me/plug", given={"subfolder": subfolder})
        assert "subfolder must lie inside the plug" in text


def test_what_the_plug_before_had_and_this_one_lacks_goes(hub, pushed, me):
    repo = hub.repo("me/changed", private=True)
    others = {"chat_template.jinja": b"old", "vocab.txt": b"old", "notes.md": b"mine", "sub/vocab.txt": b"mine"}
    repo.commit("main", {**repo.files(), **{name: File(data, False) for name, data in others.items()}})
    load(me)
    me("model.push_to_hub('me/changed')")
    assert set(others) & set(repo.files()) == {"notes.md", "sub/vocab.txt"}
    assert len(repo.commits) == 3


# ---- tokenizers of every kind -----------------------------------------------------------------------------------

PUSH = "from pplug_hf.hub.push import push_folder; push_folder(folder, name)"


def vocabularies_of_transformers():
    """Return the names of the files that its tokenizers say they are made of; their modules may need other packages."""
    names = set()
    for path in Path(transformers.__file__).parent.glob("**/tokenization_*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assign)]
        constants = {
            target.id: node.value.value
            for node in nodes
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant)
        }
        for node in nodes:
            said = {target.id.lower() for target in node.targets if isinstance(target, ast.Name)}
            if "vocab_files_names" in said and isinstance(node.value, ast.Dict):
                names |= {constants[v.id] if isinstance(v, ast.Name) else v.value for v in node.value.values}
    return names


def test_the_vocabularies_of_all_tokenizers_are_pushed(hub, pushed, me, tmp_path):
    names = vocabularies_of_transformers()
    assert {"tokenizer.json", "spiece.model", "source.spm", "emoji.json"} <= names
    load(me)
    me("model.save_pretrained(folder)", folder=str(tmp_path))
    for name in names - {"tokenizer_config.json"}:
        (tmp_path / name).write_text("{}")
    me(PUSH, folder=str(tmp_path), name="me/vocabularies")
    assert names <= set(hub.repos["me/vocabularies"].files())


def test_a_tokenizer_whose_vocabulary_has_a_name_of_its_own(hub, pushed, me, tmp_path):
    load(me)
    words = ["[PAD]", "[UNK]", "[SEP]", "[X_SEP]", "[CLS]", "[MASK]", *tiny.WORDS]
    (tmp_path / "words").write_text("\n".join(words))
    ids = "result = model.tokenizer('a dark film')['input_ids']"
    make = "from transformers import ProphetNetTokenizer; model.tokenizer = ProphetNetTokenizer(path)"
    me(make, path=str(tmp_path / "words"))
    expected = me(ids)
    me("model.push_to_hub('me/words')")
    load(me, "me/words")
    assert me(ids) == expected and len(set(expected)) == 4


def test_a_tokenizer_of_several_chat_templates(hub, pushed, me, tmp_path):
    templates = {"default": "a{{ messages[0].content }}", "tools": "b{{ messages[0].content }}"}
    load(me)
    me(
        "model.tokenizer.chat_template = templates; model.save_pretrained(folder)",
        templates=templates,
        folder=str(tmp_path),
    )
    me("model.tokenizer.save_pretrained(folder)")  # in transformers' form, as older plugs have it
    assert (tmp_path / "additional_chat_templates").is_dir()
    me(PUSH, folder=str(tmp_path), name="me/templates")
    for name in (str(tmp_path), "me/templates"):
        load(me, name)
        assert me("result = model.tokenizer.chat_template") == templates
        assert me("result = PPlugProcessor.from_pretrained(name).chat_template", name=name) == templates
    me("model.tokenizer.chat_template = None; model.save_pretrained(folder)")
    assert not list(tmp_path.glob("*chat_template*"))


# ---- what may not be told ---------------------------------------------------------------------------------------


def test_nothing_of_this_machine_is_pushed(hub, me, places, tmp_path):
    make = "model = tiny.from_backbone(*parts); tiny.randomise(model.plug)"
    me(make, parts=[str(places / "llama"), str(places / "encoder")])
    answers = me(ANSWER)
    me("model.save_pretrained(folder)", folder=str(tmp_path / "plug"))
    load(me, str(tmp_path / "plug"))  # on disk it knows where its parts are
    assert me(ANSWER) == answers
    (tmp_path / "plug" / "training_args.json").write_text(json.dumps({"output_dir": str(tmp_path), "seed": 3}))
    recorded = {"task": "demo", "settings": {"seed": 3, "data": str(tmp_path)}, "defaults": {"seed": 0}}
    (tmp_path / "plug" / "train_settings.json").write_text(json.dumps(recorded))
    (tmp_path / "plug" / "predictions.json").write_text("what a user wrote")
    config = json.loads((tmp_path / "plug" / "tokenizer_config.json").read_text())
    config |= {"name_or_path": str(places), "tokenizer_file": str(places), "local_files_only": True}
    (tmp_path / "plug" / "tokenizer_config.json").write_text(json.dumps(config))
    push = "from pplug_hf.hub.push import push_folder; push_folder(folder, 'me/local')"
    me(push, folder=str(tmp_path / "plug"))
    files = hub.repos["me/local"].files()
    assert not {"training_args.json", "train_settings.json", "predictions.json"} & set(files)
    assert "| `seed` | 3 | 0 |" in files["README.md"].data.decode()
    for name, file in files.items():
        for secret in (str(places), str(tmp_path), "local_files_only", TOKEN, "/tmp"):
            assert secret.encode() not in file.data, f"{name} holds {secret}"
    pushed = json.loads(files["config.json"].data)
    assert pushed["backbone"] is pushed["encoder"] is None
    text, kinds = refused(me, LOAD, name="me/local", given={})
    assert "pass backbone=" in text and "model_type=llama" in text and "ConfigurationError" in kinds
    given = {"backbone": str(places / "llama")}
    text, _ = refused(me, LOAD, name="me/local", given=given)
    assert "pass encoder=" in text and pushed["encoder_fingerprint"]["digest"] in text
    load(me, "me/local", **given, encoder=str(places / "encoder"))
    assert me(ANSWER) == answers


@pytest.mark.parametrize("name", ["/etc", "../elsewhere", "~/model", "./a/b/c"])
def test_a_repository_cannot_name_a_folder_of_this_machine(hub, pushed, me, name):
    repo = hub.repo("me/hostile", private=True)
    files = hub.repos["me/plug"].files()
    config = json.loads(files["config.json"].data) | {"backbone": name}
    repo.commit("main", {**files, "config.json": File(json.dumps(config).encode(), False)})
    text, kinds = refused(me, LOAD, name="me/hostile", given={})
    assert "comes from the Hub and says that its backbone is" in text and "ConfigurationError" in kinds


def test_the_token_is_told_to_nobody(hub, pushed, me, stranger, tmp_path):
    """Neither in what is printed, with all errors and their causes, nor by the objects, nor to another host."""
    refused(stranger, LOAD, name="me/none", given={"token": TOKEN})
    refused(stranger, "model.push_to_hub('you/plug', token=token)", token=TOKEN)
    text = stranger(
        "from pplug_hf.storage.location import Location; result = repr(Location('me/plug', token=token))", token=TOKEN
    )
    stranger("model.save_pretrained(folder)", folder=str(tmp_path / "plug"))
    texts = [text, me.log.read_text(), stranger.log.read_text()]
    texts += [path.read_text() for path in (tmp_path / "plug").glob("*.json")]
    assert not any(TOKEN in text for text in texts)
    assert any(token == TOKEN for _, _, token in hub.authorised)
    downloads = [token for method, path, token in hub.authorised if method == "GET" and path.startswith("/large/")]
    assert downloads and not any(downloads)


# ---- the card ---------------------------------------------------------------------------------------------------


def test_a_card_edited_on_the_hub_survives(hub, pushed, me):
    repo = hub.repos["me/plug"]
    files = repo.files()
    mine = files["README.md"].data + b"\n## Mine\n\nWritten by hand.\n"
    repo.commit("main", {**files, "README.md": File(mine, False)})
    load(me)
    me("model.push_to_hub('me/plug', tags=['films'])")
    card = repo.files()["README.md"].data.decode()
    assert "Written by hand." in card and "- films" in card and "pplug" in card


def test_a_failing_card_blocks_no_upload(hub, pushed, me, requests):
    load(me)
    hub.repo("me/cards")
    me("model.push_to_hub('me/cards', results='/no/such/folder')")
    assert "model.safetensors" in hub.repos["me/cards"].files() and "README.md" not in hub.repos["me/cards"].files()
    text, _ = refused(me, "model.push_to_hub('me/cards', datasets='no id')")  # what is known beforehand
    assert "is not a Hub id" in text
    hub.yaml_errors.append("the Hub does not like it")
    try:
        me("with torch.no_grad(): model.plug.instruction += 1")
        me("model.push_to_hub('me/cards')")
    finally:
        hub.yaml_errors.clear()
    assert len(hub.repos["me/cards"].commits) == 3 and "README.md" not in hub.repos["me/cards"].files()
    for fault in ({"status": 404}, {"status": 500}, {"cut": 0, "how": "reset"}):
        hub.fail("POST", "validate-yaml", **fault)
        me("with torch.no_grad(): model.plug.instruction += 1")
        me("model.push_to_hub('me/cards')")
        hub.faults.clear()
    hub.fail("HEAD", "README.md", status=500)  # whoever cannot read the card must not overwrite it
    hub.repos["me/cards"].commit("main", {**hub.repos["me/cards"].files(), "README.md": File(b"mine", False)})
    me("with torch.no_grad(): model.plug.instruction += 1")
    me("model.push_to_hub('me/cards')")
    assert hub.repos["me/cards"].files()["README.md"].data == b"mine"
    assert len(hub.repos["me/cards"].commits) == 8
    log = me.log.read_text()
    assert log.count("pushed without a new card") >= 3 and "the Hub does not like it" in log


# ---- when things break ------------------------------------------------------------------------------------------


def test_large_files_travel_in_parts_and_broken_downloads_resume(hub, pushed, requests, me, tmp_path):
    load(me)
    me("with torch.no_grad(): model.plug.instruction += 7")
    hub.requests.clear()
    hub.fail("PUT", "/large/.*/3", times=1)  # storage fails once
    me("model.push_to_hub('me/large', private=True)")
    uploaded = [line for line in requests() if line.startswith("PUT /large/")]
    size = len(hub.repos["me/large"].files()["model.safetensors"].data)
    assert len(uploaded) == -(-size // hub.part_size) + 1 > 3
    answers = me(ANSWER)
    hub.requests.clear()
    oid = hub.repos["me/large"].files()["model.safetensors"].oid
    hub.fail("GET", f"/large/{oid}", cut=5000, times=1)
    me(
        "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000"
    )  # what is not lost: 10 MB are much
    load(me, "me/large", cache_dir=str(tmp_path))
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path == f"/large/{oid}"]
    assert ranges == ["", "bytes=5000-"] and me(ANSWER) == answers


@pytest.mark.parametrize(
    "name, given, message, kind",
    [
        ("me/plug", {"token": "hf_wrong"}, "does not accept the token (401)", "HubError"),
        ("me/none", {}, "no such repository", "MissingFileError"),
        ("you/hidden", {}, "no such repository, or a private one", "MissingFileError"),
        ("you/gated", {}, "grants access one by one (gated)", "HubError"),
        ("you/empty", {}, "no such file in its repository", "MissingFileError"),
        ("me/gpt2", {}, "is a model of type 'gpt2', not a plug", "ConfigurationError"),
    ],
)
def test_what_cannot_be_loaded(hub, pushed, me, requests, tmp_path, name, given, message, kind):
    hub.repo("you/hidden", private=True), hub.repo("you/gated", gated=True), hub.repo("you/empty")
    text, kinds = refused(me, LOAD, name=name, given={**given, "cache_dir": str(tmp_path)})
    assert message in text and name in text and kind in kinds and "PPlugError" in kinds
    assert kind == "ConfigurationError" or "OSError" in kinds
    assert not [line for line in requests() if "safetensors" in line]


@pytest.mark.parametrize("status, message", [(429, "slow down (429)"), (500, "out of order (500)"), (403, "(403)")])
@pytest.mark.parametrize(
    "method, pattern",
    [
        ("GET", "^/api/models/me/plug"),
        ("GET", "plug/tree"),
        ("HEAD", "plug/resolve/.*/config.json"),
        ("GET", "plug/resolve/.*/tokenizer.json"),
        ("HEAD", "me/gpt2/resolve"),
        ("HEAD", "me/encoder/resolve"),
    ],
)
def test_a_refusal_anywhere_in_a_load(hub, pushed, me, requests, tmp_path, method, pattern, status, message):
    hub.fail(method, pattern, status=status, headers={"Retry-After": "1"})
    text, kinds = refused(me, LOAD, name="me/plug", given={"cache_dir": str(tmp_path)})
    assert message in text and "HubError" in kinds and "OSError" in kinds
    hub.faults.clear()
    load(me, cache_dir=str(tmp_path))  # what is there already is not in the way
    assert me(ANSWER)


# Which the client itself gives up at.
PASSING = [{"status": 503}, {"cut": 900, "how": "reset"}, {"cut": 900, "how": "all"}]


@pytest.mark.parametrize("name", ["me/plug", "me/gpt2", "me/encoder"])
@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_what_passes_is_waited_for(hub, pushed, me, requests, tmp_path, name, fault):
    files = hub.repos[name].commits[pushed[1].get(name[3:], hub.repos[name].refs["main"])]
    hub.fail("GET", f"/large/{files['model.safetensors'].oid}", **fault, times=1)
    me("waits.clear()")
    load(me, cache_dir=str(tmp_path))
    assert 1 in me("result = waits") and not hub.faults[0].times and me(ANSWER) == pushed[0]


def test_a_busy_hub_says_how_long_to_wait(hub, pushed, me, requests, tmp_path):
    hub.fail("GET", "^/api/models/me/plug$", status=429, headers={"Retry-After": "7"}, times=2)
    me("waits.clear()")
    load(me, cache_dir=str(tmp_path / "one"))
    assert me("result = waits") == [7, 7]
    hub.fail("GET", "^/api/models/me/plug$", status=429, headers={"Retry-After": "700"})
    assert "slow down (429)" in refused(me, LOAD, name="me/plug", given={"cache_dir": str(tmp_path / "two")})[0]
    assert me("result = waits") == [7, 7]


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_what_does_not_pass_is_no_missing_file(hub, pushed, me, requests, tmp_path, fault):
    hub.fail("GET", "/large/", **fault)
    text, kinds = refused(me, LOAD, name="me/plug", given={"cache_dir": str(tmp_path)})
    assert "(503)" in text if "status" in fault else "the connection broke" in text
    assert "HubError" in kinds and not list(tmp_path.rglob("*.safetensors"))


def test_a_cache_that_cannot_be_written(hub, pushed, me, tmp_path):
    (tmp_path / "file").write_text("")
    text, kinds = refused(me, LOAD, name="me/plug", given={"cache_dir": str(tmp_path / "file")})
    assert "this machine cannot keep it (Not a directory)" in text and "HubError" in kinds


def test_a_transfer_that_never_succeeds(hub, pushed, me, requests, tmp_path):
    hub.fail("GET", "/large/", cut=0)
    text, kinds = refused(me, LOAD, name="me/plug", given={"cache_dir": str(tmp_path)})
    assert "cannot be reached, or the connection broke" in text and "HubError" in kinds
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "name, token, message",
    [
        ("me/new", "hf_wrong", "does not accept the token (401)"),
        ("me/plug", READ, "the token may not do this (403)"),
        ("you/new", TOKEN, "the token may not do this (403)"),
    ],
)
def test_what_may_not_be_pushed(hub, pushed, me, name, token, message):
    load(me)
    before = hub.repos["me/plug"].refs["main"]
    me("with torch.no_grad(): model.plug.instruction += 1")
    text, kinds = refused(me, "model.push_to_hub(name, token=token)", name=name, token=token)
    assert message in text and "Could not push to" in text and "The repository is unchanged." in text
    assert {"HubError", "OSError"} <= set(kinds) and hub.repos["me/plug"].refs["main"] == before


@pytest.mark.parametrize(
    "method, pattern",
    [("POST", "preupload"), ("POST", "batch"), ("PUT", "large"), ("POST", "commit/"), ("GET", "plug/tree")],
)
@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 500}, {"cut": 0}])
def test_a_push_that_fails_leaves_the_repository_as_it_was(hub, pushed, me, requests, method, pattern, fault):
    load(me)
    before = hub.repos["me/plug"].refs["main"]
    me("with torch.no_grad(): model.plug.instruction += torch.rand(())")
    hub.fail(method, pattern, **fault)
    text, kinds = refused(me, "model.push_to_hub('me/plug')")
    expected = f"({fault['status']})" if "status" in fault else "connection broke"
    assert "Could not push to 'me/plug': " in text and expected in text and {"HubError", "OSError"} <= set(kinds)
    hub.faults.clear()
    assert "cut" in fault or hub.repos["me/plug"].refs["main"] == before


def test_a_push_offline_says_so(hub, pushed, me, requests):
    load(me)
    hub.requests.clear()
    offline = "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = {}"
    me(offline.format(True))
    try:
        text, kinds = refused(me, "model.push_to_hub('me/plug')")
    finally:
        me(offline.format(False))
    assert text == "Could not push to 'me/plug': HF_HUB_OFFLINE is set. The repository is unchanged."
    assert "HubError" in kinds and not requests()


# ---- hostile repositories ---------------------------------------------------------------------------------------


def test_a_huge_configuration_is_not_even_fetched(hub, pushed, me, requests):
    files = hub.repos["me/plug"].files()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        repo = hub.repo("me/huge", private=True)
        repo.commit("main", {**files, name: File(b" " * (11 << 20) + files[name].data, False)})
        hub.requests.clear()
        text, kinds = refused(me, LOAD, name="me/huge", given={})
        assert f"Cannot load {name}" in text and "11 MB" in text and "at most 10 MB" in text and "DataError" in kinds
        assert not [line for line in requests() if line.endswith(name)]


def test_names_that_lead_out_of_the_folder_are_never_asked_for(hub, pushed, me, requests, tmp_path):
    repo = hub.repo("me/names", private=True)
    odd = dict.fromkeys(
        ["../../../escaped.json", "/etc/escaped.json", "..\\escaped.json", "run.py"], File(b"{}", False)
    )
    repo.commit("main", {**hub.repos["me/plug"].files(), **odd})
    hub.requests.clear()
    load(me, "me/names", cache_dir=str(tmp_path))
    assert not [line for line in requests() if "escaped" in line or "run.py" in line]
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("name", ["../../escaped.safetensors", "/etc/passwd"])
def test_shards_of_a_backbone_that_lead_out_of_it(hub, pushed, me, requests, tmp_path, name):
    plug, backbone = hub.repo("me/sharded-plug", private=True), hub.repo("me/sharded", private=True)
    files = {path: file for path, file in hub.repos["me/gpt2"].files().items() if not path.endswith(".safetensors")}
    index = {"metadata": {"total_size": 1}, "weight_map": {"transformer.wte.weight": name}}
    commit = backbone.commit(
        "main", {**files, "model.safetensors.index.json": File(json.dumps(index).encode(), False)}
    )
    files = hub.repos["me/plug"].files()
    config = json.loads(files["config.json"].data) | {"backbone": "me/sharded", "backbone_revision": commit}
    plug.commit("main", {**files, "config.json": File(json.dumps(config).encode(), False)})
    text, kinds = refused(me, LOAD, name="me/sharded-plug", given={"cache_dir": str(tmp_path)})
    # The client says why from some version on; it never opens or writes the file.
    assert "he backbone 'me/sharded'" in text and "PPlugError" in kinds
    assert not [path for path in tmp_path.parent.rglob("*escaped*") if path.is_file()]


# ---- the command line -------------------------------------------------------------------------------------------


def test_the_command(hub, pushed, me, tmp_path):
    load(me)
    me("model.save_pretrained(folder)", folder=str(tmp_path / "plug"))
    run = "from pplug_hf.cli import main; result = main(['push', *arguments])"
    arguments = ["--plug", str(tmp_path / "plug"), "--repo", "me/typed", "--private", "--message", "typed"]
    arguments += ["--datasets", "me/films", "me/books", "--language", "en", "--tags", "films", "--license", "mit"]
    assert me(run, arguments=arguments) == 0
    repo = hub.repos["me/typed"]
    assert repo.private and repo.messages[repo.refs["main"]][0] == "typed"
    told = ModelCard(repo.files()["README.md"].data.decode()).data
    assert told.datasets == ["me/films", "me/books"] and told.language == "en" and told.license == "mit"
    assert told.tags[-1] == "films" and told.tags[0] == "pplug"
    assert f"{hub.endpoint}/me/typed/commit/{repo.refs['main']}" in me.log.read_text()
    for arguments, message in (
        (["--plug", str(tmp_path), "--repo", "me/typed"], "Cannot load config.json of the plug"),
        (["--plug", str(tmp_path / "plug"), "--repo", "you/typed"], "the token may not do this"),
        (["--plug", str(tmp_path / "plug"), "--repo", "not a name"], "repo_id must be 'name' or 'owner/name'"),
    ):
        assert me(run, arguments=arguments) == 1
        assert message in me.log.read_text().splitlines()[-1]


# ---- the last one: its process does not live on ------------------------------------------------------------------


def test_a_process_killed_during_a_push_leaves_the_repository_as_it_was(hub, pushed, me, stranger, requests):
    before = hub.repos["me/plug"].refs["main"]
    load(stranger, token=TOKEN)
    stranger("with torch.no_grad(): model.plug.instruction += 1")
    reached = threading.Event()
    hub.fail("POST", "/commit/", hang=reached)
    stranger.start("model.push_to_hub('me/plug', token=token)", token=TOKEN)
    assert reached.wait(60)
    stranger.process.kill()
    hub.faults.clear()
    assert hub.repos["me/plug"].refs["main"] == before
    load(me)
    assert me(ANSWER)
