"""The example data are the published ones, and every example is a model that its data fit into."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from sklearn.datasets import load_diabetes

from pplvi.examples import LOADERS, diabetes, load
from pplvi.examples.example import read_rows, standardize


def test_grunfeld_data_give_the_published_regression() -> None:
    """Ten firms, pooled least squares: -42.714, 0.115562, 0.230678 (Baltagi 2005, chapter 2)."""
    rows = [row for row in read_rows("grunfeld.csv") if row["firm"] != "American Steel"]
    names = ("value", "capital", "invest")
    table = torch.tensor([[float(row[name]) for name in names] for row in rows], dtype=torch.float64)
    design = torch.cat([torch.ones(len(rows), 1, dtype=torch.float64), table[:, :2]], 1)
    coefficients = torch.linalg.lstsq(design, table[:, 2:]).solution.flatten()
    expected = torch.tensor([-42.714369, 0.115562, 0.230678], dtype=torch.float64)
    torch.testing.assert_close(coefficients, expected, atol=1e-6, rtol=0)


def test_panel_keeps_years_in_rows_and_firms_in_columns() -> None:
    example = load("grunfeld")
    first = {(row["year"], row["firm"]): float(row["invest"]) for row in read_rows("grunfeld.csv")}
    logs = torch.tensor(
        [[first[str(year), firm] for firm in example.coords["firm"]] for year in example.coords["year"]]
    )
    expected = (logs.log() - logs.log().mean()) / logs.log().std()
    torch.testing.assert_close(example.args[2], expected)


def test_diabetes_is_standardised() -> None:
    x, y = load("diabetes").args
    torch.testing.assert_close(x.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(), torch.tensor(1.0))
    data = load_diabetes()
    torch.testing.assert_close(x, standardize(torch.tensor(data.data, dtype=torch.float32)), atol=1e-4, rtol=0)
    torch.testing.assert_close(y, standardize(torch.tensor(data.target, dtype=torch.float32)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", LOADERS)
def test_example_has_a_finite_elbo_with_and_without_vectorised_particles(name: str) -> None:
    example = load(name)
    for vectorize in (False, True):
        pyro.clear_param_store()
        loss = Trace_ELBO(num_particles=8, vectorize_particles=vectorize, max_plate_nesting=2)
        assert torch.isfinite(torch.tensor(loss.loss(example.model, AutoNormal(example.model), *example.args)))


@pytest.mark.parametrize("name", LOADERS)
def test_coordinates_name_plates_or_dimensions(name: str) -> None:
    example = load(name)
    trace = pyro.poutine.trace(example.model).get_trace(*example.args)
    sizes = {frame.name: frame.size for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())}
    for name, dims in example.dims.items():
        sizes.update(zip(dims, trace.nodes[name]["value"].shape, strict=True))
    assert {dim: len(names) for dim, names in example.coords.items()}.items() <= sizes.items()


def test_rotated_regression_is_the_regression() -> None:
    """Least squares in the rotated coordinates and in the measured ones is the same."""
    x, y = load("diabetes").args
    q, _ = torch.linalg.qr(x)
    unit = (len(x) - 1) ** 0.5
    rotated = (q.T @ y) / unit
    conditioned = pyro.condition(diabetes.model, {"rotated": rotated})
    coef = pyro.poutine.trace(conditioned).get_trace(x, y).nodes["coef"]["value"]
    torch.testing.assert_close(coef, torch.linalg.lstsq(x, y).solution, atol=1e-4, rtol=1e-3)


def test_unknown_example_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'radon'.*expected one of"):
        load("radon")
