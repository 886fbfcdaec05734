"""What a type checker sees of a user's program, under ``mypy --strict``."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The project's own mypy is strict but for what Pyro lacks; a user's file may be strict in these too. Said in the file,
# not on the command line, they leave the project's cache as it is.
STRICT = "# mypy: " + ", ".join(
    (
        "disallow-untyped-calls",
        "disallow-untyped-decorators",
        "disallow-subclassing-any",
        "warn-return-any",
        "disallow-any-generics",
    )
)

PROGRAM = """
import pyro
import pyro.distributions as dist
import pplvi
from pplvi.guides import AutoFlow

def model() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))

reveal_type(pplvi.fit(model, AutoFlow))
reveal_type(pplvi.ELBO(num_particles=4))
reveal_type(pplvi.Posterior(model, AutoFlow(model)))
reveal_type(pplvi.AutoFlow(model, flow="nsf"))
"""

REVEALED = [
    "pplvi.fitting.result.Fit",
    "pplvi.losses.elbo.ELBO",
    "pplvi.posterior.posterior.Posterior",
    "pplvi.guides.flows.flow.AutoFlow",
]


WRONG = """
import pplvi

pplvi.ELBOW
pplvi.ELBO(num_particles="many")
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What mypy says of each program, with the options and the cache of the project: it reads torch and Pyro once."""
    folder = tmp_path_factory.mktemp("programs")
    for name, program in {"right": PROGRAM, "wrong": WRONG}.items():
        (folder / f"{name}.py").write_text(f"{STRICT}\n{program}")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *map(str, folder.iterdir())]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    assert lines[-1].startswith("Found 2 errors in 1 file (checked 2 source files)"), lines
    return {name: "\n".join(line for line in lines if f"{name}.py" in line) for name in ("right", "wrong")}


def test_a_users_program_has_real_types(said):
    assert [line.split('"')[1] for line in said["right"].splitlines() if "Revealed" in line] == REVEALED, said
    assert "error" not in said["right"]


def test_mistakes_are_seen(said):
    """A name that is not there, and an argument of the wrong type: not Any, which would take both."""
    assert 'Module has no attribute "ELBOW"' in said["wrong"], said
    assert 'Argument "num_particles" to "ELBO" has incompatible type "str"' in said["wrong"]
