"""Encode the history of every user of a prepared data set: one file of vectors per user, without any text.

    python encode.py --plug shop-plug --data shop --output personas

Only the sentence encoder is loaded, not the language model.
"""

import argparse
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from pplug_hf import Personalizer


def persona_file(folder: str | Path, user: str) -> Path:
    """Return the place of a user's vectors; its name says nothing about the user to somebody who reads a list of files."""
    return Path(folder) / f"{hashlib.sha256(user.encode()).hexdigest()[:32]}.safetensors"


def read_histories(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the items of each user, oldest first, from what `pplug-hf prepare` wrote."""
    histories = defaultdict(list)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            histories[item.pop("user")].append(item)
    return dict(histories)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plug", required=True, help="plug folder or Hub id")
    parser.add_argument("--data", required=True, help="folder that pplug-hf prepare made")
    parser.add_argument("--output", required=True, help="folder for the files")
    parser.add_argument("--encoder", help="use the sentence encoder at this place")
    arguments = parser.parse_args()

    histories = read_histories(Path(arguments.data) / "items.jsonl")
    personalizer = Personalizer.from_pretrained(arguments.plug, encoder=arguments.encoder, encode_only=True)
    personas = personalizer.encode(list(histories.values()), batch_size=64)
    for user, persona in zip(histories, personas, strict=True):
        persona.save_pretrained(persona_file(arguments.output, user))
    items = sum(map(len, personas))
    size = sum(file.stat().st_size for file in Path(arguments.output).glob("*.safetensors"))
    print(f"{len(personas)} users, {items} items, {size / len(personas):,.0f} bytes per user")


if __name__ == "__main__":
    main()
