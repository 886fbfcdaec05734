"""Every argument of every public class and function takes hostile values, or refuses them with words."""

from pathlib import Path

import hostile
import pytest
from matplotlib import pyplot

PUBLIC = hostile.public()
PARTS = 5
SLOW = {("fit", "compile", "True")}  # compiles, as it is asked to


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.table(PARTS)
def test_hostile_values_are_refused_with_words(
    name: str, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``ValueError``, a ``TypeError``, or a result, in time; each part has other values of every argument."""
    monkeypatch.chdir(tmp_path)  # any word is a good path to write to
    if not part:
        hostile.works(name, PUBLIC[name])
    wrong = []
    for row, parameter in enumerate(hostile.parameters(PUBLIC[name])):
        for column, (shown, value) in enumerate(hostile.values().items()):
            if (row + column) % PARTS == part and (name, parameter, shown) not in SLOW:
                found = hostile.attempt(name, PUBLIC[name], parameter, value)
                wrong += [f"{name}({parameter}={shown}): {found}"] if found else []
    pyplot.close("all")
    assert not wrong


def test_there_are_ten_thousand() -> None:
    assert sum(len(hostile.parameters(thing)) for thing in PUBLIC.values()) * len(hostile.values()) > 10_000
