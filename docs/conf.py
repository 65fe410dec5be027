"""Sphinx: pages and notebooks in MyST, notebooks executed at build, reference pages from the docstrings."""

import os
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "bayesinf"
author = "The bayesinf authors"
copyright = "The bayesinf authors, Apache-2.0"
release = version = metadata.version("bayesinf")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "plain_docstrings",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "sphinx_book_theme"
html_title = "bayesinf"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# the pages at the top of the repository point at files beside them
suppress_warnings = ["myst.xref_missing"]

nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, of notebooks without widgets

default_role = "code"
autodoc_typehints = "none"  # the shapes are in the signature
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False  # they are in the text, and a "*batch" of them would be emphasis
napoleon_custom_sections = [("Class attributes", "params_style")]
