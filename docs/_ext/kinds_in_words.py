"""Kinds of argument in the words of their conditions: ``int: a whole number of at least 1``."""

from __future__ import annotations

import re
from typing import Any

_BRACKETS = r"\[(?:[^\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\])*\]"
_SAID = r"Condition\(words=(?P<words>.*?), holds=.*?\)|'(?P<text>[^']*)'"
_KIND = re.compile(
    rf"(?:typing\.)?Annotated\[(?P<type>(?:[^\[\],]|{_BRACKETS})*), (?:[\w.]*)(?:{_SAID})\](?=$|[\]), ])"
)


def in_words(annotation: str) -> str:
    """An annotation as Sphinx prints it, without the code of its conditions.

    >>> in_words("Annotated[int, Condition(words=a number, holds=~pplvi.<lambda>)] | None")
    'int: a number | None'
    """
    while (
        shorter := _KIND.sub(lambda kind: f"{kind['type']}: {kind['words'] or kind['text']}", annotation)
    ) != annotation:
        annotation = shorter
    return annotation


def _say(app: Any, *_: Any) -> None:
    for found in app.env.current_document.autodoc_annotations.values():
        found.update({name: in_words(annotation) for name, annotation in found.items()})


def setup(app: Any) -> dict[str, Any]:
    """Before autodoc puts annotations into descriptions."""
    app.connect("object-description-transform", _say, priority=400)
    return {"parallel_read_safe": True}
