"""Checkpoint files: whole or not at all, checked, and without code."""

import io
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pyro
import pytest
import torch

from pplvi.programs.state import rng_state, set_rng_state
from pplvi.training import checkpoint

STATE = {
    "params": {"loc": torch.randn(50, generator=torch.Generator().manual_seed(0))},
    "step": 3,
    "losses": [1.0, 2.0],
}


@pytest.fixture
def path(tmp_path):
    checkpoint.write(tmp_path / "run.pt", STATE)
    return tmp_path / "run.pt"


def assert_intact(path):
    assert torch.equal(checkpoint.read(path)["params"]["loc"], STATE["params"]["loc"])


def test_round_trip(path):
    loaded = checkpoint.read(path)
    assert (loaded["step"], loaded["losses"]) == (3, [1.0, 2.0])
    assert_intact(path)
    assert os.listdir(path.parent) == ["run.pt"]


def test_arrays_scalars_and_nesting_come_back(tmp_path):
    state = {
        "uint": np.arange(3, dtype=np.uint32),
        "float": np.ones((2, 2)),
        "scalar": np.float64(0.5),
        "nested": ({1: [None, True, "x"]}, (1, (2.5,))),
    }
    checkpoint.write(tmp_path / "a.pt", state)
    loaded = checkpoint.read(tmp_path / "a.pt")
    assert loaded["uint"].dtype == np.uint32
    assert loaded["uint"].tolist() == [0, 1, 2]
    assert loaded["float"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert loaded["scalar"] == 0.5
    assert loaded["nested"] == state["nested"]


def test_the_random_state_comes_back_to_the_bit(tmp_path):
    pyro.set_rng_seed(5)
    random.gauss(0, 1), np.random.normal()  # both keep a second number in their state
    checkpoint.write(tmp_path / "rng.pt", {"rng": rng_state()})
    first = torch.rand(2).tolist(), random.gauss(0, 1), np.random.normal()
    set_rng_state(checkpoint.read(tmp_path / "rng.pt")["rng"])
    assert (torch.rand(2).tolist(), random.gauss(0, 1), np.random.normal()) == first


def test_what_cannot_be_read_back_is_refused_when_it_is_written(path):
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\] is a object"):
        checkpoint.write(path, {"a": [1, object()]})
    assert_intact(path)


def test_every_truncation_is_noticed(path):
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="corrupt or truncated"):
            checkpoint.read(path)
        assert len(path.read_bytes()) == length


def test_no_flipped_bit_gets_through(path):
    content, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_intact(path)  # padding and time stamps of the archive hold no state
        except ValueError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("content", [b"", b"not an archive", pickle.dumps({"a": 1})])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=r"corrupt|not a checkpoint"):
        checkpoint.read(tmp_path / "other")


def test_other_torch_files_newer_formats_and_missing_files_are_refused(tmp_path):
    torch.save({"loc": torch.ones(1)}, tmp_path / "torch.pt")
    with pytest.raises(ValueError, match="not a checkpoint of pplvi"):
        checkpoint.read(tmp_path / "torch.pt")
    torch.save({"format": checkpoint.FORMAT, "version": 99}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match="format 99, expected 1"):
        checkpoint.read(tmp_path / "new.pt")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        checkpoint.read(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="cannot write"):
        checkpoint.write(tmp_path / "no" / "where.pt", {})


class Evil:
    """Runs code when it is unpickled in the ordinary way."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (self.target,))


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_from_a_stranger_runs_no_code(tmp_path, inside):
    import hashlib

    target = str(tmp_path / "made by the file")
    buffer = io.BytesIO()
    torch.save({"a": Evil(target)}, buffer)
    if inside:  # a valid envelope around it
        payload = buffer.getvalue()
        content = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION}
        content["sha256"] = hashlib.sha256(payload).hexdigest()
        content["payload"] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        buffer = io.BytesIO()
        torch.save(content, buffer)
    (tmp_path / "evil.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="corrupt"):
        checkpoint.read(tmp_path / "evil.pt")
    assert not os.path.exists(target)


def test_the_file_opens_with_weights_only(path):
    assert torch.load(path, weights_only=True)["format"] == "pplvi-checkpoint"


def test_an_error_while_writing_keeps_the_old_file(path, monkeypatch):
    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=r"cannot write a checkpoint.*disk full"):
        checkpoint.write(path, {"params": {"loc": torch.zeros(50)}})
    monkeypatch.undo()
    assert_intact(path)
    assert os.listdir(path.parent) == ["run.pt"]


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a signal")
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_kill_in_the_middle_of_a_write_keeps_the_old_file(path, moment):
    script = f"""
        import os, sys, time, torch
        from pplvi.training import checkpoint
        def hang(*arguments):
            print("writing", flush=True)
            time.sleep(60)
        os.{moment} = hang
        checkpoint.write({str(path)!r}, {{"params": {{"loc": torch.zeros(10**6)}}}})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert_intact(path)
    checkpoint.write(path, {**STATE, "step": 4})
    assert checkpoint.read(path)["step"] == 4
