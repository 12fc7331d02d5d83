"""Configurations composed once for several jobs, against Hydra composing each."""

from __future__ import annotations

import pickle

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from pipeline.run.composer import Composer, SweepLoader
from tests.pipeline.conftest import CONF

# The jobs of a sweep each: values and files, values of several kinds, keys added and deleted.
SWEEPS = {
    "values": [
        ["timesteps=4", "coding=gated", "coding.grains=3", "row=three"],
        ["timesteps=5", "coding=gated", "coding.grains=null", 'row="T=5, n=1"'],
        ["timesteps=5", "coding=gated", "evaluation.corpora=[wikitext2]", "row=a"],
        ["timesteps=5", "timesteps=6", "coding=gated", "coding.grains=${timesteps}"],
    ],
    "files": [
        ["experiment=codings", "timesteps=4", "transform=rotate", "coding=las"],
        ["experiment=codings", "timesteps=4", "transform=none", "coding=multigrain"],
        ["experiment=none", "model=llama2-7b", "model.name=seven", "runtime=offload"],
        ["coding=las", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "timesteps=3"],
    ],
    "keys": [
        ["coding=gated", "++corpus.mine.path=a.txt", "evaluation.corpora=[mine]"],
        ["coding=gated", "+corpus.mine={path: b}", "corpus.mine.path=c"],
        ["coding=gated", "timesteps=7", "~table.wide"],
        ["coding.grains=4", "~coding.grains"],
    ],
}


@pytest.fixture
def loader():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_job_has_the_configuration_that_hydra_composes(sweep, loader, monkeypatch):
    monkeypatch.setenv("PIPELINE_RUN_ID", "run")
    master = compose("config", ["experiment=frontier"], return_hydra_config=True)
    once = SweepLoader(loader, master)
    for job in SWEEPS[sweep]:
        composed, expected = (each.load_sweep_config(master, job) for each in (once, loader))
        assert OmegaConf.to_container(composed) == OmegaConf.to_container(expected)
        composed.hydra.job.num = 7
        del composed.coding  # what a job does with its configuration reaches no other
        again = once.load_sweep_config(master, job)
        assert OmegaConf.to_container(again) == OmegaConf.to_container(expected)
    files = len(once.composer.merged)
    assert (files == 1) if sweep == "values" else (files > 1)


def test_values_are_set_without_composing_again(loader):
    composed = []

    def count(overrides):
        composed.append(overrides)
        return compose("config", overrides)

    composer = Composer(count, ["coding"])
    for timesteps in range(4, 9):
        for coding in ("las", "gated"):
            config = composer([f"timesteps={timesteps}", f"coding={coding}"])
            assert (config.timesteps, config.coding.timesteps) == (timesteps, timesteps)
    assert composed == [["coding=las"], ["coding=gated"]]


@pytest.mark.parametrize("wrong", ["coding.timestep=3", "coding=nothing", "timesteps.a=3"])
def test_what_cannot_be_composed_is_refused_as_hydra_does(wrong, loader):
    composer = Composer(lambda overrides: compose("config", overrides), ["coding"])
    with pytest.raises(HydraException) as expected:
        compose("config", ["coding=gated", wrong])
    with pytest.raises(type(expected.value)) as refused:
        composer(["coding=gated", wrong])
    assert str(refused.value) == str(expected.value)


def test_another_process_is_sent_no_merged_files(loader, monkeypatch):
    monkeypatch.setenv("PIPELINE_RUN_ID", "run")
    master = compose("config", ["experiment=none"], return_hydra_config=True)
    here = SweepLoader(loader, master)
    job = ["coding=las", "timesteps=4"]
    config = here.load_sweep_config(master, job)
    there = pickle.loads(pickle.dumps(here))
    assert not there.composer.merged and there.load_sweep_config(master, job) == config
    assert there.list_groups("coding") == loader.list_groups("coding")


def test_every_file_is_parsed_once(loader, monkeypatch):
    monkeypatch.setenv("PIPELINE_RUN_ID", "run")
    master = compose("config", ["experiment=none"], return_hydra_config=True)
    read: list[str] = []
    load = OmegaConf.load
    monkeypatch.setattr(OmegaConf, "load", lambda file: read.append(file.name) or load(file))
    sweep = SweepLoader(loader, master)
    for coding in ("las", "gated", "las"):
        sweep.load_sweep_config(master, [f"coding={coding}"])
    ours = [name for name in read if name.startswith(str(CONF))]
    assert len(ours) == len(set(ours)) > 10
    assert {f"{CONF}/coding/{name}.yaml" for name in ("las", "gated")} <= set(ours)
