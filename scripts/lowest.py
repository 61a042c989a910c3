"""The lowest versions that setup.cfg declares, as pip constraints, to test with: python scripts/lowest.py > lowest.txt"""

import configparser
import re
from pathlib import Path

SETUP = Path(__file__).parent.parent / "setup.cfg"


def lowest(text: str) -> dict[str, str]:
    """Lowest version by package, of every requirement in the text of a setup.cfg that has a lower bound.

    Raises:
        ValueError: a package has two lower bounds.
    """
    config = configparser.ConfigParser()
    config.read_string(text)
    sections = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    found: dict[str, str] = {}
    for line in "\n".join(sections).splitlines():
        if match := re.match(r"([\w.-]+)(?:\[.*\])?\s*>=\s*([\w.]+)", line):
            name, version = match.groups()
            if found.setdefault(name, version) != version:
                raise ValueError(f"{name} has two lower bounds, {found[name]} and {version}: declare it with one.")
    return found


if __name__ == "__main__":
    for name, version in lowest(SETUP.read_text(encoding="utf-8")).items():
        print(f"{name}=={version}")
