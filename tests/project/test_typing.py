"""What a type checker sees of a user's program, under ``mypy --strict``."""

import subprocess
import sys
from pathlib import Path

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


def check(program: str, path: Path) -> str:
    """What mypy says, with the options and the cache of the project, so that it reads torch and Pyro only once."""
    path.write_text(f"{STRICT}\n{program}")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_a_users_program_has_real_types(tmp_path):
    said = check(PROGRAM, tmp_path / "program.py")
    assert [line.split('"')[1] for line in said.splitlines() if "Revealed" in line] == REVEALED, said
    assert "Success: no issues found" in said


def test_mistakes_are_seen(tmp_path):
    """A name that is not there, and an argument of the wrong type: not Any, which would take both."""
    said = check("import pplvi\npplvi.ELBOW\npplvi.ELBO(num_particles='many')\n", tmp_path / "program.py")
    assert 'Module has no attribute "ELBOW"' in said, said
    assert 'Argument "num_particles" to "ELBO" has incompatible type "str"' in said
    assert "Found 2 errors" in said
