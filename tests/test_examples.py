"""Every example runs as it stands, for two steps, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
SAYS = {
    "quickstart": ["loss", "reader r1001:", "reader r1002:", "What speaks"],
    "train_with_trainer": ["eval_loss", "texts encoded", "with their own history", "with another's"],
    "bring_your_own_backbone": ["saved:", "for nobody:", "the backbone alone:", "soft prompt"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path):
    command = [sys.executable, str(path), "--steps", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(text in done.stdout for text in SAYS[path.stem])
    assert list(tmp_path.iterdir()) == []


def test_each_is_listed():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == len(SAYS) and all(f"[{path.name}]({path.name})" in listed for path in EXAMPLES)
