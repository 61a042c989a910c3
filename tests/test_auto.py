"""What transformers knows of plugs once pplug_hf is imported: Auto classes and the order of imports."""

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto import auto_factory

from pplug_hf import PPlugConfig, PPlugForConditionalGeneration, PPlugModel, PPlugProcessor, auto
from pplug_hf.errors import ConfigurationError
from pplug_hf.hub.stub import add_stub

ROOT = Path(__file__).parent.parent
FOR = {"t5": AutoModelForSeq2SeqLM, "gpt2": AutoModelForCausalLM}
PROMPT = torch.tensor([[9, 10, 11]])


@pytest.fixture(scope="module")
def plugs(places, tmp_path_factory):
    """Folders of two plugs, one for each kind of backbone."""
    root = tmp_path_factory.mktemp("plugs")
    for family in FOR:
        model = tiny.from_backbone(str(places / family), encoder=str(places / "encoder"))
        tiny.randomise(model.plug)
        model.save_pretrained(root / family)
    return root


def answer(model):
    return model.generate(PROMPT, persona=tiny.HISTORY, query="sea", max_new_tokens=6)


# ---- loading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOR)
def test_each_auto_class_gives_what_the_front_door_gives(plugs, family):
    config = AutoConfig.from_pretrained(plugs / family)
    assert type(config) is PPlugConfig and config.is_encoder_decoder == (family == "t5")
    expected = answer(PPlugModel.from_pretrained(plugs / family))
    for auto_class in (AutoModel, FOR[family]):
        model = auto_class.from_pretrained(plugs / family)
        assert type(model) is PPlugForConditionalGeneration and not model.training
        assert torch.equal(answer(model), expected)


@pytest.mark.parametrize("with_files", [False, True], ids=["model saved", "processor saved too"])
@pytest.mark.parametrize("family", FOR)
def test_the_processor_knows_the_kind_of_backbone(plugs, tmp_path, family, with_files):
    folder = shutil.copytree(plugs / family, tmp_path / "plug")
    if with_files:
        PPlugProcessor(tiny.tokenizer(family), is_encoder_decoder=family == "t5").save_pretrained(folder)
    assert (folder / "processor_config.json").is_file() == with_files
    for loader in (AutoProcessor, PPlugProcessor):
        processor = loader.from_pretrained(folder)
        assert type(processor) is PPlugProcessor and processor.is_encoder_decoder == (family == "t5")
        assert processor("the sea")["input_ids"].tolist() == [tiny.tokenizer(family)("the sea")["input_ids"]]
    assert AutoTokenizer.from_pretrained(folder)("the sea").input_ids == tiny.tokenizer(family)("the sea").input_ids


def test_a_loaded_backbone_and_encoder_are_attached_as_they_are(plugs):
    backbone, encoder = tiny.backbone("gpt2"), tiny.encoder()
    model = AutoModelForCausalLM.from_pretrained(plugs / "gpt2", backbone=backbone, encoder=encoder)
    assert model.backbone is backbone and model.history_encoder is encoder
    assert isinstance(model.config.backbone, str)  # where the plug was trained, still


def test_places_of_backbone_and_encoder(plugs, places, tmp_path):
    shutil.copytree(places / "gpt2", tmp_path / "backbone")
    elsewhere = {"backbone": str(tmp_path / "backbone"), "encoder": str(places / "encoder")}
    model = AutoModel.from_pretrained(plugs / "gpt2", **elsewhere)
    assert model.backbone.config.name_or_path == elsewhere["backbone"]


def test_the_backbone_gets_its_dtype_and_the_plug_stays_in_fp32(plugs):
    given = {"dtype": torch.bfloat16, "device_map": "cpu", "attn_implementation": "eager"}
    model = AutoModel.from_pretrained(plugs / "t5", **given)
    assert model.backbone.dtype == torch.bfloat16 and model.plug.no_persona.dtype == torch.float32
    assert model.backbone.config._attn_implementation == "eager"
    assert torch.equal(answer(model), answer(PPlugModel.from_pretrained(plugs / "t5", **given)))


GIVEN = {
    "token": "hf_x",
    "cache_dir": "somewhere",
    "local_files_only": True,
    "force_download": False,
    "subfolder": "",
    "dtype": torch.float16,
    "device_map": "cpu",
    "attn_implementation": "sdpa",
    "quantization_config": {"quant_method": "made up"},
    "backbone": "other/backbone",
    "encoder": "other/encoder",
    "backbone_kwargs": {"trust_remote_code": True},
    "encoder_kwargs": {"device": "cpu"},
}


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_every_argument_arrives(plugs, monkeypatch, auto_class):
    got = {}
    monkeypatch.setattr(PPlugForConditionalGeneration, "from_pretrained", lambda *args, **kwargs: got.update(kwargs))
    auto_class.from_pretrained(plugs / "gpt2", revision="main", trust_remote_code=True, **GIVEN)
    assert {name: got.get(name) for name in GIVEN} == GIVEN
    assert "revision" in got and type(got["config"]) is PPlugConfig
    # Whoever trusts a plug's repository has said nothing about the backbone's.
    assert set(got) == {*GIVEN, "revision", "config"}


def test_the_users_choices_go_into_the_configuration(plugs):
    assert AutoModel.from_pretrained(plugs / "gpt2", attention_temperature=0.5).config.attention_temperature == 0.5


# ---- what cannot work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, auto_class, message",
    [
        (
            "t5",
            AutoModelForCausalLM,
            "is encoder-decoder, which AutoModelForCausalLM is not for: use AutoModelForSeq2Seq",
        ),
        ("gpt2", AutoModelForSeq2SeqLM, "is causal, which AutoModelForSeq2SeqLM is not for: use AutoModelForCausalLM"),
    ],
)
def test_an_auto_class_for_the_other_kind_of_backbone(plugs, family, auto_class, message):
    with pytest.raises(ConfigurationError, match=message):
        auto_class.from_pretrained(plugs / family)


def test_an_auto_class_for_something_else(plugs):
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*PPlugConfig"):
        transformers.AutoModelForSequenceClassification.from_pretrained(plugs / "gpt2")


def test_a_plug_is_not_made_of_a_configuration_alone(plugs):
    with pytest.raises(ConfigurationError, match=r"AutoModelForCausalLM.from_config .* use .*from_backbone"):
        AutoModelForCausalLM.from_config(PPlugConfig.from_pretrained(plugs / "gpt2"))


# ---- beside others ----------------------------------------------------------------------------------------------


def test_peft_does_not_take_a_plug_for_an_adapter(plugs, monkeypatch):
    """With peft installed, the Auto classes and `pipeline` look for an adapter's configuration first."""
    looked = []

    def find(folder, **kwargs):
        looked.append(folder)
        return transformers.utils.find_adapter_config_file(folder, **kwargs)

    for module in (auto_factory, transformers.pipelines):
        monkeypatch.setattr(module, "is_peft_available", lambda: True)
        monkeypatch.setattr(module, "find_adapter_config_file", find)
    model = AutoModel.from_pretrained(plugs / "gpt2")
    made = transformers.pipeline("personalized-text-generation", model=str(plugs / "gpt2"))
    assert type(model) is type(made.model) is PPlugForConditionalGeneration
    assert looked[0] == plugs / "gpt2" and looked.count(str(plugs / "gpt2")) == 2


FRESH = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import check_task

heavy = [name for name in ("sentence_transformers", "pplug_hf.modeling") if name in sys.modules]
assert not heavy, heavy
config = type(AutoConfig.for_model("pplug"))
assert config.__module__ == "pplug_hf.configuration.pplug"
assert config in MODEL_FOR_CAUSAL_LM_MAPPING and config in PROCESSOR_MAPPING
assert check_task("personalized-text-generation")[1]["impl"].__module__ == "pplug_hf.pipeline"
"""
LOAD = """
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__ == "PPlugForConditionalGeneration"
assert type(AutoProcessor.from_pretrained(sys.argv[1])).__name__ == "PPlugProcessor"
answers = pipeline("personalized-text-generation", model=sys.argv[1])
print(answers("the sea", persona=["a dark film"], max_new_tokens=3)[0]["generated_text"])
"""


@pytest.mark.parametrize(
    "code",
    [
        "import pplug_hf" + FRESH + LOAD,
        "from transformers import AutoModelForCausalLM, pipeline; import pplug_hf" + FRESH,
        "from pplug_hf import PersonalizedTextGenerationPipeline" + FRESH,
    ],
    ids=["pplug_hf first", "transformers first", "our pipeline first"],
)
def test_the_order_of_imports_does_not_matter(plugs, code):
    command = [sys.executable, "-c", code, str(plugs / "gpt2")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert LOAD not in code or (done.stdout.startswith("the sea") and len(done.stdout) > len("the sea\n"))


# ---- without the package ----------------------------------------------------------------------------------------

WITHOUT = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "pplug_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
TRY = """
import sys
from transformers import AutoConfig, AutoModel

for loader in (AutoConfig, AutoModel):
    for trust in ({}, {"trust_remote_code": True}):
        try:
            print(type(loader.from_pretrained(sys.argv[1], **trust)).__module__)
        except Exception as error:
            print(type(error).__name__, " ".join(str(error).split()))
"""


@pytest.fixture(scope="module")
def pushed(plugs, tmp_path_factory):
    """A plug folder as it is pushed."""
    folder = shutil.copytree(plugs / "gpt2", tmp_path_factory.mktemp("pushed") / "plug")
    add_stub(folder)
    return folder


@pytest.mark.parametrize("installed", [False, True], ids=["not installed", "installed, not imported"])
def test_somebody_who_does_not_import_the_package(pushed, tmp_path, installed):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", TRY if installed else WITHOUT + TRY, str(pushed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    said = [line.split("[y/N] ")[-1] for line in done.stdout.splitlines() if "Error" in line or "pplug_hf." in line]
    assert len(said) == 4, done.stdout + done.stderr
    if installed:  # importing it for the first trusted load registers everything
        asked, *modules = said
        assert modules == ["pplug_hf.configuration.pplug"] + ["pplug_hf.modeling.pplug"] * 2
    else:
        asked = said[0]
        assert said[2].startswith("ValueError") and said[1] == said[3]
        assert (
            said[1].startswith("ImportError")
            and "`pip install .` in a checkout" in said[1]
            and "pip install pplug" not in done.stdout
        )
    assert asked.startswith("ValueError") and "trust_remote_code=True" in asked


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["", "trusted"])
def test_whoever_imports_the_package_is_not_asked_and_runs_nothing(pushed, tmp_path, monkeypatch, recwarn, trust):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    folder = shutil.copytree(pushed, tmp_path / "plug")
    (folder / "modeling_pplug.py").write_text("raise SystemExit('run')")
    assert type(AutoConfig.from_pretrained(folder, **trust)) is PPlugConfig
    assert type(AutoProcessor.from_pretrained(folder, **trust)) is PPlugProcessor
    model = AutoModel.from_pretrained(folder, **trust)
    assert type(model) is PPlugForConditionalGeneration
    model.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


# ---- the import hook --------------------------------------------------------------------------------------------


@pytest.fixture
def hook(monkeypatch, tmp_path):
    """A module `made_up` that is to be told about plugs, and what it was told."""
    told = []
    (tmp_path / "made_up.py").write_text("value = 1\n")
    (tmp_path / "made_up_too.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, auto._AfterImport)])
    monkeypatch.setattr(auto, "_REGISTER", {"made_up": lambda module: told.append((module.__name__, module.value))})
    yield SimpleNamespace(told=told, file=tmp_path / "made_up.py")
    for name in ("made_up", "made_up_too"):
        sys.modules.pop(name, None)


def test_a_module_is_told_after_it_has_run(hook):
    auto.register()
    assert hook.told == []
    made_up = importlib.import_module("made_up")
    importlib.import_module("made_up_too")
    importlib.import_module("made_up")
    assert hook.told == [("made_up", 1)]
    assert inspect.getsource(made_up) == "value = 1\n" and made_up.__spec__.origin == str(hook.file)


def test_a_module_that_is_there_is_told_at_once(hook):
    importlib.import_module("made_up")
    auto.register()
    assert hook.told == [("made_up", 1)]


def test_two_hooks_that_ask_each_other(hook):
    """Other libraries wait for modules in the same way, by asking all finders for the module."""
    asked = []

    class Other:
        def find_spec(self, name, path=None, target=None):
            if name == "made_up" and not asked:
                asked.append(name)
                return find_spec(name)

    sys.meta_path.insert(0, Other())
    auto.register()
    sys.meta_path.insert(0, Other())
    assert importlib.import_module("made_up").value == 1
    assert hook.told == [("made_up", 1)] and asked


def test_a_loader_of_several_modules_tells_the_right_one(hook):
    """As that of a zip archive."""
    shared = find_spec("made_up").loader

    class Archive:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("made_up"):
                spec = importlib.machinery.PathFinder.find_spec(name)
                shared.name, shared.path, spec.loader = name, spec.origin, shared
                return spec

    sys.meta_path.insert(0, Archive())
    auto.register()
    assert importlib.import_module("made_up").value == 1 and importlib.import_module("made_up_too").value == 2
    assert hook.told == [("made_up", 1)]


def test_a_module_that_fails_is_not_told(hook):
    hook.file.write_text("1 / 0\n")
    auto.register()
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("made_up")
    assert hook.told == []
