"""Networks that FSDP2 holds in parts are trained, saved and resumed as whole ones."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import sharded_cases as cases
import torch
import torch.distributed
from launching import check_same, launched, outcome
from parallel_cases import ALONE, FULL

from pplvi.fitting import DataParallel
from pplvi.programs.ranks import RankLostError
from pplvi.training import checkpoint, shards

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def meet(folder: Path, rank: int, ranks: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The outcomes of all cases in one process."""
    return {name: case(ALONE) for name, case in cases.CASES.items()}


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory) -> list[dict[str, Any]]:
    """The outcomes of all cases on two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    cases.regression(ALONE, checkpoint=folder / "whole.pt")

    def work(rank: int) -> dict[str, Any]:
        meet(folder, rank, 2)
        found = {name: outcome(case, FULL) for name, case in cases.CASES.items()}
        return found | {"refused": cases.refusals(folder)}

    return launched(2, work, folder)


@pytest.mark.parametrize("name", cases.CASES)
def test_parts_are_trained_as_the_whole(alone, together, name):
    for found in together:
        check_same(found[name], alone[name])


def test_the_case_of_a_bad_rank_went_back(alone):
    assert alone["NaN on one rank"]["rollbacks"] == 1


def test_what_cannot_be_trained_in_parts_is_refused(together):
    for found in together:
        assert len(found["refused"]) == 12
        for words, said in found["refused"].items():
            assert words in said


def test_a_group_of_one_rank_trains_too(tmp_path):
    (found,) = launched(1, lambda rank: cases.of_one_rank(tmp_path), tmp_path)
    check_same(found, cases.regression(ALONE))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint of two ranks, one of which is killed in the second save, and what the other says."""
    folder = tmp_path_factory.mktemp("killed")

    def work(rank: int) -> str:
        meet(folder, rank, 2)
        try:
            cases.saved(FULL, folder / "run.pt", dies=rank == 1)
        except RankLostError as error:
            return str(error)
        return ""

    (said,) = launched(2, work, folder, killed=1)
    return folder / "run.pt", said


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Any]:
    """The outcome of the same fit in one process."""
    return cases.saved(ALONE)


def test_a_save_that_is_killed_leaves_the_one_before(killed):
    path, said = killed
    assert "another rank of the process group has ended" in said
    assert len(list(path.parent.glob("run.pt.shards-*"))) == 2
    assert len(checkpoint.read_content(path)["runs"][0]["losses"]) == 4


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_goes_on(killed, unbroken, tmp_path, ranks):
    path = killed[0]
    if ranks == 1:  # whole, without a process group
        check_same(cases.saved(ALONE, resume=path), unbroken)
        return

    def work(rank: int) -> dict[str, Any]:
        meet(tmp_path, rank, ranks)
        return cases.saved(FULL, resume=path)

    for found in launched(ranks, work, tmp_path):
        check_same(found, unbroken)


def copied(path: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of a checkpoint, and of the folder that belongs with it."""
    name = checkpoint.read(path)["shards"]["folder"]
    (folder / name).mkdir()
    for file in (path, *(path.parent / name).iterdir()):
        (folder / file.relative_to(path.parent)).write_bytes(file.read_bytes())
    return folder / path.name, folder / name


def test_folders_that_no_file_names_are_swept(killed, tmp_path):
    path, folder = copied(killed[0], tmp_path)
    (tmp_path / "run.pt.shards-old").mkdir()
    (tmp_path / "run.pt.mine").mkdir()
    shards.sweep(path)
    assert {x.name for x in tmp_path.iterdir()} == {path.name, folder.name, "run.pt.mine"}
    path.write_bytes(b"no checkpoint")
    shards.sweep(path)
    assert folder.is_dir()


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_a_flipped_bit_is_refused(killed, tmp_path, file):
    path, folder = copied(killed[0], tmp_path)
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"corrupt or truncated .*does not match its checksum"):
        cases.saved(ALONE, resume=path)


def test_a_folder_that_is_gone_is_missed(killed, tmp_path):
    path, folder = copied(killed[0], tmp_path)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="belongs with the folder"):
        cases.saved(ALONE, resume=path)


class Malice:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("malice"),)


def test_a_list_by_a_stranger_runs_no_code(killed, tmp_path, monkeypatch):
    path, folder = copied(killed[0], tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Malice()))
    content = checkpoint.read(path)
    content["shards"]["sha256"][".metadata"] = shards._sum(folder / ".metadata")
    checkpoint.write(path, content)
    with pytest.raises(ValueError, match=r"corrupt or truncated .*its list names"):
        cases.saved(ALONE, resume=path)
    assert not Path("malice").exists()


def test_a_file_without_its_folders_name_is_refused(killed, tmp_path):
    content = checkpoint.read(killed[0])
    del content["shards"]
    checkpoint.write(tmp_path / "run.pt", content)
    with pytest.raises(ValueError, match="names no folder"):
        cases.saved(ALONE, resume=tmp_path / "run.pt")


def test_a_disk_that_is_full_leaves_the_training(killed, tmp_path):
    def work(rank: int) -> Any:
        meet(tmp_path, rank, 2)
        try:
            cases.saved(DataParallel(shard=True), tmp_path / "run.pt", full=True)
        except checkpoint.UnwrittenError as error:
            return str(error), len(error.runs[0].losses)
        return "", 0

    for said, steps in launched(2, work, tmp_path):
        assert "cannot write the parts of a checkpoint" in said
        assert steps == 10
    assert not list(tmp_path.glob("run.pt*"))
