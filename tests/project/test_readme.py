"""The README's Python blocks run in order, in one namespace, with fewer steps; the output that it shows is theirs."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[2] / "README.md"
NUMBER = r"-?\d[\d,]*\.?\d*"
SHORTER = {
    r"num_steps=\d+": "num_steps=40",
    r"range\(\d+\)": "range(40)",
    "num_simulations=20": "num_simulations=3",
    "compile=True": 'compile="trace"',
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def shortened(code: str) -> str:
    for long, short in SHORTER.items():
        code = re.sub(long, short, code)
    return code


def words_and_numbers(text: str) -> tuple[list[str], list[float]]:
    words = re.sub(NUMBER, "0", text).split()
    return words, [float(number.replace(",", "")) for number in re.findall(NUMBER, text)]


@pytest.mark.filterwarnings("error")
def test_readme_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    first, *others = blocks("python")
    exec(compile(first, str(README), "exec"), namespace)
    (shown,), found = blocks("text"), capsys.readouterr().out
    (said, seen), (says, sees) = words_and_numbers(shown), words_and_numbers(found)
    assert said == says
    assert np.allclose(seen, sees, rtol=0.12, atol=0.3)  # up to the Monte Carlo error of 1,000 draws
    for block in others:
        exec(compile(shortened(block), str(README), "exec"), namespace)
    printed = capsys.readouterr()
    assert "torch.Size([1000, 200])" in printed.out
    assert "elpd" in printed.out or "verdict" in printed.out
    assert "WARNING" not in printed.err  # ArviZ's log
