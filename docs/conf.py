"""How the documentation is built: `make docs`, from these pages and the package's docstrings, without a network."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import, by what the package imports
sys.path.insert(0, str(Path(__file__).parent / "extensions"))

from pplug_hf.version import __version__

project = "pplug_hf"
author = copyright = "The authors of pplug_hf"
version = release = __version__
html_title = f"{project} {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "docstrings",
    "generated",
    "mathml",
]
exclude_patterns = ["extensions"]

# Pages are Markdown that also reads well where it lies.
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3

# References.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autosummary_generate = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

# A link of a docstring, [`Name`], must lead somewhere. Types in signatures need not: other libraries' are not here.
nitpicky = True
nitpick_ignore_regex = [(r"py:(?!obj|func)\w+", r".*")]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
