"""What a session shows: warnings at the user's own line, and none that the user can do nothing about."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pplvi
from pplvi.posterior.arviz.quiet import logger_of
from pplvi.posterior.arviz.versions import is_legacy

Y = torch.tensor([1.0, 0.5, -0.5, 8.0])


def model(y: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def fitted(guide: object = AutoNormal, num_steps: int = 5) -> pplvi.Fit:
    return pplvi.fit(model, guide, args=(Y,), num_steps=num_steps, seed=0, progress=False)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What ArviZ logs, by a logger that the root does not know."""
    logger_of(az).addHandler(caplog.handler)
    yield caplog
    logger_of(az).removeHandler(caplog.handler)


def test_a_warning_is_at_the_line_of_the_user() -> None:
    with pytest.warns(UserWarning, match="Pareto k is above") as found:
        fitted().loo()
    assert [Path(warning.filename) for warning in found] == [Path(__file__)]


@pytest.mark.filterwarnings("error")
def test_tables_and_plots_of_one_chain_say_nothing_of_arviz(heard: pytest.LogCaptureFixture) -> None:
    fit, chain = fitted(), fitted("nuts", 30)
    assert az.summary(fit.to_arviz(num_prior=0)).r_hat.isna().all()
    pplvi.compare({"guide": fit, "chain": chain})
    pplvi.plot_against_reference(fit, chain)
    pplvi.plot_weights(fit)
    assert not heard.records


def test_other_words_of_arviz_are_heard(heard: pytest.LogCaptureFixture) -> None:
    fitted().to_arviz(num_prior=0)
    az.rhat(torch.zeros(2, 3).numpy())
    assert not is_legacy() or "Shape validation failed: input_shape: (2, 3)" in heard.text
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.warn("of something else", DeprecationWarning, stacklevel=1)
    assert len(found) == 1


RACE = """
import pathlib

replace = pathlib.Path.replace

def lose(path, target):
    replace(path, target)
    pathlib.Path.replace = replace
    raise FileNotFoundError(target)

pathlib.Path.replace = lose
from pplvi.posterior.arviz.quiet import arviz_itself
print(arviz_itself().summary.__name__, pathlib.Path.replace is replace)
"""


def test_an_import_that_loses_the_race_for_the_stamp_of_the_day_is_made_again(tmp_path: Path) -> None:
    """With an empty cache folder, as two processes on a fresh machine meet it."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", RACE]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert said == ["summary", str(is_legacy())]  # ArviZ 1.x has no stamp
    assert not is_legacy() or (tmp_path / "arviz" / "daily_warning").exists()
