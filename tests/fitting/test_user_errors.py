"""What a user is told: errors of the program as they are, those of the machinery in words."""

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor
from torch.distributions import constraints

import pplvi
from pplvi.programs.errors import told, without_empty_tables

Y = torch.tensor([0.5, -1.0, 2.0])
GUIDES = [AutoNormal, AutoMultivariateNormal, pplvi.AutoFlow, pplvi.AutoPathfinder, "nuts"]
NAMES = [getattr(guide, "__name__", guide) for guide in GUIDES]
fit = partial(pplvi.fit, seed=0, progress=False)


def model(y: Tensor) -> None:
    """A mean."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class Own(LookupError):
    """An error that cannot be made of a message alone."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(code, reason)


MADE: dict[str, Callable[[], Exception]] = {
    "Own": lambda: Own(3, reason="mine"),
    **{
        kind.__name__: partial(kind, "mine")
        for kind in (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError, NotImplementedError)
    },
    "ValueError": partial(ValueError, "mine"),
    "RuntimeError": partial(RuntimeError, "mine"),
}


@pytest.mark.parametrize("guide", [*GUIDES, "auto"], ids=[*NAMES, "auto"])
@pytest.mark.parametrize("kind", MADE)
def test_errors_of_the_program_keep_type_text_and_traceback(kind: str, guide: Any) -> None:
    error = MADE[kind]()

    def broken_line() -> None:
        raise error

    def broken(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        broken_line()

    with pytest.raises(type(error)) as caught:
        fit(broken, guide, args=(Y,))
    assert caught.value is error
    assert "broken_line" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def improper(y: Tensor) -> None:
    z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def whole_parameter(y: Tensor) -> None:
    model(y + pyro.param("shift", torch.tensor(1)))


def whole_numbers(y: Tensor) -> None:
    pyro.sample("p", dist.Dirichlet(torch.ones(2, dtype=torch.long)))
    model(y)


def twice(y: Tensor) -> None:
    model(y)
    model(y)


def wrong(y: Tensor, x: Tensor) -> None:
    model(y)


REFUSED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "improper": (improper, (Y,), r"site 'z' has the improper prior.*init_to_value\(values=\{'z': \.\.\.\}\)"),
    "parameter": (whole_parameter, (Y,), r"parameter 'shift' starts from a tensor of whole numbers.*torch\.tensor"),
    "numbers": (whole_numbers, (Y,), r"site 'p' has a Dirichlet whose parameters \['concentration'\] are whole"),
    "twice": (twice, (Y,), r"two sample sites are named 'z': expected a name for each"),
    "missing": (wrong, (Y,), r"cannot be called.*missing 1 required positional argument: 'x'.*Expected args="),
    "too many": (model, (Y, Y), r"cannot be called.*takes 1 positional argument but 2 were given"),
    "empty": (model, (torch.zeros(0),), r"a pyro\.plate of size 0 was met"),
}


@pytest.mark.parametrize("guide", GUIDES, ids=NAMES)
@pytest.mark.parametrize("name", REFUSED)
def test_faults_are_put_in_words(name: str, guide: Any) -> None:
    program, args, message = REFUSED[name]
    if name == "improper" and guide is pplvi.AutoPathfinder:
        fit(program, guide, args=args)  # which starts anywhere
        return
    with pytest.raises(ValueError, match=message) as caught:
        fit(program, guide, args=args)
    assert "Trace Shapes" not in str(caught.value)


def test_improper_prior_with_a_start() -> None:
    start = init_to_value(values={"z": torch.tensor(0.0)})
    result = fit(improper, lambda model: AutoNormal(model, init_loc_fn=start), args=(Y,), num_steps=3)
    with pytest.raises(ValueError, match="improper prior"):
        result.predict(new_sites=["z"])


def test_guide_of_another_signature() -> None:
    for make in (lambda: fit(model, lambda: None, args=(Y,)), lambda: pplvi.Posterior(model, lambda: None, (Y,))):
        with pytest.raises(ValueError, match=r"cannot be called.*takes 0 positional arguments.*a guide that takes"):
            make()


def test_names_of_which_one_goes_on_after_another() -> None:
    def dotted(y: Tensor) -> None:
        pyro.sample("layer", dist.Normal(0.0, 1.0))
        pyro.sample("layer.weight", dist.Normal(0.0, 1.0))
        model(y)

    for guide in (AutoNormal, AutoDelta):
        with pytest.raises(ValueError, match=r"\('layer', 'layer.weight'\).*beginning of.*Rename one.*AutoMultiv"):
            fit(dotted, guide, args=(Y,))
    fit(dotted, AutoMultivariateNormal, args=(Y,), num_steps=2)


@pytest.mark.parametrize("given", [{"coords": 3}, {"dims": [1]}, {"coords": {"data": 5}}, {"dims": {"z": 5}}], ids=str)
def test_names_for_an_export_that_are_none(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a dictionary from a string to a"):
        fit(model, AutoNormal, args=(Y,), num_steps=2).to_arviz(**given)


def test_message_has_no_internal_name_and_no_empty_table() -> None:
    def left(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z[0], 1.0), obs=y)

    try:
        pplvi.Posterior(left, AutoNormal(left), (Y,), num_draws=7)
    except ValueError as error:
        assert "_pplvi" not in str(error)  # noqa: PT017
    copies = "no\nTrace Shapes:\n Param Sites:\nSample Sites:\nTrace Shapes:\n Param Sites:\nSample Sites:\n z dist |"
    kept = without_empty_tables(copies)
    assert kept.count("Trace Shapes") == 1
    assert kept.endswith("z dist |")


def test_an_error_of_ours_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="num_steps=0") as caught:
        fit(model, AutoNormal, args=(Y,), num_steps=0)
    assert told(caught.value) is caught.value
