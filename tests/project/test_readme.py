"""The README's Python blocks run in order, in one namespace, with fewer steps."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def shortened(code: str) -> str:
    return re.sub(r"num_steps=\d+", "num_steps=60", re.sub(r"range\(\d+\)", "range(60)", code))


@pytest.mark.filterwarnings("ignore::UserWarning")  # an untrained posterior warns of its k-hat: as it should
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks():
        exec(compile(shortened(block), str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "k-hat" in printed
    assert "elpd" in printed
