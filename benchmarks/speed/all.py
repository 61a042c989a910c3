"""Every figure, one after the other, each script in a process of its own; results and a page with plots.

    python benchmarks/speed/all.py

About a quarter of an hour on two idle cores. Writes benchmarks/results/speed/: speed.json, README.md, pictures.
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import page
from harness import machine

HERE = Path(__file__).parent
SCRIPTS = (
    "train_step",
    "memory",
    "output_layer",
    "prompt_cache",
    "persona",
    "generation",
    "first_token",
    "compile",
    "encoding",
    "loading",
    "imports",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, help="these scripts; other results stay as they are")
    parser.add_argument("--output", type=Path, default=page.FOLDER)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="few and short: whether it runs, not how fast")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "speed.json"
    results = json.loads(path.read_text()) if path.exists() else {"machine": {}, "scripts": []}
    done = {script["script"]: script for script in results["scripts"]}
    for name in args.only or SCRIPTS:
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.json"
            command = [
                sys.executable,
                str(HERE / f"{name}.py"),
                "--json",
                str(figures),
                "--threads",
                str(args.threads),
            ]
            subprocess.run(command + ["--small"] * args.small, check=True)
            found = json.loads(figures.read_text())
        title, *description = (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or "").split("\n\n")
        done[f"{name}.py"] = {
            "script": f"{name}.py",
            "title": title.rstrip(".").replace("\n", " "),
            "description": description[1:],  # behind the command
            "seconds": round(time.perf_counter() - started),
            "machine": found["machine"],
            "figures": found["figures"],
        }
        results = {
            **results,  # what was measured on a GPU
            "machine": (args.only and results["machine"])
            or found["machine"] | {"load_average": round(machine()["load_average"], 1)},
            "scripts": [done[f"{script}.py"] for script in SCRIPTS if f"{script}.py" in done],
        }
        path.write_text(json.dumps(results, indent=1) + "\n")
        page.render(args.output)
    print(f"{args.output / 'README.md'}")


if __name__ == "__main__":
    main()
