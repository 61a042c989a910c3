"""Cost of the bench on top of the generating and scoring that it is there for.

    python benchmarks/bench.py

On the demo's tiny models and made-up readers, which come with the package; the plug is untrained, for it is time that
counts. The reference answers the same prompts with the same personas in the same batches and scores the answers, and
nothing else: models are loaded, histories encoded and prompts written before its clock starts. The bench does all of
that too, says what determines each row, writes files, resamples users and draws pictures. Repetitions alternate; medians
and ratios are printed, and that both gave the same answers. The last line is a bench that finds all rows done.
"""

import argparse
import contextlib
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from pplug_hf import PPlugForConditionalGeneration, PPlugProcessor, read_lamp
from pplug_hf.commands.bench import BenchSettings, bench
from pplug_hf.data.lamp import Example
from pplug_hf.methods.names import method_of
from pplug_hf.methods.persona import Plug
from pplug_hf.methods.resources import Resources
from pplug_hf.tasks.task import score

ROWS = ["no-persona", "bm25@1", "pplug:wrong-user", "pplug"]


def rows_of(examples: list[Example], copies: int) -> list[dict]:
    """The questions, as often as wanted, as rows of data; every copy has users of its own."""
    return [
        {"id": f"{e.id}-{i}", "user": f"{e.user}-{i}", "input": e.prompt, "output": e.target, "profile": e.history}
        for i in range(copies)
        for e in examples
    ]


def plain(made: Resources, examples: list[Example], prepared: dict) -> dict[str, list[str]]:
    """The answers of every row by `generate`, and their scores."""
    answers = {}
    for name, (inputs, generate, processor) in prepared.items():
        order = sorted(range(len(inputs.prompts)), key=lambda i: -len(inputs.prompts[i]))
        found = [""] * len(order)
        for start in range(0, len(order), made.batch_size):
            rows = order[start : start + made.batch_size]
            own = {} if inputs.personas is None else {"persona": [inputs.personas[i] for i in rows]}
            if inputs.queries is not None:
                own["query"] = [inputs.queries[i] for i in rows]
            batch = processor(text=[inputs.prompts[i] for i in rows], **own, max_length=made.decoding.max_length)
            with torch.no_grad():
                ids = generate(**batch, max_new_tokens=made.task.max_new_tokens, do_sample=False)
            for i, text in zip(rows, processor.decode_answers(ids, batch["input_ids"].shape[1]), strict=True):
                found[i] = text
        score(made.task, found, [str(e.target) for e in examples])
        answers[name] = found
    return answers


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = function()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=4, help="of the demo's 240 questions")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)

    assets = files("pplug_hf.demo") / "assets"
    task, examples = read_lamp(Path(str(assets / "data")), "dev")
    data = rows_of(examples, args.copies)
    with tempfile.TemporaryDirectory() as folder:
        place, output = str(Path(folder) / "plug"), Path(folder) / "out"
        model = PPlugForConditionalGeneration.from_backbone(
            str(assets / "backbone"), str(assets / "encoder"), item_template=task.item_template
        )
        model.save_pretrained(place)
        settings = BenchSettings(
            data="demo", output=str(output), plugs=[f"pplug={place}"], rows=ROWS, vectors=str(Path(folder) / "vectors")
        )
        comparison = timed(lambda: bench(settings, task, data))[1]  # encodes the histories, once for all
        asked = comparison.examples
        made = Resources(task, {"pplug": [place]}, vectors=settings.vectors)
        plug = made.plug(place)
        prepared = {}
        for name in ROWS:
            method = method_of(name, made.plugs)
            own = (plug.backbone.generate, made.processor)
            if isinstance(method, Plug):
                own = (plug.generate, PPlugProcessor.from_model(plug))
            prepared[name] = (timed(lambda method=method: method.inputs(asked, made))[1], *own)

        times: dict[str, list[float]] = {"plain": [], "bench": [], "bench, all done": []}
        same = True
        for _ in range(args.repetitions):
            shutil.rmtree(output)
            took, comparison = timed(lambda: bench(settings, task, data))
            times["bench"].append(took)
            took, answers = timed(lambda: plain(made, asked, prepared))
            times["plain"].append(took)
            times["bench, all done"].append(timed(lambda: bench(settings, task, data))[0])
            same &= answers == {name: runs[0] for name, runs in comparison.predictions.items()}
    base = statistics.median(times["plain"])
    print(f"{len(data)} questions, {len(ROWS)} rows, one thread, {args.repetitions} repetitions in turns")
    for name, took in times.items():
        print(
            f"  {name:16}{statistics.median(took):7.2f} s ({min(took):.2f} to {max(took):.2f}){statistics.median(took) / base:7.2f}"
        )
    print(f"  the same answers: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
