"""The site. ``sphinx-build -W --keep-going docs site`` builds it, and executes the pages that have code cells."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# The pages show what a CPU prints, on any machine. The kernels that execute them inherit this.
os.environ["GPUBATCH_BACKEND"] = "cpu"

import gpubatch

project = "gpubatch"
author = "the gpubatch developers"
copyright = f"2026, {author}"
version = release = gpubatch.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.mermaid",
    "docstrings",
]
exclude_patterns = ["_ext"]
linkcheck_ignore = ["https://host/"]  # an example
nitpicky = True  # a reference that leads nowhere is a warning, and with -W an error

html_theme = "pydata_sphinx_theme"
html_title = "gpubatch"
html_static_path = ["_static"]
html_css_files = ["gpubatch.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "show_prev_next": True,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
autosummary_generate = False
# PyTorch is large, and the reference of gpubatch.torch needs no more than its name.
autodoc_mock_imports = [] if find_spec("torch") else ["torch"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
mermaid_dark_theme = "default"  # one picture for both themes, on a white ground
mermaid_fullscreen_button = "+"
nb_execution_mode = "cache"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
