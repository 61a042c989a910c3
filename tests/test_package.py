"""What is published: names, imports, the wheel and the documents."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pplug_hf

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pplug_hf"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Every module a file imports, wherever in it, as an absolute name; for `from x import y` also x.y."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*parts[: len(parts) - node.level]] if node.level else []
            module = ".".join(base + (node.module or "").split(".")).strip(".")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


# ---- names ------------------------------------------------------------------------------------------------------


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", pplug_hf.__version__)
    assert f"## {pplug_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", pplug_hf.__all__)
def test_every_public_name_is_there(name):
    assert getattr(pplug_hf, name) is not None
    assert name in dir(pplug_hf)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="has no attribute 'PPlug'"):
        pplug_hf.PPlug  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {a.name for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert declared == set(pplug_hf.__all__) - {"__version__"}


@pytest.mark.parametrize("module", ["pplug_hf", "pplug_hf.cli"])
def test_importing_loads_nothing_heavy(module):
    heavy = "('torch', 'transformers', 'sentence_transformers', 'numpy', 'huggingface_hub')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


# ---- sources ----------------------------------------------------------------------------------------------------


# The only form in which vLLM's OpenAI server takes a tensor. It is written, never read.
SAVES = {"serving/vllm_export.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_can_run_what_it_loads(path):
    assert not imports(path) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("torch.load", "eval", "exec", "os.system")
            assert name != "torch.save" or str(path.relative_to(PACKAGE)) in SAVES
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("trust_remote_code", "False") == "False" and given.get("shell", "False") == "False"
            assert given.get("weights_only", "True") == "True" and given.get("allow_pickle", "False") == "False"


def test_links_at_the_top_level():
    for name in ("configuration", "modeling"):
        assert (ROOT / name).is_symlink() and os.readlink(ROOT / name) == f"pplug_hf/{name}"
        assert (ROOT / name / "__init__.py").is_file()
    for path in SOURCES:
        assert not {name.split(".")[0] for name in imports(path)} & {"configuration", "modeling"}


# ---- the wheel --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel, built from a copy so that nothing is left in the working tree."""
    if importlib.util.find_spec("build") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("build and setuptools are not installed")
    root = tmp_path_factory.mktemp("wheel")
    copy = root / "source"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("pplug_hf", "tests", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("configuration", "modeling"):
        (copy / name).symlink_to(f"pplug_hf/{name}")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(root / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return zipfile.ZipFile(next((root / "dist").glob("*.whl")))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"pplug_hf", f"pplug_hf-{pplug_hf.__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_package(wheel):
    expected = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    shipped = {name for name in wheel.namelist() if name.startswith("pplug_hf/")}
    assert shipped == expected
    assert {"pplug_hf/py.typed", "pplug_hf/demo/assets/backbone/model.safetensors"} <= shipped
    assert sum(info.file_size for info in wheel.infolist()) < 4.5e6


def test_the_wheel_installs_the_command(wheel):
    folder = f"pplug_hf-{pplug_hf.__version__}.dist-info"
    assert "pplug-hf = pplug_hf.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "Name: pplug-hf" in metadata and "Requires-Python: >=3.11" in metadata
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", metadata, re.MULTILINE)
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()


# ---- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name} links to {target}"


def test_every_error_class_is_explained():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tree = ast.parse((PACKAGE / "errors.py").read_text(encoding="utf-8"))
    assert all(f"`{node.name}`" in text for node in tree.body if isinstance(node, ast.ClassDef))
