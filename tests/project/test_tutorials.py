"""Every tutorial runs from its first cell to its last, with short loops, in a folder of its own."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

TUTORIALS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.py"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what a script may leave behind in the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPLVI_SMOKE", "1")
    dtype = torch.get_default_dtype()
    yield tmp_path
    torch.set_default_dtype(dtype)
    plt.close("all")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # short loops end in warnings of fits that are not done
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(tutorial, folder, capsys):
    runpy.run_path(str(tutorial), run_name="__main__")
    assert "Pareto k-hat" in capsys.readouterr().out
    pictures = list((folder / "out").glob("*.png"))
    assert pictures
    assert all(picture.stat().st_size > 1_000 for picture in pictures)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_is_in_percent_format(tutorial):
    text = tutorial.read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    assert "\n# %%\n" in text
    assert 'os.environ.get("PPLVI_SMOKE")' in text


def test_there_are_tutorials():
    assert [path.stem for path in TUTORIALS][:2] == ["01_first_fit", "02_extending"]
