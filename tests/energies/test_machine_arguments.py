"""Arguments of machines that make no sense are refused, wherever they come in; none of them is passed over."""

import math

import pyro
import pytest
import torch

from pplvi import BinarySparseCoding, BoltzmannELBO, DeepBeliefNetwork, MultiPrediction, SparseCoding, UpDown
from pplvi.energies import MeanFieldGuide, RestrictedBoltzmannMachine

V = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
SIZES = [-1, 0, 1, 2.5, True, 10**18]


def rbm() -> RestrictedBoltzmannMachine:
    return RestrictedBoltzmannMachine(3, 2)


def closed_form(size):
    machine = rbm()
    return BoltzmannELBO(5, 1).loss(machine.model, machine.guide, V, size=size)


def by_program(size):
    machine = rbm()
    return BoltzmannELBO(5, 1).loss(lambda v, size: machine.model(v, size=size), machine.guide, V, size=size)


def multi_prediction(size):
    machine = rbm()
    return MultiPrediction().loss(machine.model, MeanFieldGuide(machine), V, size=size)


def up_down(size):
    network = DeepBeliefNetwork([3, 2, 2])
    return UpDown(1).loss(network.model, network.guide, V, size=size)


def sparse_coding(size):
    return SparseCoding(3, 2).model(V, size=size)


def binary_sparse_coding(size):
    return BinarySparseCoding(3, 2).model(V, size=size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "use", [closed_form, by_program, multi_prediction, up_down, sparse_coding, binary_sparse_coding]
)
def test_a_number_of_data_is_one_of_at_least_those_given(use, size):
    """``size=-1`` would turn a gradient round, and ``size=0`` leave none."""
    with pyro.get_param_store().scope():
        use(2)
    with pytest.raises(ValueError, match=f"size={size}: expected how many data there are in all"):
        use(size)


@pytest.mark.parametrize("size", [0, -3])
def test_draws_without_data_have_a_number(size):
    with pytest.raises(ValueError, match=f"size={size}"):
        SparseCoding(3, 2).model(size=size)
    with pytest.raises(ValueError, match=f"size={size}"):
        BinarySparseCoding(3, 2).model(size=size)


@pytest.mark.parametrize("clamped", [("V",), {"hidden": None}, ["v", "h2"]])
def test_layers_that_are_not_there_are_not_clamped(clamped):
    machine = rbm()
    with pytest.raises(ValueError, match=r"clamped=\['(V|hidden|h2)'\]: expected some of the layers \['v', 'h'\]"):
        machine.gibbs(machine.draw((2,)), clamped=clamped)


@pytest.mark.parametrize("beta", [math.nan, -1.0, torch.tensor(math.nan), torch.tensor([0.5, -0.5]), "cold", True])
def test_inverse_temperatures_are_numbers(beta):
    machine = rbm()
    for use in (
        machine.log_partition,
        lambda b: machine.free_energy(V, b),
        lambda b: machine.gibbs(machine.draw((2,)), beta=b),
    ):
        with pytest.raises(ValueError, match=r"beta=.*: expected"):
            use(beta)


@pytest.mark.parametrize("num_sweeps", [-1, 1.5, True])
def test_sweeps_are_counted(num_sweeps):
    machine = rbm()
    start = machine.draw((2,))
    with pytest.raises(ValueError, match="num_sweeps="):
        machine.gibbs(start, num_sweeps)
    with pytest.raises(ValueError, match="num_sweeps="):
        machine.distribution(num_sweeps=num_sweeps)
    with pytest.raises(ValueError, match="num_sweeps="):
        DeepBeliefNetwork([3, 2, 2]).generate(2, num_sweeps=num_sweeps)
    assert machine.gibbs(start, 0)["v"].equal(start["v"])
