"""Formulas as MathML, which browsers draw themselves: pages need no script and no network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

SCRIPT = dict(zip("BEFHILMR", "ℬℰℱℋℐℒℳℛ", strict=True))  # the others follow each other in Unicode
LEFT = re.compile(r"(<m[io][^>]*>)\\(\w+|[{}|])(?=<)")  # commands that the converter does not know: arg, and big braces
FUNCTION = r"(<mi>(?:log|exp|det|min|max|arg)</mi>)(?!<mo[^>]*>&#x00028;)"


def mathml(latex: str, display: str) -> str:
    """A formula. Browsers know no script variant of letters, and no space after the name of a function.

    >>> "ℒ" in mathml(r"\\mathcal L", "inline"), "\\\\" in mathml(r"\\arg\\max_x \\big\\{ x \\big\\|", "inline")
    (True, False)
    """
    found = convert(latex, display=display)
    found = LEFT.sub(lambda mark: mark[1] + mark[2].replace("|", "‖"), found)
    found = re.sub(r'<mi mathvariant="script">([A-Z])</mi>', lambda letter: f"<mi>{_script(letter[1])}</mi>", found)
    return re.sub(FUNCTION, r'\1<mspace width="0.17em" />', found)


def _script(letter: str) -> str:
    return SCRIPT.get(letter, chr(0x1D49C + ord(letter) - ord("A")))


def _inline(writer: Any, node: Any) -> None:
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _display(writer: Any, node: Any) -> None:
    writer.body.append(f'<div class="math">{mathml(_without_breaks(node.astext()), "block")}</div>')
    raise nodes.SkipNode


def _without_breaks(latex: str) -> str:
    """Rows of a formula are aligned where they say so."""
    inside = latex.strip()
    return rf"\begin{{aligned}}{inside}\end{{aligned}}" if r"\\" in inside and r"\begin" not in inside else inside


def setup(app: Any) -> dict[str, Any]:
    """Add the renderer."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True}
