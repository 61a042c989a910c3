"""Makes the golden bench folder of a release: python scripts/make_golden_bench.py tests/golden/0.1.0

A later version must go on with it instead of answering anew. It stands beside the golden plugs (make_golden.py), whose
Llama answers here; the data are tiny, synthetic and saved with it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import bench_data  # noqa: E402

from pplug_hf.commands.bench import bench  # noqa: E402

ROWS = (
    *("no-persona", "frequencies", "random@2", "recency@1", "bm25@2", "bm25s@1", "dense@2", "instruction-only"),
    *("pplug:wrong-user", "pplug:no-history", "pplug:top-2", "pplug:last-2", "pplug+bm25@1"),
    *("pplug+bm25@1:paper-order", "pplug"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", type=Path, help="the folder of the release's golden plugs")
    release = parser.parse_args().release
    output = release / "bench"
    if output.exists():
        sys.exit(f"{output} exists: the golden bench of a release stays what it is.")
    bench_data.write_data(output / "data", bench_data.SHELVES)
    with tempfile.TemporaryDirectory() as folder:
        bench(bench_data.golden_settings(release, Path(folder), ROWS), task=bench_data.SHELVES)
        made = Path(folder) / "bench"
        shutil.copytree(made / "predictions", output / "predictions")
        results = json.loads((made / "results.json").read_text(encoding="utf-8"))
        results["settings"] = {k: v for k, v in results["settings"].items() if not str(v).startswith(folder)}
        text = json.dumps(results, indent=2).replace(folder, "").replace(str(ROOT), "")
        (output / "results.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
