"""A file in each repository that tells users without this package to install it.

For a model type that it does not know, transformers looks into the repository's `auto_map` and runs the code named there, if
the user trusts it. That code is a single import, the same in every repository, and an error that says where the package is:
transformers' own would say `pip install pplug_hf`, a name that on PyPI may be anybody's. Once pplug_hf is imported,
transformers uses the installed classes and never reads the file.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..storage.layout import CONFIG

STUB = "modeling_pplug.py"
_TEXT = '''"""This plug needs the package pplug-hf: install it from a checkout of its repository, and `import pplug_hf` before you load it.

After that import nothing in this file is used, and trust_remote_code is not needed.
"""

try:
    from pplug_hf import PPlugConfig, PPlugForConditionalGeneration, PPlugProcessor  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "This plug needs the package pplug-hf: run `pip install .` in a checkout of its repository, and `import pplug_hf` "
        "before you load the plug."
    ) from error
'''


def add_stub(folder: Path) -> None:
    """Add the file and its `auto_map` to a plug folder that is about to be pushed."""
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model = "AutoModelForSeq2SeqLM" if values.get("is_encoder_decoder") else "AutoModelForCausalLM"
    classes = {"AutoConfig": "PPlugConfig", "AutoProcessor": "PPlugProcessor"}
    classes |= dict.fromkeys(("AutoModel", model), "PPlugForConditionalGeneration")
    values["auto_map"] = {auto: f"{Path(STUB).stem}.{name}" for auto, name in classes.items()}
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / STUB).write_text(_TEXT, encoding="utf-8")
