"""Presets: recipes for any task, by the number of training examples.

    pplug-hf train --preset small --data my-data --output my-plug ...      options you pass override it

    preset = get_recipe("preset/small")
    train(TrainSettings(**preset.training, data="my-data", output="my-plug", ...), **preset.plug)

What was measured: frozen SmolLM2-135M-Instruct in bfloat16, placement "answer", 300 steps of 32 examples, one seed; figures
are losses per token on training users who were held out. LaMP-1 has 2,010 examples, LaMP-2 5,027 and LaMP-3 8,000.
"""

from dataclasses import replace

from .recipes import Recipe

SMALL = Recipe(
    name="preset/small",
    training={
        "epochs": 10,
        "patience": 5,
        "learning_rate": 1e-2,
        "history_dropout": 0.5,
        "validation_users": 0.15,
    },
    plug={
        "placement": "answer",
        "num_persona_tokens": 4,
        "projector_size": 256,
        "attention_temperature": 0.1,
        "learn_temperature": True,
        "train_input_encoder": False,
    },
    reasons={
        "epochs": "More than needed: patience ends the training.",
        "patience": "Stops when held-out users no longer gain; a small data set is soon memorised.",
        "learning_rate": "Of 1e-3, 3e-3, 1e-2 and 3e-2 the highest was best (LaMP-2: 0.782, 0.749, 0.711, 0.647; LaMP-3: 1e-3 "
        "0.738, 1e-2 0.640, 3e-2 0.629). In 150 steps of 16 examples 1e-1 was better still (LaMP-2 0.675, 3e-2 0.730, 1e-2 "
        "0.800; LaMP-4 3.806, 3.863, 3.908), and 900 steps of LaMP-3 ended at 0.624 with 2e-1. 1e-2 leaves room for backbones not "
        "measured; try 3e-2 and 1e-1 too.",
        "history_dropout": "Each epoch shows other histories of the same users. Without it LaMP-2 was the same on test (nats 0.005 "
        "better) and on dev (0.008 worse), both within chance.",
        "validation_users": "Of few users, a tenth are too few to choose a checkpoint by.",
        "placement": "LaMP-2 after 100 steps: loss 0.866 behind the question, 1.208 in front; accuracy 0.299 and 0.149. The "
        "prompt's states do not depend on the user and are computed once: a step takes a sixth of the time.",
        "num_persona_tokens": "4 and 8 are close (LaMP-2 0.647 and 0.622, LaMP-3 0.629 and 0.633; on LaMP-1 nothing made a "
        "difference: all between 0.177 and 0.187).",
        "projector_size": "Fewer parameters for few users, whatever the backbone's width. With the backbone's 576 LaMP-2 was the same "
        "(nats 0.002 better on test, 0.006 worse on dev).",
        "attention_temperature": "At 1, unit vectors get almost equal weights. A mean of all items, the limit of that, is "
        "worse: LaMP-2 0.680 instead of 0.647, LaMP-3 0.637 instead of 0.629.",
        "learn_temperature": "How sharply to choose among items depends on the task. Fixed at 1, LaMP-2 was worse by 0.036 nats "
        "(p .0007); not compared with a fixed 0.1.",
        "train_input_encoder": "The plug takes a few megabytes, not those of a sentence encoder, and requests are encoded once.",
    },
)
_UNMEASURED = "Not measured."
LARGE = replace(
    SMALL,
    name="preset/large",
    training={
        "epochs": 3,
        "evaluations_per_epoch": 4,
        "patience": 5,
        "learning_rate": 3e-3,
        "encoder_learning_rate": 1e-4,
        "history_dropout": 0.5,
    },
    plug={**SMALL.plug, "num_persona_tokens": 8, "train_input_encoder": True},
    reasons={
        **{name: why for name, why in SMALL.reasons.items() if name in (*SMALL.plug, "history_dropout")},
        "epochs": f"With tens of thousands of examples a few passes are many steps. {_UNMEASURED}",
        "evaluations_per_epoch": f"Passes are few, and the best checkpoint may lie within one. {_UNMEASURED}",
        "patience": "More than a pass without a gain for held-out users.",
        "learning_rate": f"Lower than for small data, as there are more steps, and an encoder that is trained. {_UNMEASURED}",
        "encoder_learning_rate": f"The paper's: the encoder is trained already. {_UNMEASURED}",
        "num_persona_tokens": f"More examples can fill more tokens; 8 were best on LaMP-2 (0.622; 4: 0.647). {_UNMEASURED[:-1]} "
        "on large data.",
        "train_input_encoder": "As in the paper, whose data sets are of this size; the plug then holds a copy of the encoder. "
        + _UNMEASURED,
    },
)
