"""What a repository says to those who have not installed this package.

transformers looks into a repository's `auto_map` for model types that it does not know, and says which packages the
code named there needs: `pip install pplug_hf`. That code is one import, the same in every repository. Where pplug_hf is
imported, transformers takes the installed classes without asking and reads none of it.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..storage.layout import CONFIG

STUB = "modeling_pplug.py"
_TEXT = '''"""This plug needs the package pplug-hf: run `pip install pplug-hf`, and `import pplug_hf` before you load it.

After that import nothing of this file is used, and there is no need for trust_remote_code.
"""

from pplug_hf import PPlugConfig, PPlugForConditionalGeneration, PPlugProcessor  # noqa: F401
'''


def add_stub(folder: Path) -> None:
    """Put the file and its `auto_map` into a plug folder that is going to be pushed."""
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model = "AutoModelForSeq2SeqLM" if values.get("is_encoder_decoder") else "AutoModelForCausalLM"
    classes = {"AutoConfig": "PPlugConfig", "AutoProcessor": "PPlugProcessor"}
    classes |= dict.fromkeys(("AutoModel", model), "PPlugForConditionalGeneration")
    values["auto_map"] = {auto: f"{Path(STUB).stem}.{name}" for auto, name in classes.items()}
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / STUB).write_text(_TEXT, encoding="utf-8")
