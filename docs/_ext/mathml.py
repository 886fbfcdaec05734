"""Formulas as MathML, which browsers draw themselves: pages need no script and no network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert


def _inline(writer: Any, node: Any) -> None:
    writer.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def _display(writer: Any, node: Any) -> None:
    writer.body.append(f'<div class="math">{convert(_without_breaks(node.astext()), display="block")}</div>')
    raise nodes.SkipNode


def _without_breaks(latex: str) -> str:
    """Rows of a formula are aligned where they say so."""
    inside = latex.strip()
    return rf"\begin{{aligned}}{inside}\end{{aligned}}" if r"\\" in inside and r"\begin" not in inside else inside


def setup(app: Any) -> dict[str, Any]:
    """Add the renderer."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True}
