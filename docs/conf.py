"""Sphinx configuration: `sphinx-build -W docs docs/_build`, with the package and its extra `docs`."""

import re
from textwrap import indent

project = "hf_vlp"
author = "the authors of hf_vlp"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "hf_vlp"
html_show_copyright = False
myst_heading_anchors = 3

default_role = "code"  # docstrings mark code with single backticks
add_module_names = False
autodoc_default_options = {"member-order": "bysource", "exclude-members": "config_class"}
autodoc_inherit_docstrings = False
autodoc_mock_imports = ["gradio"]  # of the extra `demo`, which the docs go without
autodoc_typehints = "none"  # docstrings tell the shapes, which types do not


def from_markdown(app, what, name, obj, options, lines):
    """What docstrings write as Markdown does: a list right after a line, and tables (shown as they are)."""
    text = re.sub(r"(?m)^([^\s-].*)\n- ", r"\1\n\n- ", "\n".join(lines))
    text = re.sub(r"(?m)(?:^\|.*\n?)+", lambda table: "::\n\n" + indent(table[0], "    ") + "\n", text)
    lines[:] = text.split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", from_markdown)
