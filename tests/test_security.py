"""A plug, its backbone and its encoder may be a stranger's: whatever they hold ends in a clear error, at once, without
running anything, reading anything else or filling the memory. SECURITY.md says which test stands for which threat."""

import json
import os
import re
import resource
import shutil
import struct
import time
from pathlib import Path

import jinja2.exceptions
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from pplug_hf import Persona, PPlugConfig, PPlugForConditionalGeneration, PPlugModel, PPlugProcessor
from pplug_hf.errors import ConfigurationError, DataError, MismatchError, MissingFileError, PPlugError
from pplug_hf.modeling.personalizer import Personalizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GB = 2**30


@pytest.fixture(scope="module")
def saved(places, tmp_path_factory):
    """A good plug on GPT-2. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("security") / "plug"
    tiny.model("gpt2", item_template="{title}: {text}").save_pretrained(folder)
    return folder


@pytest.fixture
def plug(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "plug")


@pytest.fixture(scope="module")
def parts():
    return {"backbone": tiny.backbone("gpt2"), "encoder": tiny.shared_encoder()}


@pytest.fixture
def cheap():
    """What happens within takes little time and memory, whatever the files claim to hold."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert (
        time.monotonic() - start < 30
    )  # seconds on a busy machine; reading a gigabyte of zeros as JSON takes minutes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.fixture
def alarm(tmp_path):
    """A file that appears if a repository's code is run, and the code."""
    marker = tmp_path / "code-was-run"
    yield f"open({str(marker)!r}, 'w').close()\n"
    assert not marker.exists()


class Evil:
    """What a pickle does when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sparse(path, size, start=b""):
    """A file that claims to have `size` bytes and takes no room."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


def from_the_hub(plug, cache):
    """The plug as a download leaves it in the cache."""
    snapshot = cache / "models--nobody--plug" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "models--nobody--plug" / "refs").mkdir()
    (cache / "models--nobody--plug" / "refs" / "main").write_text(COMMIT)
    for path in plug.iterdir():
        shutil.copy(path, snapshot)
    return {"pretrained_model_name_or_path": "nobody/plug", "cache_dir": cache}


# ---- the configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        *("{text.__class__}", "{text.__init__.__globals__}", "{text[0]}", "{}", "{0}", "{0.__class__}", "{text!r}"),
        *("{text:>999999999}", "{text:{width}}", "{text:}x{text!s}", "{", "}", "{text", "{a{b}}", "{a}" * 101, "{ }" * 101),
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_a_template_holds_names_of_fields_and_nothing_else(template, plug, parts, cheap):
    with pytest.raises(ConfigurationError, match=r"item_template is .*Write each field's name in plain braces"):
        PPlugConfig(item_template=template)
    change(plug / "config.json", item_template=template)
    with pytest.raises(ConfigurationError, match="item_template is") as error:
        PPlugModel.from_pretrained(plug, **parts)
    assert len(str(error.value)) < 500


@settings(deadline=None, max_examples=300)
@given(st.text("{}!:.[]a0 ", max_size=12))
def test_whatever_template_is_taken_only_puts_texts_together(template):
    """Compared with replacing names by hand: no attribute is read, no width is filled."""
    try:
        PPlugConfig(item_template=template)
    except ConfigurationError:
        return

    class Item(dict):
        def __missing__(self, key):
            asked.append(key)
            return "<>"

    asked = []
    filled = template.format_map(Item())
    for name in asked:
        template = template.replace(f"{{{name}}}", "\0", 1)
    assert filled == template.replace("{{", "{").replace("}}", "}").replace("\0", "<>")


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**5, '{"hidden_size": ' + "9" * 10**5 + "}", "\ud800", "1e999"]
)
def test_json_that_is_made_to_hurt(text, plug, parts, cheap):
    (plug / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"config.json of .* is damaged"):
        PPlugModel.from_pretrained(plug, **parts)


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"hidden_size": 10**9}, ConfigurationError, "hidden_size must be .* at most"),
        ({"num_persona_tokens": 10**300}, ConfigurationError, "num_persona_tokens must be .* at most"),
        ({"projector_size": 2**20, "num_persona_tokens": 2**20}, DataError, "do not fit its configuration"),
        ({"hidden_size": 2**20}, DataError, "do not fit its configuration"),
        ({"backbone_revision": "../../../../.ssh"}, ConfigurationError, "backbone_revision must be a commit"),
        ({"encoder_revision": "/etc"}, ConfigurationError, "encoder_revision must be a commit"),
        ({"dtype": "hub"}, ConfigurationError, "dtype must be one of"),  # a module of torch by that name would be taken
        ({"backbone_fingerprint": ["t5"]}, ConfigurationError, "backbone_fingerprint must be a mapping"),
        ({"model_type": ["pplug"]}, ConfigurationError, "not a plug"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_made_to_hurt(values, error, message, plug, parts, cheap):
    change(plug / "config.json", **values)
    with pytest.raises(error, match=message):
        PPlugModel.from_pretrained(plug, **parts)


def test_a_configuration_imports_nothing(plug, parts, alarm, monkeypatch):
    (plug / "evil.py").write_text(alarm)
    monkeypatch.syspath_prepend(str(plug))
    evil = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    change(
        plug / "config.json", auto_map=evil, architectures=["evil.Model"], custom_pipelines={"x": {"impl": "evil.P"}}
    )
    change(plug / "tokenizer_config.json", auto_map=evil, processor_class="evil.P")
    (plug / "processor_config.json").write_text(json.dumps({"auto_map": evil, "processor_class": "evil.P"}))
    assert type(PPlugModel.from_pretrained(plug, **parts)) is PPlugForConditionalGeneration
    assert type(PPlugProcessor.from_pretrained(plug)) is PPlugProcessor
    change(plug / "tokenizer_config.json", tokenizer_class="evil.T")
    with pytest.raises(DataError, match=r"tokenizer_config\.json of .*custom code"):
        PPlugModel.from_pretrained(plug, **parts)


@pytest.mark.parametrize("part", ["backbone", "encoder"])
@pytest.mark.parametrize(
    "name",
    [
        "/etc",
        "../../x",
        "./x",
        "~/.ssh",
        "..",
        ".",
        "me/mine/inner",
        "./a/b/c",
        "file:///etc",
        "https://host/x",
        "C:\\x",
        "",
        "mine",
        "me/mine",
        "me/mine/x.gguf",
        "mine/x.gguf",
        "x.gguf",
        "/etc/x.gguf",
    ],
)
def test_a_plug_of_the_hub_names_no_folder_of_this_machine(name, part, plug, parts, tmp_path, monkeypatch):
    """Neither by path nor by the name of a folder that happens to stand where the program was started."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "me" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    change(plug / "config.json", **{part: name})
    hub = from_the_hub(plug, tmp_path / "cache")
    other = {kind: loaded for kind, loaded in parts.items() if kind != part}
    with pytest.raises(
        ConfigurationError, match=rf"comes from the Hub and says that its {part} is .*pass {part}="
    ) as e:
        PPlugModel.from_pretrained(**hub, **other)
    assert repr(name) in str(e.value)
    if part == "encoder":
        with pytest.raises(ConfigurationError, match="comes from the Hub"):
            Personalizer.from_pretrained(**hub)
    assert PPlugModel.from_pretrained(**hub, **parts)  # the user's word counts


def test_keywords_of_the_plug_do_not_reach_into_it(plug, parts):
    """Names of fields are not taken from keyword arguments: they belong to the backbone, and nothing is made of them."""
    with pytest.raises(ConfigurationError, match="hidden_size, num_persona_tokens would say"):
        PPlugModel.from_pretrained(plug, **parts, hidden_size=7, num_persona_tokens=9)
    loaded = PPlugModel.from_pretrained(plug, **parts)
    assert (loaded.config.hidden_size, loaded.config.num_persona_tokens) == (16, 1)


# ---- the weights ------------------------------------------------------------------------------------------------


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def wide(name, shape, dtype="F32", size=4):
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size * torch.Size(shape).numel()]}}


@pytest.mark.parametrize(
    "start, size",
    [
        (struct.pack("<Q", 2**60), 100),
        (struct.pack("<Q", GB), 2 * GB),
        (struct.pack("<Q", 90_000_000), 2 * GB),  # below what safetensors allows
        (header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}), 200),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4 * GB]}}), 200),
        (header({"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}), 200),
        (header({f"tensor{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)}), None),
        (header(wide("plug.instruction", [GB])), 4 * GB + 100),
        (header(wide("plug.instruction", [16], "I32")), None),
    ],
    ids=[
        "header of 2^60",
        "header of 1 GB",
        "header of 90 MB",
        "shapes",
        "offsets",
        "dtype",
        "names",
        "4 GB",
        "integers",
    ],
)
def test_weights_that_are_made_to_hurt(start, size, plug, parts, cheap):
    sparse(plug / "model.safetensors", size or len(start) + 64, start)
    with pytest.raises(DataError, match=r"model\.safetensors of .*damaged|do not fit|not floating-point") as error:
        PPlugModel.from_pretrained(plug, **parts)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "M, error, message",
    [(2**11, MismatchError, r"hidden_size=524288.*hidden_size=16"), (2**17, DataError, "damaged|memory")],
    ids=["4 GB", "256 GB"],
)
def test_sizes_that_agree_with_each_other_but_with_no_backbone(M, error, message, plug, parts, cheap):
    """Configuration and weights of a plug for a backbone with half a million dimensions, gigabytes of nothing."""
    H = 2**19
    shapes = {
        "instruction": [H],
        "no_persona": [1, H],
        "projector.hidden.weight": [M, 12],
        "projector.hidden.bias": [M],
    }
    shapes |= {"projector.output.weight": [H, M], "projector.output.bias": [H]}
    entries, end = {}, 0
    for name, shape in shapes.items():
        stop = end + 4 * torch.Size(shape).numel()
        entries[f"plug.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, stop]}
        end = stop
    start = header(entries)
    sparse(plug / "model.safetensors", len(start) + end, start)
    change(plug / "config.json", hidden_size=H, projector_size=M, train_input_encoder=False)
    with pytest.raises(error, match=message):
        PPlugModel.from_pretrained(plug, **parts)


@pytest.mark.parametrize("fingerprint", [None, {}, {"hidden_size": 16}])
def test_a_plug_without_a_fingerprint_is_still_measured(fingerprint, plug, parts):
    """Its author may leave it out; sizes that cannot work are found nevertheless."""
    change(plug / "config.json", backbone_fingerprint=fingerprint)
    assert PPlugModel.from_pretrained(plug, **parts)
    narrow = transformers.GPT2Config(vocab_size=67, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(MismatchError, match=r"hidden_size=16.*hidden_size=8"):
        PPlugModel.from_pretrained(plug, backbone=transformers.GPT2LMHeadModel(narrow), encoder=parts["encoder"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(value, plug, parts):
    weights = load_file(plug / "model.safetensors")
    name = next(name for name in weights if "input_encoder" in name)
    weights[name].view(-1)[-1] = value
    save_file(weights, plug / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"NaN or infinity in plug\.input_encoder"):
        PPlugModel.from_pretrained(plug, **parts)


@pytest.mark.parametrize("fingerprint", ["[" * 10**5, '"x"', "{}", "\0"])
def test_a_persona_that_is_made_to_hurt(fingerprint, tmp_path, parts, saved, cheap):
    path = tmp_path / "persona.safetensors"
    save_file({"embeddings": torch.ones(2, 12)}, path, {"fingerprint": fingerprint})
    with pytest.raises(PPlugError):
        PPlugModel.from_pretrained(saved, **parts).soft_prompt(persona=Persona.from_pretrained(path), query="sea")
    sparse(path, 4 * GB + 100, header(wide("embeddings", [GB])))
    with pytest.raises(DataError, match="damaged or not a persona"):
        Persona.from_pretrained(path)


# ---- files ------------------------------------------------------------------------------------------------------

SETTINGS = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_gigabyte_of_settings(name, plug, parts, cheap):
    sparse(plug / name, GB, b"{")
    with pytest.raises(DataError, match=rf"{name} of .*it has 1024 MB, and such a file has at most \d+ MB"):
        PPlugModel.from_pretrained(plug, **parts)


@pytest.mark.parametrize("name", [*SETTINGS, "model.safetensors"])
def test_a_link_out_of_the_folder(name, plug, parts, tmp_path):
    outside = tmp_path / "outside"
    (plug / name).rename(outside)
    (plug / name).symlink_to(outside)
    with pytest.raises(DataError, match=rf"{name} of .*a link that leads out of the folder"):
        PPlugModel.from_pretrained(plug, **parts)
    (plug / name).unlink()
    (plug / "here").write_bytes(outside.read_bytes())
    (plug / name).symlink_to("here")
    assert PPlugModel.from_pretrained(plug, **parts)


@pytest.mark.parametrize("name", ["/dev/zero", "loop", "fifo"])
def test_what_is_no_file(name, plug, parts, cheap):
    (plug / "config.json").unlink()
    if name == "fifo":
        os.mkfifo(plug / "config.json")  # reading it would wait for ever
    else:
        (plug / "config.json").symlink_to("config.json" if name == "loop" else name)
    with pytest.raises(PPlugError, match=r"config\.json of"):
        PPlugModel.from_pretrained(plug, **parts)


@pytest.mark.parametrize("subfolder", ["..", "../plug", "a/../../plug", "/etc", "..\\plug"])
def test_a_subfolder_lies_within(subfolder, plug, parts):
    with pytest.raises(ConfigurationError, match="subfolder must lie inside the plug"):
        PPlugModel.from_pretrained(plug, subfolder=subfolder, **parts)


def test_a_subfolder_that_is_a_link_out(plug, parts, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "sub").symlink_to(plug)
    with pytest.raises(DataError, match="a link that leads out of the folder"):
        PPlugModel.from_pretrained(tmp_path / "empty", subfolder="sub", **parts)


@pytest.mark.parametrize("names", [["../evil"], ["/tmp/evil"], ["out/evil"], "x", [["a"]], 3, None, {"a": 1}])
def test_a_save_that_seems_to_be_interrupted_writes_nothing_elsewhere(names, plug, parts, tmp_path):
    """Reading a folder completes a killed save, and the folder may say that there was one."""
    (tmp_path / "outside").mkdir()
    (plug / "out").symlink_to(tmp_path / "outside")
    saved = plug / ".pplug-saved"
    (saved / "out").mkdir(parents=True)
    (saved / "out" / "evil").write_text("evil")
    (tmp_path / "plug" / "evil").write_text("evil")
    (saved / ".names").write_text(json.dumps(names))
    try:
        PPlugModel.from_pretrained(plug, **parts)
    except PPlugError as error:
        assert "remove it" in str(error)
    assert not list((tmp_path / "outside").iterdir()) and not (tmp_path / "evil").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "plug"}


@pytest.mark.parametrize(
    "values",
    [
        *({"tokenizer_file": "/etc/passwd"}, {"vocab_file": "../../x"}, {"fast_tokenizer_files": ["../x"]}),
        {"tokenizer_class": "RagTokenizer"},  # no tokenizer itself
        *({"pad_token": {"a": 1}}, {"added_tokens_decoder": 7}, {"extra_special_tokens": 3}),
    ],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_that_is_made_to_hurt(values, plug, parts, cheap):
    change(plug / "tokenizer_config.json", **values)
    with pytest.raises(DataError, match=r"tokenizer_config\.json of .*is damaged"):
        PPlugModel.from_pretrained(plug, **parts)
    with pytest.raises(DataError, match="is damaged"):
        PPlugProcessor.from_pretrained(plug)


@pytest.mark.parametrize("text", ["", "{}", "[]", "{" * 10**5, '{"model": {"type": "WordLevel", "vocab": 3}}'])
def test_a_vocabulary_that_is_none(text, plug, parts, cheap):
    (plug / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer_config\.json of .*is damaged"):
        PPlugModel.from_pretrained(plug, **parts)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{" * 10**5, '{"max_new_tokens": "x"}', '{"max_new_tokens": -5}', '{"cache_implementation": "evil"}'],
)
def test_a_generation_configuration_that_is_nonsense(text, plug, parts):
    (plug / "generation_config.json").write_text(text)
    with pytest.raises(PPlugError, match=r"generation_config\.json of"):
        PPlugModel.from_pretrained(plug, **parts)


def test_a_chat_template_runs_in_a_sandbox(plug):
    (plug / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[-1].__subclasses__() }}")
    processor = PPlugProcessor.from_pretrained(plug)
    with pytest.raises(DataError, match="access to attribute '__class__'") as refused:
        processor.apply_chat_template([{"role": "user", "content": "a"}])
    assert isinstance(refused.value.__cause__, jinja2.exceptions.SecurityError)


# ---- the backbone -----------------------------------------------------------------------------------------------


def pickled(folder, marker, name="model.safetensors"):
    (folder / name).unlink()
    torch.save({"weight": Evil(str(marker))}, folder / name.replace("model.safetensors", "pytorch_model.bin"))


def test_a_pickled_backbone_is_not_opened(places, tmp_path):
    folder = shutil.copytree(places / "gpt2", tmp_path / "gpt2")
    pickled(folder, tmp_path / "code-was-run")
    with pytest.raises(
        MissingFileError, match=r"no model\.safetensors. Other weights can carry code.*use_safetensors"
    ):
        tiny.from_backbone(str(folder), tiny.shared_encoder())
    with pytest.raises(Exception, match=r"(?i)weights.only"):  # asked for, it is torch that refuses the code in it
        tiny.from_backbone(str(folder), tiny.shared_encoder(), backbone_kwargs={"use_safetensors": False})
    assert not (tmp_path / "code-was-run").exists()


def test_old_weights_can_be_asked_for(places, tmp_path):
    folder = shutil.copytree(places / "gpt2", tmp_path / "gpt2")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    kwargs = {"backbone_kwargs": {"use_safetensors": False}}
    assert tiny.from_backbone(str(folder), tiny.shared_encoder(), **kwargs)


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", '{"a": "' + " " * 11 * 2**20 + '"}', "has 11 MB, and such a file has at most 10 MB"),
        ("tokenizer_config.json", '{"a": "' + " " * 11 * 2**20 + '"}', "has 11 MB, and such a file has at most 10 MB"),
        ("config.json", '{"model_type": "gpt2", "a": ' + NESTED + "}", "config.json .* is damaged"),
        ("config.json", '{"model_type', "config.json .* is damaged"),
        ("config.json", {"dtype": "os.system"}, "cannot be used"),
        ("config.json", {"vocab_size": 10**9}, "cannot be used"),
        ("config.json", {"_attn_implementation": "evil/kernel"}, "attention of a repository of kernels"),
        ("config.json", {"attn_implementation": {"": "evil/kernel"}}, "attention of a repository of kernels"),
        ("config.json", {"text_config": {"_attn_implementation": "evil/kernel"}}, "attention of a repository of kernels"),
        ("model.safetensors", struct.pack("<Q", 2**60).decode("latin-1") + "{}", "cannot be used"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
@pytest.mark.parametrize("part", ["gpt2", "encoder"])
def test_a_backbone_or_encoder_that_is_made_to_hurt(part, file, content, message, places, tmp_path, cheap):
    folder = shutil.copytree(places / part, tmp_path / part)
    if isinstance(content, dict):
        change(folder / file, **content)
    else:
        (folder / file).write_text(content, encoding="latin-1")
    given = {"backbone": tiny.backbone("gpt2"), "encoder": tiny.shared_encoder()}
    given["backbone" if part == "gpt2" else part] = str(folder)
    with pytest.raises(PPlugError, match=message):
        tiny.from_backbone(**given)


@pytest.fixture
def custom(places, tmp_path, monkeypatch):
    """A backbone whose class is code of its repository, and so is its tokenizer's."""
    folder = shutil.copytree(places / "gpt2", tmp_path / "custom")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    run = f"open({str(tmp_path)!r} + '/run-' + __name__.split('.')[-1], 'w').close()\n"
    (folder / "modeling.py").write_text(
        f"from transformers import GPT2Config, GPT2LMHeadModel\n{run}"
        "class Config(GPT2Config):\n    model_type = 'custom'\n"
        "class Model(GPT2LMHeadModel):\n    config_class = Config\n"
    )
    (folder / "tokenizing.py").write_text(f"from transformers import PreTrainedTokenizerFast as Tokens\n{run}")
    auto = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    change(folder / "config.json", model_type="custom", auto_map=auto)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenizing.Tokens"]})
    return folder


def test_code_of_a_backbone_is_run_only_if_the_user_says_so_and_of_no_other_part(custom, places, tmp_path):
    arguments = {"backbone": str(custom), "encoder": str(places / "encoder")}
    with pytest.raises(ConfigurationError, match="contains custom code"):
        tiny.from_backbone(**arguments)
    assert not list(tmp_path.glob("run-*"))
    model = tiny.from_backbone(**arguments, backbone_kwargs={"trust_remote_code": True})
    assert type(model.backbone).__name__ == "Model"
    assert {path.name for path in tmp_path.glob("run-*")} == {"run-modeling"}


def test_a_tokenizer_that_is_code_is_not_saved_and_must_be_passed(custom, places, tmp_path, caplog):
    trust = {"trust_remote_code": True}
    with (custom / "tokenizing.py").open("a") as file:
        file.write("class Own(Tokens):\n    pass\n")
    own = {"auto_map": {"AutoTokenizer": [None, "tokenizing.Own"]}, "tokenizer_class": "Own"}
    change(custom / "tokenizer_config.json", **own)
    tokenizer = transformers.AutoTokenizer.from_pretrained(custom, **trust)
    assert type(tokenizer).__module__.startswith("transformers_modules.")
    kwargs = {"backbone_kwargs": trust}
    assert tiny.from_backbone(str(custom), str(places / "encoder"), **kwargs).tokenizer is None
    assert "is code of its repository, which is not run" in caplog.text and "pass tokenizer=" in caplog.text
    caplog.clear()
    kwargs["tokenizer"] = tokenizer
    model = tiny.from_backbone(str(custom), str(places / "encoder"), **kwargs)
    model.save_pretrained(tmp_path / "plug")
    assert set(os.listdir(tmp_path / "plug")) == {"config.json", "generation_config.json", "model.safetensors"}
    assert "Own is code of its repository and is not saved" in caplog.text
    assert "which is not run" not in caplog.text
    again = PPlugModel.from_pretrained(tmp_path / "plug", backbone_kwargs=trust)
    assert "which is not run" in caplog.text
    with pytest.raises(ConfigurationError, match=r"No tokenizer was found .*tokenizer="):
        PPlugProcessor.from_model(again)
    inputs = PPlugProcessor.from_model(again, tokenizer)("the sea", persona=[tiny.HISTORY])
    assert torch.equal(again.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4))


def test_trust_reaches_the_backbone_alone(saved, places, monkeypatch):
    seen = []

    def spy(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            seen.append((owner.__name__, kwargs.get("trust_remote_code")))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        spy(auto, "from_pretrained")
    spy(SentenceTransformer, "__init__")
    given = {"backbone": str(places / "gpt2"), "encoder": str(places / "encoder")}
    PPlugModel.from_pretrained(saved, **given)
    assert seen and not any(trusted for _, trusted in seen)
    assert all(trusted is False for owner, trusted in seen if owner.startswith("AutoModel"))
    seen.clear()
    PPlugModel.from_pretrained(saved, **given, backbone_kwargs={"trust_remote_code": True})
    ours = {owner for owner, trusted in seen if trusted}
    assert "AutoModelForCausalLM" in ours and not ours - {"AutoConfig", "AutoModelForCausalLM"}


# ---- the encoder ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "encoder"
    tiny.encoder(dense=5).save(str(folder))
    return folder


@pytest.fixture
def encoder(dense, tmp_path):
    return shutil.copytree(dense, tmp_path / "encoder")


def make(encoder, **kwargs):
    return tiny.from_backbone(tiny.backbone("gpt2"), str(encoder), **kwargs)


@pytest.mark.parametrize(
    "module",
    [
        *("os.system", "evil.Module", "evil", "encoder.evil.Module", "builtins.eval", "torch.load", "torch.nn.Linear", 7),
        *("sentence_transformers.base.model.torch", "sentence_transformers.base.model.pickle", "sentence_transformers."),
        *("sentence_transformers.util.misc.importlib", "sentence_transformers.nowhere.Module", "sentence_transformersx.y.Z"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:pickle_load_args")
@pytest.mark.parametrize("where", ["", "evil.bin"])
def test_modules_of_an_encoder_are_those_of_sentence_transformers(module, where, encoder, alarm, monkeypatch):
    modules = json.loads((encoder / "modules.json").read_text())
    modules[1] |= {"type": module, **({"path": where} if where else {})}
    (encoder / "modules.json").write_text(json.dumps(modules))
    (encoder / "evil.py").write_text(alarm)
    torch.save({"a": Evil(str(encoder / "code-was-run"))}, encoder / "evil.bin")
    monkeypatch.syspath_prepend(str(encoder))
    with pytest.raises(PPlugError, match="sentence encoder"):
        make(encoder)
    assert not (encoder / "code-was-run").exists()


def test_a_router_is_held_to_the_same(encoder, alarm, monkeypatch):
    """It names its modules in a file of its own."""
    modules = json.loads((encoder / "modules.json").read_text())
    (encoder / "modules.json").write_text(
        json.dumps([{**modules[0], "path": "", "type": "sentence_transformers.base.modules.router.Router"}])
    )
    values = {"types": {"evil": "evil.Module"}, "structure": {"query": ["evil"]}, "parameters": {}}
    (encoder / "router_config.json").write_text(json.dumps(values))
    (encoder / "evil.py").write_text(alarm)
    monkeypatch.syspath_prepend(str(encoder))
    with pytest.raises(ConfigurationError, match=r"sentence encoder .* cannot be used \(ValueError: .*'evil\.Module'"):
        make(encoder)


@pytest.mark.parametrize("path", ["../../etc", "/etc", "..", 3])
def test_modules_of_an_encoder_lie_within(path, encoder):
    modules = json.loads((encoder / "modules.json").read_text())
    modules[1]["path"] = path
    (encoder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(PPlugError, match="sentence encoder"):
        make(encoder)


def test_a_pickled_encoder_is_not_opened(encoder, tmp_path):
    pickled(encoder, tmp_path / "code-was-run")
    with pytest.raises(MissingFileError, match=r"sentence encoder.*no model\.safetensors.*encoder_kwargs"):
        make(encoder)
    with pytest.raises(ConfigurationError, match="sentence encoder"):
        make(encoder, encoder_kwargs={"model_kwargs": {"use_safetensors": False}})
    assert not (tmp_path / "code-was-run").exists()


def test_code_in_a_pickled_head_is_not_run(encoder, tmp_path):
    head = next(path.name for path in encoder.iterdir() if "Dense" in path.name)
    pickled(encoder, tmp_path / "code-was-run", f"{head}/model.safetensors")
    with pytest.raises(
        ConfigurationError, match=r"sentence encoder .* cannot be used \(UnpicklingError: Weights only"
    ):
        make(encoder)
    assert not (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize("function", ["torch.hub.load", "torch.load", "os.system", "torch.nn.Linear", 5])
def test_an_activation_function_is_a_module(function, encoder, alarm):
    head = next(path for path in encoder.iterdir() if "Dense" in path.name)
    change(head / "config.json", activation_function=function)
    try:
        make(encoder)  # what is not of torch is left out, with a warning of sentence-transformers
    except PPlugError as error:
        assert "sentence encoder" in str(error)


def test_code_of_an_encoder_is_not_run(encoder, alarm):
    """Whatever trust it claims for itself."""
    (encoder / "evil.py").write_text(alarm)
    trust = {"trust_remote_code": True}
    change(encoder / "sentence_bert_config.json", model_args=trust, config_args=trust, tokenizer_args=trust)
    change(encoder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    with pytest.raises(ConfigurationError, match=r"sentence encoder .*custom code"):
        make(encoder)


# ---- the document -----------------------------------------------------------------------------------------------


def test_the_threat_model_names_tests_and_places_that_exist():
    root = Path(__file__).parent.parent
    text = (root / "SECURITY.md").read_text(encoding="utf-8")
    for place in re.findall(r"`((?:\w+/)?\w+\.py)`", text):
        assert (root / "pplug_hf" / place).exists() or (root / "tests" / place).exists(), place
    defined = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 20 and all(f"def {name}(" in defined for name in named)
