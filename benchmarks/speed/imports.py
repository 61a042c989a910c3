"""Time of `import pplug_hf` compared with `import transformers`, in fresh processes.

    python benchmarks/speed/imports.py

Also the import that a user does next, `from pplug_hf import PPlugModel`, compared with the libraries that it stands on.
"""

import argparse
import subprocess
import sys
from typing import Any

from harness import figure, ratios, run, spread, take_turns

LIBRARIES = "import torch, sentence_transformers; from transformers import AutoModelForCausalLM, PreTrainedModel, GenerationMixin"


def in_a_fresh_process(code: str) -> Any:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    for name, theirs, ours in (
        ("import pplug_hf", "import transformers", "import pplug_hf"),
        ("from pplug_hf import PPlugModel", LIBRARIES, "from pplug_hf import PPlugModel"),
    ):
        sides = {"libraries": in_a_fresh_process(theirs), "package": in_a_fresh_process(ours)}
        seconds = take_turns(sides, args.repetitions)
        sides = {side: spread(times) for side, times in seconds.items()}
        figures.append(figure(name, sides, ratios(seconds["package"], seconds["libraries"]), at_most=1.1))
    return figures


if __name__ == "__main__":
    run(measure, __doc__ or "")
