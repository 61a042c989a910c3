"""Throughput of VllmEngine next to TransformersEngine: the same plug, the same requests, in the same run.

    python benchmarks/vllm_engine.py --backbone runs/smollm2/model --encoder all-MiniLM-L6-v2-folder

Every request has a user of its own. Both engines are in memory and are asked in turns; medians count,
and the ratio is that of one repetition, because a busy machine slows both.
Answers are greedy; in float32 nearly all are equal, so that both write the same number of tokens. The environment of
`make test-vllm` has what it needs.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch

from pplug_hf import PPlugForConditionalGeneration, PPlugModel
from pplug_hf.serving.engine import Request, Sampling
from pplug_hf.serving.transformers_engine import TransformersEngine
from pplug_hf.serving.vllm_engine import VllmEngine

TOPICS = [
    "rain",
    "snow",
    "war",
    "love",
    "books",
    "films",
    "dogs",
    "ships",
    "music",
    "bread",
    "winter",
    "cities",
    "birds",
    "science",
    "trains",
    "gardens",
]
QUESTIONS = ("Write a headline about {}.", "What is good about {}?", "Tell me a short story about {}.", "Explain {}.")


def requests_of(model: PPlugForConditionalGeneration, count: int, tokens: int) -> list[Request]:
    """Return requests, each of another user."""
    draw = random.Random(0)
    histories = [[f"{draw.choice(TOPICS)} and {draw.choice(TOPICS)}" for _ in range(20)] for _ in range(count)]
    prompts = [draw.choice(QUESTIONS).format(draw.choice(TOPICS)) for _ in range(count)]
    personas = model.encode_persona(histories)
    return [Request(p, persona, sampling=Sampling(tokens)) for p, persona in zip(prompts, personas, strict=True)]


def measure(engines: dict, requests: list[Request], repetitions: int) -> dict:
    """Return tokens per second of each engine, the median of the ratios, and how many answers are equal."""
    speeds, texts = [], []
    for _ in range(1 + repetitions):  # the first warms up
        speeds.append({})
        texts = []
        for name, engine in engines.items():
            start = time.perf_counter()
            answers = engine.generate(requests)
            speeds[-1][name] = sum(a.completion_tokens for a in answers) / (time.perf_counter() - start)
            texts.append([answer.text.strip() for answer in answers])
    kept = speeds[1:]
    row = {name: round(statistics.median(one[name] for one in kept), 1) for name in engines}
    row["ratio"] = round(statistics.median(one["vllm"] / one["transformers"] for one in kept), 2)
    return row | {"equal": sum(one == other for one, other in zip(*texts, strict=True)), "requests": len(requests)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="runs/smollm2/model", help="causal language model")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="sentence encoder")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--requests", nargs="+", type=int, default=[32, 4])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/results/vllm")
    arguments = parser.parse_args()
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as plug:
        torch.manual_seed(0)
        made = PPlugForConditionalGeneration.from_backbone(arguments.backbone, arguments.encoder)
        for parameter in made.plug.projector.parameters():
            parameter.data *= 10  # as loud as a trained plug
        made.save_pretrained(plug)
        for dtype in arguments.dtypes:
            write(of_dtype(plug, dtype, arguments), arguments)


def of_dtype(plug: str, dtype: str, arguments: argparse.Namespace) -> list[dict]:
    """Return a row of results for each number of requests at once."""
    model = PPlugModel.from_pretrained(plug, dtype=dtype)
    requests = requests_of(model, max(arguments.requests), arguments.tokens)
    options = {"max_model_len": 512, "max_num_seqs": max(arguments.requests), "time_limit": 600.0}
    with (
        VllmEngine.from_pretrained(plug, dtype=dtype, **options) as vllm,
        TransformersEngine(model, max_batch=max(arguments.requests), time_limit=600.0) as own,
    ):
        rows = []
        for count in arguments.requests:
            row = measure({"vllm": vllm, "transformers": own}, requests[:count], arguments.repetitions)
            rows.append({"dtype": dtype, **row})
            print(json.dumps(rows[-1]), flush=True)
        return rows


def write(rows: list[dict], arguments: argparse.Namespace) -> None:
    """Write results.json and table.md; rows of other dtypes that are there stay."""
    import transformers
    import vllm

    about = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"backbone": Path(arguments.backbone).resolve().parent.name, "tokens": arguments.tokens}
    about |= {"repetitions": arguments.repetitions, "threads": torch.get_num_threads()}
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "results.json").is_file():
        known = json.loads((folder / "results.json").read_text())["rows"]
        rows = [row for row in known if row["dtype"] != rows[0]["dtype"]] + rows
    (folder / "results.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    lines = ["| dtype | requests at once | vLLM, tokens/s | TransformersEngine, tokens/s | ratio | equal answers |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        shown = (row["dtype"], row["requests"], row["vllm"], row["transformers"], row["ratio"])
        lines.append("| " + " | ".join(map(str, shown)) + f" | {row['equal']} of {row['requests']} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
