"""Train a plug with the Trainer: `PersonaDataset`, `PPlugCollator`, `PPlugTrainer`.

The steps of `pplug-hf train`, one by one, so that you can change them: read questions in LaMP's format, hold out users,
make examples from the history items, encode every text once, train, and answer for readers who were not in the training
data. Runs offline on the synthetic data that ships with the package.
"""

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path

from transformers import set_seed

from pplug_hf import (
    PersonaDataset,
    PPlugCollator,
    PPlugForConditionalGeneration,
    PPlugProcessor,
    PPlugTrainer,
    PPlugTrainingArguments,
    VectorStore,
    answer,
    history_examples,
    read_lamp,
    shuffle_histories,
    split_users,
)

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="examples per step (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=60, help="questions to answer (default: %(default)s)")
    parser.add_argument("--output", help="folder for the plug (default: one that is removed at the end)")
    arguments = parser.parse_args()
    set_seed(0)

    # Users, not questions, are held out: the plug must work for people it has never seen.
    task, examples = read_lamp(ASSETS / "data", "train")
    _, unseen = read_lamp(ASSETS / "data", "dev", task)
    examples, validation = split_users(examples, fraction=0.1, seed=0)
    examples = examples + history_examples(examples, task, unseen)
    examples, validation = examples[: arguments.steps * arguments.batch_size], validation[: arguments.questions]
    unseen = unseen[: arguments.questions]

    model = PPlugForConditionalGeneration.from_backbone(
        str(ASSETS / "backbone"),
        encoder=str(ASSETS / "encoder"),
        item_template=task.item_template,
    )
    processor = PPlugProcessor.from_model(model)
    model.print_trainable_parameters()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.output or temporary)
        store = VectorStore(model.history_encoder, model.config.history_prompt, folder / "vectors")
        trainer = PPlugTrainer(
            model=model,
            args=PPlugTrainingArguments(
                output_dir=str(folder),
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch_size,
                warmup_steps=0.05,
                logging_steps=20,
                eval_strategy="steps",
                eval_steps=max(1, arguments.steps // 3),
                save_strategy="no",
                prediction_loss_only=True,
                dataloader_pin_memory=False,
                report_to="none",
            ),
            data_collator=PPlugCollator(processor),
            train_dataset=PersonaDataset(examples, store, model.config.item_template, history_dropout=0.5),
            eval_dataset=PersonaDataset(validation, store, model.config.item_template),
            processing_class=processor,
        )
        trainer.train()
        trainer.save_model()
        print(f"{store.encoded} texts encoded, {len(examples)} examples trained on")
        encoded = PersonaDataset(unseen, store, model.config.item_template)
        personas = [encoded.persona(i) for i in range(len(encoded))]

    # If another user's history gives as many right answers, this is not personalisation.
    for name, rows in (("their own history", range(len(unseen))), ("another's", shuffle_histories(unseen))):
        texts = answer(
            model.generate,
            processor,
            [e.prompt for e in unseen],
            personas=[personas[i] for i in rows],
            queries=[e.query for e in unseen],
            max_new_tokens=task.max_new_tokens,
            description=name,
        )
        right = sum(text == e.target for text, e in zip(texts, unseen, strict=True))
        print(f"{right} of {len(unseen)} questions answered as the reader would, with {name}")


if __name__ == "__main__":
    main()
