"""Trainings that one process or several can run, the same examples in every step: what test_distributed.py compares.

accelerate launch --multi_gpu --num_processes 2 tests/processes.py FOLDER '{"NAME": {OPTIONS}, ...}'
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from test_training import make_examples, make_model, make_trainer, plug_of, quiet

from pplug_hf.data.dataset import PersonaDataset
from pplug_hf.data.vectors import VectorStore
from pplug_hf.modeling import saving

PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
NEW = {"some": (), "none": range(4), "nobody": range(8)}  # who of every eight users has no history


def train(folder, family="t5", new="some", accumulated=1, resume=None, predict=False, **arguments):
    """Train on batches of eight; what a process saw is kept in `folder` under its rank."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = make_examples(16, items=12)
    for i in NEW[new]:
        examples[i].history = examples[i + 8].history = []
    store = VectorStore(tiny.shared_encoder(), folder=folder / "vectors")
    data = PersonaDataset(examples, store, history_dropout=0.9, seed=3)
    options = {
        "per_device_train_batch_size": 8 // PROCESSES // accumulated,
        "gradient_accumulation_steps": accumulated,
        "max_steps": 6,
        "logging_steps": 1,
        "optim": "sgd",  # whose step is the gradient
        "learning_rate": 0.5,
        "encoder_learning_rate": 0.5,
        "predict_with_generate": predict,
    }
    model = quiet(make_model(family, seed=5 if resume else 0))
    trainer = make_trainer(model, folder, data, **options | arguments)
    saves, replacing = [], saving.replacing
    saving.replacing = lambda place: saves.append(str(place)) or replacing(place)
    try:
        trainer.train(resume_from_checkpoint=str(folder.parent / resume) if resume else None)
    finally:
        saving.replacing = replacing
    seen = {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "encoded": store.encoded,
        "saves": len(saves),
    }
    if predict:
        predictions = trainer.predict(data, max_new_tokens=5)
        seen["answers"] = trainer.processing_class.decode_answers(predictions.predictions, 0)
    (folder / f"seen-{RANK}.json").write_text(json.dumps(seen), encoding="utf-8")
    save_file(plug_of(model), folder / f"plug-{RANK}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, choices in json.loads(sys.argv[2]).items():
        train(Path(sys.argv[1], name), **choices)
    PartialState().destroy_process_group()  # or its threads now and then abort the process at its end
