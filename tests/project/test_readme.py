"""The README's Python blocks run in order, in one namespace, with fewer steps."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def shortened(code: str) -> str:
    return re.sub(r"num_steps=\d+", "num_steps=60", re.sub(r"range\(\d+\)", "range(60)", code))


# Posteriors of so few steps have bad weights, and say so: as they should. Nothing else may be said.
@pytest.mark.filterwarnings("error", "ignore:Pareto k is above", "ignore:Estimated shape parameter of Pareto")
def test_readme_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks():
        exec(compile(shortened(block), str(README), "exec"), namespace)
    printed = capsys.readouterr()
    assert "k-hat" in printed.out
    assert "elpd" in printed.out
    assert "WARNING" not in printed.err  # ArviZ's log
