"""The documentation site; `scripts/docs` builds it."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]

import metadist  # noqa: E402  # found by the line above

project = "metadist"
author = "The metadist authors"
copyright = author
version = release = metadist.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_design",
    # In _extensions:
    "algorithm_pages",
    "markdown_links",
    "plain_docstrings",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
smartquotes = False  # a' is the transpose of a
highlight_language = "none"  # indented blocks are formulas, output and commands
python_maximum_signature_line_length = 88

nitpicky = True
# Types of other projects, and those of ours that are not public.
_PACKAGES = "algorithms|cluster|compare|loggers|models|tasks"
nitpick_ignore_regex = [("py:.*", rf"(?!metadist\.(({_PACKAGES})\.)?[A-Z]\w+$).*")]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
autosummary_ignore_module_all = False

html_theme = "pydata_sphinx_theme"
html_title = "metadist"
html_static_path = ["_static"]
html_css_files = ["metadist.css"]
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("index", "gallery", "experiments")}  # no list of pages
html_theme_options = {
    "github_url": "https://github.com/metadist/metadist",
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
}
