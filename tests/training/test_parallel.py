"""Fits of two and three ranks are those of one process; what only one rank meets is met by all."""

import os
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import parallel_cases as cases
import pytest
import torch
import torch.distributed
from launching import check_same, launched, outcome
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pplvi
from pplvi.fitting import DataParallel
from pplvi.programs.state import Environment
from pplvi.training.parallel.shares import Split, split_of
from pplvi.training.replicas import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MAIN = [f"global, {objective}" for objective in ("ELBO", "IWAE", "Renyi", "RWS", "NVI")]
BOTH = [*MAIN, "PCD", "fewer rows than ranks"]
MET = ["NaN in the loss", "NaN in a program", "callback", "Ctrl-C", "Ctrl-C in a callback"]
THREE = [*BOTH, *MET, "local, IWAE", "both, IWAE", "minibatches", "starts", "rows of parameters", "chains", "restarts"]
TWO = [name for name in cases.CASES if name in BOTH or name not in THREE]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The outcomes of all cases in one process."""
    return {name: case(cases.ALONE) for name, case in cases.CASES.items()}


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """The outcomes of all cases on the ranks of two or of three, of the main ones on both.

    The ranks are forks of a process in which all has run once (:func:`alone`), so that nothing is imported or traced
    again.
    """

    def work(ranks: int, names: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")

        def on(rank: int) -> dict[str, Any]:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
            )
            more = {"drawn": cases.drawn(7, 3, parallel="draws"), "refused": cases.refusals()}
            more |= {"interrupted": outcome(lambda _: cases.interrupted_last(), None)}
            return {name: outcome(cases.CASES[name], cases.FULL) for name in names} | more

        return launched(ranks, on, folder)

    return {2: work(2, TWO), 3: work(3, THREE)}


@pytest.mark.parametrize("name", cases.CASES)
def test_ranks_do_what_one_process_does(alone, together, name):
    for outcomes in together.values():
        for found in outcomes:
            if name in found:
                check_same(found[name], alone[name])


@pytest.mark.exhaustive  # three compilations
def test_compiled_steps_of_ranks_are_those_of_one_process(tmp_path):
    steps = partial(cases.fitted, cases.regression, AutoNormal, compile=True, objective=pplvi.ImportanceWeightedELBO(3))

    def on(rank: int) -> Any:
        meeting = f"file://{tmp_path}/meeting"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        return steps(cases.FULL)

    alone = steps("none")
    for found in launched(2, on, tmp_path):
        check_same(found, alone)


def test_ranks_share_draws_each_from_a_seed_of_its_own(together):
    for ranks, outcomes in together.items():
        parts = [cases.drawn(len(range(7)[rank::ranks]), 3 + 2_000_003 * rank) for rank in range(ranks)]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for found in outcomes:
            check_same(found["drawn"], whole)


def test_what_ranks_cannot_share_is_refused_on_all_of_them(together):
    for found in together[2] + together[3]:
        assert len(found["refused"]) == 5
        for words, said in found["refused"].items():
            assert words in said


def test_what_one_rank_meets_is_met_by_all(together):
    for found in together[3]:
        assert (found["NaN in the loss"]["rollbacks"], found["NaN in a program"]["rollbacks"]) == (1, 1)
        assert [len(found[name]["losses"]) for name in ("callback", "Ctrl-C", "Ctrl-C in a callback")] == [2, 2, 2]


def test_control_c_in_the_last_step_is_heard(together):
    for found in together[2] + together[3]:
        assert found["interrupted"] == "interrupted after 3"


def test_a_rank_that_presses_twice_leaves_the_others(tmp_path):
    def work(rank: int) -> str:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        twice = [lambda run: [cases.press_control_c() for _ in range(2 * rank)]]
        try:
            cases.fitted(cases.regression, AutoNormal, cases.FULL, callbacks=twice)
        except (KeyboardInterrupt, pplvi.training.parallel.RankLostError) as error:
            return type(error).__name__
        return ""

    assert launched(2, work, tmp_path) == ["RankLostError", "RanksLeftError"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint of two ranks, one of which is killed in the middle of a step, and what the other says."""
    folder = tmp_path_factory.mktemp("killed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> str:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            cases.checkpointed(DataParallel(timeout=30), folder / "run.pt", dies=rank == 1)
        except pplvi.training.parallel.RankLostError as error:
            return str(error)
        return ""

    (said,) = launched(2, work, folder, killed=1)
    return folder / "run.pt", said


def test_a_rank_that_is_killed_ends_the_others_with_words(killed):
    assert "another rank of the process group has ended" in killed[1]
    assert "resume=" in killed[1]


def test_nothing_past_the_last_checkpoint_is_lost(killed):
    check_same(cases.checkpointed("none", resume=killed[0]), cases.checkpointed("none"))


@pytest.mark.parametrize("model", ["rows in one density", "a factor of all rows"])
def test_what_cannot_be_split_is_refused(model):
    programs = {"rows in one density": cases.without_plate, "a factor of all rows": cases.with_factor}
    recipe = Recipe(programs[model], AutoNormal, True, False, Environment())
    with pytest.raises(ValueError, match=r"no plate|depends on the rows"):
        split_of(recipe, (cases.ALL, {}))


def test_plates_and_parameters_that_grow_with_the_rows_are_found():
    recipe = Recipe(cases.grouped, AutoDelta, True, False, Environment())
    assert split_of(recipe, (cases.ALL, {})) == Split(frozenset({"data"}), {"AutoDelta.z": 0})


@pytest.mark.parametrize("parallel", ["all", True, 2])
def test_other_words_are_refused(parallel):
    with pytest.raises(ValueError, match="parallel="):
        pplvi.fit(cases.grouped, AutoDelta, args=cases.ALL, parallel=parallel)


def test_one_process_takes_the_options_too():
    alone = cases.fitted(cases.grouped, AutoDelta, "none")
    check_same(cases.fitted(cases.grouped, AutoDelta, DataParallel(shard=True)), alone)
