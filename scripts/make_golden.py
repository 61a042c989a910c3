"""Makes the golden plugs of a release: python scripts/make_golden.py tests/golden/0.1.0

A later version of the package must load them, and answer as this one did. Each is complete: plug, persona, backbone and
encoder with their weights, the questions, and the answers, so that nothing depends on random generators being the
same elsewhere. They are made once per release, by the release, and never again.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BatchFeature
from transformers.utils.logging import disable_progress_bar

from pplug_hf import PPlugForConditionalGeneration, PPlugProcessor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402

NEW_TOKENS = 8
MARGIN = 0.02  # logits by which each answer's tokens must lead: rounding differs between machines and versions

ITEMS = [
    {"title": "the sea", "text": "a dark film about the sea", "year": 1999},
    {"title": "summer", "text": "the best book of the summer"},
    {"title": "rain", "text": "i like rain"},
    {"title": "moon", "text": "my dog and the moon"},
]
PROMPTS = ["write a story about the night sky", "what is a good film", "the"]
QUERIES = ["the night sky", "a good film", "the"]
TEXTS = [item["text"] for item in ITEMS]
# The paper's shape, and one that uses everything else.
KINDS = {
    "t5": {"histories": [TEXTS, TEXTS[2:3], []], "choices": {}},
    "llama": {
        "histories": [ITEMS, ITEMS[2:3], []],
        "choices": {
            "num_persona_tokens": 2,
            "projector_size": 5,
            "attention_temperature": 0.3,
            "learn_temperature": True,
            "query_prompt": "what is ",
            "history_prompt": "a film about ",
            "item_template": "{title} {text}",
        },
    },
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="a new folder, named after the release")
    output = parser.parse_args().output
    if output.exists():
        sys.exit(f"{output} exists: the golden plugs of a release stay what they are.")
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = tiny.encoder()
    encoder.save(str(output / "encoder"), create_model_card=False)
    for family, kind in KINDS.items():
        folder, tokenizer = output / family, tiny.tokenizer(family)
        asked = {"prompts": PROMPTS, "histories": kind["histories"], "queries": QUERIES, "max_new_tokens": NEW_TOKENS}
        for seed in itertools.count():
            backbone = tiny.backbone(family, seed)
            model = tiny.from_backbone(backbone, encoder, tokenizer=tokenizer, **kind["choices"])
            tiny.randomise(model.plug, seed)
            if lead(model, asked) > MARGIN:
                break
        backbone.save_pretrained(folder / "backbone")
        model.save_pretrained(folder / "plug")
        PPlugProcessor.from_model(model).save_pretrained(folder / "plug")
        model.encode_persona(kind["histories"][0]).save_pretrained(folder / "persona")
        (folder / "asked.json").write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
        save_file(answers(model, asked), folder / "answers.safetensors")
    total = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"made {output}, {total:,} bytes")


def lead(model: PPlugForConditionalGeneration, asked: dict) -> float:
    """By how much the least certain token of the greedy answers leads."""
    batch = asked_of(model, asked)
    settings = {"max_new_tokens": asked["max_new_tokens"], "return_dict_in_generate": True, "output_logits": True}
    best, second = torch.stack(model.generate(**batch, **settings).logits).topk(2).values.unbind(-1)
    return (best - second).min().item()


def answers(model: PPlugForConditionalGeneration, asked: dict) -> dict[str, torch.Tensor]:
    """What the model answers, by name; greedy, and with beams."""
    batch = asked_of(model, asked)
    persona = {"persona": batch["persona"], "query": batch["query"]}
    labels = {"labels": batch["input_ids"]} if model.config.is_encoder_decoder else {}
    given = {
        "input_ids": batch["input_ids"],
        "soft_prompt": model.soft_prompt(**persona),
        "weights": model.persona_weights(**persona),
        "logits": model(**batch, **labels).logits[:, -1],
        "greedy": model.generate(**batch, max_new_tokens=asked["max_new_tokens"]),
        "beams": model.generate(**batch, max_new_tokens=asked["max_new_tokens"], num_beams=3),
    }
    return {name: tensor.contiguous() for name, tensor in given.items()}


def asked_of(model: PPlugForConditionalGeneration, asked: dict) -> BatchFeature:
    return PPlugProcessor.from_model(model)(asked["prompts"], persona=asked["histories"], query=asked["queries"])


if __name__ == "__main__":
    main()
