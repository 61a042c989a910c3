"""Every example and the notebook run as they stand, in small settings, and leave nothing behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = [*sorted(FOLDER.glob("*.py")), *sorted(FOLDER.glob("learned/*.py"))]
NOTEBOOK = FOLDER / "from_data_to_plot.ipynb"
SMALL = {
    "train_on_lamp": ["--epochs", "0.1"],
    "your_own_data": ["--epochs", "0.1"],
    "persona_and_retrieval": ["--epochs", "0.1", "--questions", "20"],
    "train_a_retriever": ["--epochs", "1", "--questions", "20", "--candidates", "2"],
    "one_adapter_per_user": ["--users", "2", "--epochs", "1"],
}  # the others: --steps 2
SAYS = {
    "train_on_lamp": ["Plug saved", "| instruction-only", "| pplug:wrong-user", "| bm25@1"],
    "your_own_data": [
        "book club: 594 questions",
        "| pplug:wrong-user",
        "because of",
        "mystery: the curious detective",
    ],
    "persona_and_retrieval": ["A prompt with 2 items", "| retrieval", "the paper's order", "| persona "],
    "swap_backbone_and_encoder": ["T5 (folder)", "GPT-2 (object)", "The T5's plug on the GPT-2", "cannot be mixed"],
    "quickstart": ["loss", "reader r1001:", "reader r1002:", "The most important items"],
    "train_with_trainer": ["eval_loss", "texts encoded", "with their own history", "with another's"],
    "train_a_retriever": ["Kept: epoch 1", "; 0 prompts asked now", "ropg-rl: reward of the item", "| ropg-kd@1"],
    "one_adapter_per_user": [
        "2 readers: 27,648 weights and 115,416 bytes each",
        "| ftp:wrong-user ",
        "Shelves that two",
    ],
    "bring_your_own_backbone": ["saved:", "for nobody:", "the backbone alone:", "soft prompt"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path):
    command = [sys.executable, str(path), *SMALL.get(path.stem, ["--steps", "2"])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(text in done.stdout for text in SAYS[path.stem])
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameters.source.count("EPOCHS = 3") == 1
    parameters.source = parameters.source.replace("EPOCHS = 3", "EPOCHS = 0.1")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    shown = [o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in data for data in shown) == 3
    assert any("| pplug:last-2" in data.get("text/markdown", "") for data in shown)
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_is_kept_as_it_ran():
    """Who reads it on the web sees its table and pictures, nothing of the machine it ran on, and not more than fits."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert not any(output.get("name") == "stderr" or output["output_type"] == "error" for output in shown)
    words = json.dumps([{**o, "data": {**o.get("data", {}), "image/png": ""}} for o in shown])  # base64 has slashes
    assert not re.search(r"(^|[\s\"'(=])(/\w+/|[A-Z]:\\)", words)
    assert len(text) < 200_000


def test_each_is_listed():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == len(SAYS)
    assert all(f"[{path.name}]({path.relative_to(FOLDER).as_posix()})" in listed for path in (*EXAMPLES, NOTEBOOK))
