"""How Sphinx builds these pages: Markdown, docstrings, and equations that need no script and no network."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

project = "evenorm"
author = copyright = "the evenorm authors"
release = version = installed_version("evenorm")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["app.add_node"]

default_role = "code"  # single backticks in docstrings, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"evenorm {release}"
html_static_path = ["static"]
html_css_files = ["equations.css"]
html_math_renderer = "mathml"

TAG = re.compile(r"\\tag\{(\d+)\}")
DIMENSIONS = re.compile(r"\*(?=positions\b)")


def inline_equation(translator: Any, node: nodes.math) -> None:
    """Write an equation within a sentence."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def displayed_equation(translator: Any, node: nodes.math_block) -> None:
    r"""Write an equation of its own; ``\tag{n}`` gives it the number that code cites, and an anchor eq-n."""
    source = node.astext()
    number = TAG.search(source)
    anchor = f' id="eq-{number[1]}"' if number else ""
    label = f"<span>({number[1]})</span>" if number else ""
    drawn = convert(TAG.sub("", source).strip(), display="block")
    translator.body.append(f'<div class="equation"{anchor}>{drawn}{label}</div>')
    raise nodes.SkipNode


def plain_shapes(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep the star of (N, C, *positions) from starting an emphasis; in the source it stays as Python writes it."""
    lines[:] = [DIMENSIONS.sub(r"\\*", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Let the browser draw the equations as MathML, where Sphinx would load a script from elsewhere."""
    app.connect("autodoc-process-docstring", plain_shapes)
    app.add_html_math_renderer("mathml", (inline_equation, None), (displayed_equation, None))
