"""Make the cards in model_cards/ from recipes, from benchmarks/results and from what `pplug-hf demo` makes.

    python scripts/make_model_cards.py                       LaMP's; run it again when benchmarks/results has changed
    python scripts/make_model_cards.py --demo demo-output    the demo's too, of the folder that `pplug-hf demo` filled

Nobody shares weights for LaMP's tasks. Where benchmarks/results has numbers (of the test split, else of dev), the card is
that of the small plugs they are of; elsewhere it is what the paper's recipe would make, without numbers. Each says so, in a note that stands between
the generated parts as a person's text would.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from pplug_hf.commands.train import TrainSettings, recorded_settings
from pplug_hf.configuration import PPlugConfig
from pplug_hf.hub.cards import write_card
from pplug_hf.modeling import plug_folder as files
from pplug_hf.modeling.encoders import is_unused
from pplug_hf.modeling.plug import PersonaPlug
from pplug_hf.storage.layout import TRAIN_SETTINGS
from pplug_hf.tasks.recipes import get_recipe
from pplug_hf.tasks.task import TASKS, get_task

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import lamp_small  # noqa: E402

CARDS, RESULTS = ROOT / "model_cards", ROOT / "benchmarks" / "results"
LAMP = [name for name in TASKS if name.startswith("LaMP-") and name[5:].isdecimal()]
STATED: dict[str, Any] = {"license": "apache-2.0", "language": ["en"]}

PAPER_NOTE = """\
> An example of a card, not a model: no weights are shared. It is what `pplug-hf card` writes for a plug that was
> trained with `pplug-hf train --recipe paper/{name}`; a real one names the commits of backbone and encoder."""
BENCH_NOTE = """\
> An example of a card, not a model: no weights are shared. The numbers are those of
> [benchmarks/results](../benchmarks/results/small-models.md): small plugs on a BART that `benchmarks/train_backbone.py` makes
> from all-MiniLM-L6-v2, trained by `benchmarks/lamp_small.py` on a re-build of the task from public sources. They are
> for comparison within the table, not with published ones."""
DEMO_NOTE = """\
`pplug-hf demo` leaves this plug in `demo-output/plug`. It answers on which shelf a reader would put a book, from the
books this reader shelved before; readers and books are made up by `scripts/make_demo_assets.py`. It shows that the
machinery works, says nothing about real data and is good for nothing else: its vocabulary is a few hundred words.
Backbone and encoder are in the package, `pplug_hf/demo/assets`; the folder records where, so on the machine that made
it both arguments below can be left out."""


def paper_config(name: str) -> PPlugConfig:
    """The plug of the paper's recipe, on FlanT5-XXL and BGE-base."""
    recipe = get_recipe(f"paper/{name}")
    task = get_task(name)
    labelled = recipe.training.get("labelled_items", True)
    return PPlugConfig(
        backbone=recipe.training["backbone"],
        backbone_revision="main",
        backbone_fingerprint={"model_type": "t5", "vocab_size": 32128},
        encoder=recipe.training["encoder"],
        encoder_revision="main",
        encoder_fingerprint={"model_type": "bert"},
        is_encoder_decoder=True,
        hidden_size=4096,
        encoder_size=768,
        **{"item_template": task.item_template if labelled else task.item_template_unlabelled, **recipe.plug},
    )


def bench_config(name: str) -> PPlugConfig:
    """A plug of benchmarks/lamp_small.py."""
    task = get_task(name)
    choices = lamp_small.PLUG | lamp_small.SETUPS[task.name.replace("-", "_")].plug
    return PPlugConfig(
        backbone_fingerprint={"model_type": "bart", "vocab_size": 30522},
        encoder_fingerprint={"model_type": "bert"},
        is_encoder_decoder=True,
        hidden_size=384,
        encoder_size=384,
        **{"item_template": task.item_template, **choices},
    )


def trainable(config: PPlugConfig) -> int:
    """Number of trained parameters; an input encoder counts as a BERT-base."""
    with torch.device("meta"):
        counts = [p.numel() for p in PersonaPlug(config).parameters()]
        if config.train_input_encoder:
            counts += [p.numel() for key, p in BertModel(BertConfig()).named_parameters() if not is_unused(f".{key}")]
    return sum(counts)


def lamp_card(name: str) -> str:
    """The text of an example card.

    Args:
        name: as in "lamp-4".
    """
    found = [RESULTS / f"{name}-{split}" for split in ("test", "dev")]
    results = next((folder for folder in found if (folder / "results.json").is_file()), None)
    config = bench_config(name) if results else paper_config(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not results:
            settings = TrainSettings(**get_recipe(f"paper/{name}").training, data="", output=temporary)
            (folder / TRAIN_SETTINGS).write_text(json.dumps(recorded_settings(settings, get_task(name))))
        where = {"repo_id": f"me/pplug-{name}", "results": results}
        write_card(folder, config, trainable=trainable(config), **where, **STATED)
        text = (folder / "README.md").read_text(encoding="utf-8")
    task = get_task(name).name
    text = text.replace(f"name: {task}\n", f"name: {task}, re-built from public sources\n")
    return with_note(text, BENCH_NOTE if results else PAPER_NOTE.format(name=name))


def demo_card(output: Path) -> str:
    """The text of the card of a plug that `pplug-hf demo` made.

    Args:
        output: of the demo.
    """
    plug = output / "plug"
    options = {**STATED, "tags": ["synthetic"], "repo_id": "me/pplug-demo"}
    options["results"] = output / "results" if (output / "results").is_dir() else None
    (plug / "README.md").unlink(missing_ok=True)
    write_card(plug, files.load_config(plug), **options)
    return with_note((plug / "README.md").read_text(encoding="utf-8"), DEMO_NOTE)


def with_note(text: str, note: str) -> str:
    """A card with a person's text behind its title."""
    end = "<!-- pplug-hf:end title -->\n"
    assert end in text
    return text.replace(end, f"{end}\n{note}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--demo", type=Path, help="what `pplug-hf demo --output` filled")
    args = parser.parse_args()
    cards = {f"pplug-{task.lower()}.md": lamp_card(task.lower()) for task in LAMP}
    if args.demo:
        cards["pplug-demo.md"] = demo_card(args.demo)
    for name, text in cards.items():
        (CARDS / name).write_text(text, encoding="utf-8")
        print(f"{CARDS.name}/{name}")


if __name__ == "__main__":
    main()
