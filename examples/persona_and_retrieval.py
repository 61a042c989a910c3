"""A persona together with retrieval: the persona describes the user, retrieved items show similar earlier answers.

Trains a plug on the synthetic readers that ship with the package, then answers the same questions with the persona only,
with retrieved items only, and with both, in the paper's order (items, persona, input) and in ours (persona first). The
small backbone here has never seen a prompt with items in it, so do not expect them to help.
"""

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path

from pplug_hf import (
    Comparison,
    PPlugProcessor,
    TrainSettings,
    answer,
    get_ranker,
    get_task,
    markdown,
    persona_positions,
    read_lamp,
    retrieval_prompt,
    retrieve,
    train,
)

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))
MAX_LENGTH = 128  # maximum prompt length in tokens, items included


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=1, help="passes over the examples (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=120, help="questions to answer (default: %(default)s)")
    parser.add_argument("--k", type=int, default=2, help="items to retrieve (default: %(default)s)")
    arguments = parser.parse_args()
    task = get_task("demo")
    _, examples = read_lamp(ASSETS / "data", "dev", task)
    examples = examples[: arguments.questions]

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            data=str(ASSETS / "data"),
            backbone=str(ASSETS / "backbone"),
            encoder=str(ASSETS / "encoder"),
            output=f"{folder}/plug",
            vectors=f"{folder}/vectors",
            epochs=arguments.epochs,
            batch_size=64,
        )
        model = train(settings, placement="prompt")  # which the paper's order is about
    processor = PPlugProcessor.from_model(model)

    # The benchmark's BM25 finds items, the task's prompt format shows them; each is cut to its part of the budget.
    found = retrieve(get_ranker("bm25", task), examples, k=arguments.k)
    prompts = [
        retrieval_prompt(task, e.prompt, items, processor.tokenizer, MAX_LENGTH)
        for e, items in zip(examples, found, strict=True)
    ]
    print(f"\nA prompt with {arguments.k} items:\n  {prompts[0].text}\n")

    texts = [prompt.text for prompt in prompts]
    plain = [e.prompt for e in examples]
    personas = model.encode_persona([e.history for e in examples])
    behind = persona_positions(processor, prompts, MAX_LENGTH)  # tokens before the persona: the paper's order
    rows = {
        "no persona": (model.backbone.generate, plain, {}),
        "retrieval": (model.backbone.generate, texts, {}),
        "persona + retrieval, the paper's order": (
            model.generate,
            texts,
            {"personas": personas, "persona_positions": behind},
        ),
        "persona + retrieval, persona first": (model.generate, texts, {"personas": personas}),
        "persona": (model.generate, plain, {"personas": personas}),
    }
    comparison = Comparison(task, examples, reference="persona")
    for name, (generate, prompt, options) in rows.items():
        if options:
            options["queries"] = [e.query for e in examples]  # decides which history items matter
        answers = answer(
            generate,
            processor,
            prompt,
            **options,
            max_length=MAX_LENGTH,
            max_new_tokens=task.max_new_tokens,
            description=name,
        )
        comparison.add(name, answers)
    print(f"\n{markdown(comparison)}")


if __name__ == "__main__":
    main()
