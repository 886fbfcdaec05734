"""What abuse does to fits and their files: interruptions, wrong and shared files, full disks, nested fits, threads."""

import os
import pickle
import threading
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pplvi
from pplvi.compile import CompiledSVI
from pplvi.fitting import Checkpoint
from pplvi.training import checkpoint

Y = torch.tensor([1.0, 2.0, 3.0])


def model(y, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def wider(y):
    model(y, scale=2.0)


def run(program=model, **options):
    return pplvi.fit(program, AutoNormal, **{"args": (Y,), "num_steps": 4, "seed": 0, "progress": False, **options})


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.pt"
    run(checkpoint=path, schedule=None)
    return checkpoint.read(path)


WRONG = {
    "no runs": lambda c: c.pop("runs"),
    "runs are None": lambda c: c.update(runs=[None]),
    "runs are a number": lambda c: c.update(runs=3),
    "no settings": lambda c: c.pop("settings"),
    "settings are a list": lambda c: c.update(settings=[1]),
    "sites are numbers": lambda c: c.update(model={"z": 1}),
    "no tensors at first": lambda c: c.update(initial={"a": 1.0}),
    "no parameters": lambda c: c["runs"][0].pop("params"),
    "parameters are numbers": lambda c: c["runs"][0].update(params={"z": 1.0}),
    "steps are text": lambda c: c["runs"][0].update(step="four"),
    "losses are text": lambda c: c["runs"][0].update(losses=["low"]),
    "a reason is none": lambda c: c["runs"][0].update(reason=None),
    "no random state": lambda c: c["runs"][0].update(rng={}),
    "no first random state": lambda c: c["runs"][0].update(start={"torch": torch.zeros(3)}),
    "no optimiser": lambda c: c["runs"][0].update(update={}),
    "another optimiser": lambda c: c["runs"][0]["update"].update(dict.fromkeys(c["runs"][0]["update"])),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_malformed_checkpoint_is_refused_and_left_alone(content, tmp_path, wrong):
    changed = checkpoint.decode(checkpoint.encode(content))
    WRONG[wrong](changed)
    checkpoint.write(tmp_path / "run.pt", changed)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match="is corrupt or truncated"):
        run(resume=tmp_path / "run.pt", num_steps=6, schedule=None)
    assert (tmp_path / "run.pt").read_bytes() == before


def test_a_malformed_fit_is_refused(tmp_path):
    run().save(tmp_path / "fit.pt")
    whole = checkpoint.read(tmp_path / "fit.pt")
    for key, value in (("best", "first"), ("runs", [None]), ("notes", 3)):
        checkpoint.write(tmp_path / "wrong.pt", {**whole, "fit": {**whole["fit"], key: value}})
        with pytest.raises(ValueError, match=f"is corrupt or truncated .fit.*{key}"):
            pplvi.load(tmp_path / "wrong.pt", model)


def test_two_fits_do_not_write_one_file(tmp_path):
    said = []

    def another(restart):
        with pytest.raises(ValueError, match="is being written by another fit: expected a path of its own") as caught:
            run(checkpoint=tmp_path / "run.pt")
        said.append(str(caught.value))
        return True

    run(checkpoint=tmp_path / "run.pt", callbacks=[another])
    assert len(said) == 1
    assert os.listdir(tmp_path) == ["run.pt"]


def test_half_written_files_of_killed_runs_are_swept(tmp_path):
    for name in (".run.pt.abc.tmp", ".run.pt.lock", ".other.pt.abc.tmp"):
        (tmp_path / name).touch()
    run(checkpoint=tmp_path / "run.pt")
    assert sorted(os.listdir(tmp_path)) == [".other.pt.abc.tmp", "run.pt"]


def test_links_are_followed_and_relative_paths_are_those_of_the_start(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "link.pt").symlink_to(tmp_path / "there" / "run.pt")
    monkeypatch.chdir(tmp_path / "here")
    run(checkpoint=Checkpoint("link.pt", every=2), callbacks=[lambda restart: os.chdir(tmp_path)])
    assert Path("here/link.pt").is_symlink()
    assert sorted(map(str, Path(".").rglob("*.pt"))) == ["here/link.pt", "there/run.pt"]
    assert len(checkpoint.read("there/run.pt")["runs"][0]["losses"]) == 4


@pytest.mark.parametrize("options", [{}, {"data": [(Y,), (Y + 1,), (Y + 2,)]}, {"compile": "trace"}])
def test_an_interrupted_run_is_saved_and_goes_on(tmp_path, options):
    path, options = tmp_path / "run.pt", {"schedule": None, "stop": None, **options}
    whole = run(num_steps=90, **options)

    def interrupt(restart):
        if restart.step == 77:
            raise KeyboardInterrupt

    cut = run(num_steps=90, checkpoint=path, callbacks=[interrupt], **options)
    assert cut.reasons == ["interrupted"]
    assert checkpoint.read(path)["runs"][0]["step"] == 50
    rest = run(num_steps=90, checkpoint=path, resume=path, **options)
    assert rest.losses.tolist() == whole.losses.tolist()


def test_a_step_back_is_saved(tmp_path):
    bad = [(Y,), (Y,), (torch.tensor([0.0, 1e38, 1e38]),)]
    path, seen = tmp_path / "run.pt", []

    def look(restart):
        if restart.rollbacks and not seen:
            seen.append(checkpoint.read(path)["runs"][0]["rollbacks"])
            return True
        return False

    with warnings.catch_warnings(action="ignore"):
        run(data=bad, checkpoint=path, callbacks=[look], num_steps=20, stop=None)
    assert seen == [1]


def test_nuts_keeps_the_draws_of_an_interrupted_chain(monkeypatch):
    from pyro.infer import NUTS

    class Interrupted(NUTS):
        count = 0

        def sample(self, params):
            self.count += 1
            if self.count == 31:
                raise KeyboardInterrupt
            return super().sample(params)

    def positive(y):
        pyro.sample("y", dist.Normal(0.0, pyro.sample("s", dist.LogNormal(0.0, 1.0))), obs=y)

    found = pplvi.fit(positive, Interrupted, args=(Y[0],), num_steps=100, num_warmup=10, seed=0, progress=False)
    draws = found.posterior().draws.latents["s"]
    assert len(draws) == 20
    assert bool((draws > 0).all())
    whole = pplvi.fit(positive, NUTS, args=(Y[0],), num_steps=100, num_warmup=10, seed=0, progress=False)
    assert torch.equal(draws, whole.posterior().draws.latents["s"][:20])


def test_a_full_disk_is_a_warning_at_every_try_and_an_error_with_the_fit(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.warns(UserWarning, match=r"No space left.*The training goes on") as warned,
        pytest.raises(ValueError, match=r"cannot write a checkpoint.*The fit is in the attribute fit") as caught,
    ):
        run(checkpoint=Checkpoint(tmp_path / "run.pt", every=2))
    assert len(warned) == 2
    assert caught.value.fit.losses.shape == (1, 4)
    assert caught.value.fit.posterior(num_draws=5).num_draws == 5
    assert os.listdir(tmp_path) == []


def test_a_disk_with_room_again_is_forgiven(tmp_path, monkeypatch):
    plain, tries = os.fsync, []

    def once(handle):
        tries.append(handle)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        plain(handle)

    monkeypatch.setattr(os, "fsync", once)
    with pytest.warns(UserWarning, match="No space left"):
        run(checkpoint=Checkpoint(tmp_path / "run.pt", every=2))
    assert len(checkpoint.read(tmp_path / "run.pt")["runs"][0]["losses"]) == 4


def test_another_prior_is_another_model(tmp_path):
    run(checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"constants differ: model.z.scale: 1 in the file, 2 here"):
        run(wider, resume=tmp_path / "run.pt")
    data = [(Y,), (Y + 1,)]  # other batches are not
    run(data=data, checkpoint=tmp_path / "batches.pt", num_steps=3)
    run(data=data, resume=tmp_path / "batches.pt", num_steps=3)


@pytest.mark.parametrize("schedule", [None, lambda step: 1 / (1 + step)])
def test_more_steps_go_on_where_the_schedule_does_not_say_how_many(tmp_path, schedule):
    path, options = tmp_path / "run.pt", {"schedule": schedule, "stop": None}
    whole = run(num_steps=9, **options)
    run(checkpoint=path, **options)
    assert run(num_steps=9, resume=path, **options).losses.tolist() == whole.losses.tolist()


def test_a_fit_in_a_callback_leaves_the_outer_one_alone():
    inner, alone = [], run(num_steps=40)

    def nested(restart):
        if restart.step == 20:
            inner.append(run(lambda y: model(-y), num_steps=40))

    outer = run(num_steps=40, callbacks=[nested])
    assert outer.losses.tolist() == alone.losses.tolist()
    assert torch.equal(outer.guide.median(Y)["z"], alone.guide.median(Y)["z"])
    assert float(inner[0].posterior(num_draws=50).draws.latents["z"].mean()) != float(outer.guide.median(Y)["z"])


def test_parameters_of_another_program_are_replaced_with_a_warning():
    pyro.param("AutoNormal.locs.z", torch.ones(2))
    with pytest.warns(UserWarning, match=r"\['AutoNormal.locs.z'\].*are replaced by those of this fit"):
        run()
    run()  # of its own: as it was


def test_a_second_thread_is_refused_with_words():
    said = []

    def other():
        try:
            run()
        except ValueError as error:
            said.append(str(error))

    def start(restart):
        if restart.step == 1:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    found = run(callbacks=[start])
    assert len(said) == 1
    assert "another thread of this process is in fit()" in said[0]
    assert found.losses.tolist() == run().losses.tolist()
    assert not pyro.poutine.runtime._PYRO_STACK


def test_compiled_steps_say_that_they_do_not_pickle():
    svi = CompiledSVI(model, AutoNormal(model), torch.optim.Adam, pplvi.ELBO(), mode="trace")
    with pytest.raises(ValueError, match=r"neither pickle nor copy: expected its state_dict\(\)"):
        pickle.dumps(svi)
