"""The site: run ``make docs``."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]
for name in ("MPLBACKEND",):  # notebooks have their own
    os.environ.pop(name, None)
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # pages have no use for the bars of notebooks

import pplvi  # noqa: E402

project, author, version = "pplvi", "pplvi developers", pplvi.__version__
release = version
extensions = ["sphinx.ext.autodoc", "sphinx.ext.intersphinx", "myst_nb", "pages", "mathml", "kinds_in_words"]
root_doc = "index"
exclude_patterns = ["_build", "_ext", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"pplvi {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# Only where there is a network: the build itself needs none.
ONLINE = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "pyro": ("https://docs.pyro.ai/en/stable", None),
    "arviz": ("https://python.arviz.org/en/stable", None),
}
intersphinx_mapping = ONLINE if os.environ.get("PPLVI_DOCS_ONLINE") else {}

myst_enable_extensions = ["dollarmath", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "cells")
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]
