"""The documentation site: ``python3 run.py docs``."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

from dit_mlflow import __version__

HERE = Path(__file__).parent

project = "dit-mlflow"
author = copyright = "the authors of dit-mlflow"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_nb"]
exclude_patterns = ["**.ipynb_checkpoints"]
html_theme = "pydata_sphinx_theme"
html_title = "dit-mlflow"
html_theme_options = {
    "logo": {"text": "dit-mlflow"},
    "header_links_before_dropdown": 7,
    "navbar_end": ["theme-switcher"],
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Pages without neighbours.
html_sidebars = {page: [] for page in ("index", "quickstart", "tutorial", "methods", "gallery")}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say more: shapes, units, what a function takes
# With it, "optimizer, batch_size, epochs: …" is read as one name and two types.
napoleon_use_param = False
toc_object_entries_show_parents = "hide"
highlight_language = "none"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The notebook is run at each build, and ends it where a cell fails.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True


def bring_readmes(_: Sphinx) -> None:
    """The projects' README files as pages of the site, which takes pages of its own folder alone."""
    pages = HERE / "projects"
    pages.mkdir(exist_ok=True)
    for readme in sorted((HERE.parent / "projects").glob("*/README.md")):
        text = re.sub(r"\]\(\.\./(\w+)/README\.md", r"](\1.md", readme.read_text(encoding="utf-8"))
        text = re.sub(r"\]\((?=[\w-]+\.txt\))", f"](../../projects/{readme.parent.name}/", text)
        (pages / f"{readme.parent.name}.md").write_text(text, encoding="utf-8")


def lead_to_pages(_: Sphinx, __: str, source: list[str]) -> None:
    """Links to those files lead to their pages; in the repository, they lead to the files."""
    source[0] = re.sub(r"\]\(\.\./projects/(\w+)/README\.md", r"](projects/\1.md", source[0])


def name_parameters(_: Sphinx, what: str, __: str, ___: object, ____: object, lines: list[str]) -> None:
    """The attributes of our classes are what they are made of."""
    if what == "class":
        lines[:] = ["Args:" if line == "Attributes:" else line for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", name_parameters, priority=400)  # before napoleon
    app.connect("builder-inited", bring_readmes)
    app.connect("source-read", lead_to_pages)
