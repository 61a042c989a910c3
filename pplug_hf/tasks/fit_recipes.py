"""Recipes of `pplug-hf fit`: the settings of a baseline's paper, and ours with reasons.

    pplug-hf fit --recipe paper/ropg-kd --data LaMP_4 --output ropg      options you pass override it
    pplug-hf recipes --name ours/ropg-kd                                 what is in it, and why

Nobody has measured ours on a large language model.
"""

from __future__ import annotations

from .recipes import Recipe

_ROPG_PAPER = {
    "backbone": "google/flan-t5-xxl",
    "encoder": "facebook/contriever",
    "backbone_dtype": "bfloat16",
    "max_length": 512,
    "num_beams": 4,
    "candidates_by": "dense",
    "candidates": 16,
    "reward": "metric",
    "trained_side": "both",
    "dated_items": True,
    "epochs": 10,
    "patience": 10,
    "questions_per_step": 64,
    "learning_rate": 1e-5,
    "warmup": 0.05,
    "temperature": 1.0,
    "learn_temperature": False,
}
_ROPG_NOT_REPRODUCED = (
    "A history shorter than the candidates is masked. The authors' code pads it with empty items, which take part in the "
    "softmax, on LaMP-3 with a reward above that of every real item.",
    "The epoch with the best reward on held-out users is kept; the authors save at fixed steps and do not validate.",
    "Equal rewards of all candidates are kept, as in the paper; --drop_uninformative leaves them out.",
    "The encoder's dropout is off; in the authors' code it is on, even while a candidate is drawn.",
    "The rewards of LaMP-3 are divided by the largest possible error, as in the paper's equation 8.",
)
_ROPG_OURS = {
    "candidates": (8, "Half the work for the language model; beyond the first items rewards hardly differ."),
    "reward": (
        "log_prob",
        "It differs between items even where answers do not, and costs a third of a generation; for texts it is per token.",
    ),
    "trained_side": ("query", "Item vectors stay in the store, so an epoch encodes questions alone."),
    "dated_items": (False, "Items have the texts, and the vectors, of the rows dense@K, with which it is compared."),
    "epochs": (10, "More than needed: patience ends the training."),
    "patience": (3, "Stops when the items that are put first no longer get better on held-out users."),
    "questions_per_step": (32, "A small data set has few questions, and smaller batches make more steps."),
    "learning_rate": (
        1e-4,
        "One side of the encoder is trained, from a good start. Of 3e-5, 1e-4, 3e-4 and 1e-3 the best for held-out users on movie "
        "tags with SmolLM2-135M, for ropg-kd (rewards -12.23, -11.99, -12.15, -12.20) and for ropg-rl (-12.18, -12.04, -12.16, "
        "-12.54).",
    ),
    "temperature": (
        0.05,
        "Vectors of unit length differ by 2 at most, so at 1 the softmax is almost uniform whatever is learned.",
    ),
    "learn_temperature": (True, "How sharp the ranking should be depends on the encoder and the rewards."),
}
_KD = {"target_temperature": (None, "0.25 for the metric: at 1, one right item of 16 gets 0.15 of the target.")}
_RL = {"loss": ("exact", "All rewards are known, so the expected gradient needs no drawing, and has no noise.")}
_RSPG_PAPER = {
    "backbone": "google/flan-t5-xxl",
    "encoder": "facebook/contriever",
    "backbone_dtype": "bfloat16",
    "max_length": 512,
    "num_beams": 4,
    "order": "paper",
    "row_heads": False,
    "text_length": 512,
    "target_temperature": 1.0,
    "epochs": 20,
    "patience": 20,
    "questions_per_step": 64,
    "learning_rate": 1e-5,
    "head_learning_rate": 1e-5,
    "warmup": 0.05,
}
_RSPG_NOT_REPRODUCED = (
    "The selector starts from the sentence encoder that is given, with its pooling, and 512 tokens; the paper's from "
    "Longformer-base with 1,024 tokens.",
    "The pool is what --pool and --trained say; the paper's is no items, and 4 items of recency, BM25, Contriever, ROPG-RL "
    "and ROPG-KD.",
    "A text that is too long loses its start; in the authors' code it loses its end, which is the question and the answer.",
    "The selector learns from users on whom no ranker of the pool was trained; the authors use the same questions.",
    "The epoch with the best choice on held-out users is kept; the authors choose a checkpoint on dev.",
    "Questions to which all answers are equally good are left out.",
    "Rewards of LaMP-3 are divided by the largest possible error, as in the authors' code.",
)
_RSPG_OURS = {
    "order": ("answer-first", "What is cut is the rest of the prompt, not the question and the answer."),
    "row_heads": (
        True,
        "Which row is better on average is learned in a few steps; and a plug's row has the prompt of the language model "
        "alone, so a shared head cannot tell them apart before anything is answered.",
    ),
    "text_length": (None, "The length that the encoder was made for."),
    "target_temperature": (
        None,
        "0.25 where rewards are 0 or 1: at 1, the only good one of six rows gets 0.35 of the target.",
    ),
    "epochs": (5, "Few questions have answers that are not all equally good, and a small encoder learns them fast."),
    "patience": (3, "Stops when the choice on held-out users no longer gets better."),
    "questions_per_step": (16, "A step reads a text for every row of the pool, so this is about 100 texts."),
    "learning_rate": (3e-5, "Usual for fine-tuning a small sentence encoder. Not compared with other values."),
    "head_learning_rate": (
        1e-2,
        "The head starts at zero; vectors of unit length need large weights before its scores differ.",
    ),
}

_FTP = {
    "epochs": (7, "Few items need several passes; those who need fewer stop early."),
    "learning_rate": (
        1e-3,
        "Twenty times the paper's, for a quarter of its passes: of 2e-4, 5e-4, 1e-3 and 2e-3 the best for held-out users on "
        "movie tags with SmolLM2-135M, and better than 5e-4 on the demo's readers.",
    ),
}
_OPPU = {
    "learning_rate": (
        5e-4,
        "Five times the authors', without their warm-up and fall. On movie tags with SmolLM2-135M 2e-4, 5e-4, 1e-3 and 2e-3 had "
        "losses of 0.643, 0.614, 0.620 and 0.613 for held-out users.",
    ),
    "clip": (1.0, "The usual one. Not compared with other values."),
    "modules": ("qkv", "Those of ftp, for both LoRAs."),
    "epochs": (2, "The LoRA of the task has learned the form of an answer; a user's own is a small step from there."),
    "task_epochs": (3, "The authors' number."),
    "task_learning_rate": (5e-4, "As of the private weights. Not compared with other values."),
}
_LORA_OURS = {
    "rank": (8, "The size that is usual for one user's few items. Not compared with other values."),
    "alpha": (16, "Twice the rank. Not compared with other values."),
    "dropout": (0.0, "A training of a few passes is short; without noise it is also reproducible step by step."),
    "schedule": ("constant", "A user's few items make few steps, which a falling rate would waste."),
    "warmup": (0.0, "Likewise."),
    "weight_decay": (0.0, "A training of a few passes is short, and ends when the items are learned."),
    "pairs_per_step": (8, "More steps from a user's few items. Not compared with other values."),
    "stop_below": (0.1, "A user whose items are learned needs no further passes."),
    "items": ("common", "No weights have seen an item that a question's history does not have."),
}
_FTP_PAPER = {
    "backbone": "google/flan-t5-xxl",
    "max_length": 512,
    "num_beams": 4,
    "rank": 8,
    "alpha": 32.0,
    "dropout": 0.1,
    "modules": "qkv",
    "epochs": 30,
    "learning_rate": 5e-5,
    "schedule": "linear",
    "warmup": 0.05,
    "weight_decay": 1e-4,
    "pairs_per_step": 16,
    "stop_below": 0.0,
}
_OPPU_PAPER = {
    "backbone": "meta-llama/Llama-2-7b-hf",
    "backbone_dtype": "bfloat16",
    "max_length": 1024,
    "rank": 8,
    "alpha": 8.0,
    "dropout": 0.05,
    "modules": "qv",
    "epochs": 2,
    "task_epochs": 3,
    "learning_rate": 1e-4,
    "task_learning_rate": 1e-4,
    "schedule": "linear",
    "warmup": 0.1,
    "weight_decay": 0.01,
    "clip": 0.3,
    "pairs_per_step": 16,
    "task_pairs_per_step": 16,
    "stop_below": 0.0,
}
_USERS_NOT_REPRODUCED = (
    "Only items that all questions of a user have in their histories are trained on, and none that is asked; the authors "
    "train on the first question's whole history, which holds answers of other questions (--items union does).",
    "Pairs of one length share a batch more often, and the seed of a user depends on the user's name.",
)
_FTP_NOT_REPRODUCED = (
    "Every user is answered by the weights that were trained. In the authors' code all users but the first of a process are "
    "answered by the bare model: their weights are saved under names that nothing reads.",
)
_OPPU_NOT_REPRODUCED = (
    "A user's weights learn from this user's items alone. The authors' code keeps the items of all users before in the list.",
    "The LoRA of the task has the layers of the private one; the authors' has those of keys too.",
    "Answers are decoded as those of all other rows; the authors sample at a temperature of 0.1.",
    "There is no textual profile of the user in the prompt.",
)


def _ours(method: str, own: dict) -> Recipe:
    settings = own
    return Recipe(
        name=f"ours/{method}",
        training={"method": method} | {name: value for name, (value, _) in settings.items() if value is not None},
        plug={},
        reasons={name: why for name, (_, why) in settings.items()},
    )


def _paper(method: str, own: dict, not_reproduced: tuple[str, ...]) -> Recipe:
    return Recipe(name=f"paper/{method}", training={"method": method, **own}, plug={}, not_reproduced=not_reproduced)


RECIPES = (
    _paper("ropg-kd", {**_ROPG_PAPER, "loss": "paper", "target_temperature": 1.0}, _ROPG_NOT_REPRODUCED),
    _ours("ropg-kd", _ROPG_OURS | _KD),
    _paper("ropg-rl", {**_ROPG_PAPER, "loss": "sampled"}, _ROPG_NOT_REPRODUCED),
    _ours("ropg-rl", _ROPG_OURS | _RL),
    *(
        recipe
        for method in ("rspg-pre", "rspg-post")
        for recipe in (_paper(method, _RSPG_PAPER, _RSPG_NOT_REPRODUCED), _ours(method, _RSPG_OURS))
    ),
    _paper("ftp", _FTP_PAPER, _FTP_NOT_REPRODUCED + _USERS_NOT_REPRODUCED),
    _ours("ftp", _LORA_OURS | _FTP),
    _paper("oppu", _OPPU_PAPER, _OPPU_NOT_REPRODUCED + _USERS_NOT_REPRODUCED),
    _ours("oppu", _LORA_OURS | _OPPU),
)
