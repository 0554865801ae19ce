"""Which changes are tried, and when a search stops."""

import json
import subprocess

import pytest

from configs.pretrain import coattention_b16, siglip_b16
from mmjax.plan import search as searching
from mmjax.plan.search import larger_fsdp, search, smaller_batches, stronger_remat
from mmjax.remat import REMAT_POLICIES

IMAGE, TEXT = "--config.model.image.remat", "--config.model.text.remat"


@pytest.fixture
def config():
    config = siglip_b16.get_config()
    config.batch_size = 64
    config.model.image.remat, config.model.text.remat = "dots", "none"
    return config


def test_remat_only_grows(config):
    assert list(stronger_remat(config)) == [
        (f"{TEXT}=products",),
        (f"{TEXT}=dots",),
        (f"{IMAGE}=attention", f"{TEXT}=attention"),
        (f"{IMAGE}=heads", f"{TEXT}=heads"),
        (f"{IMAGE}=full", f"{TEXT}=full"),
    ]


def test_every_policy_has_its_place():
    assert set(searching.REMAT) == set(REMAT_POLICIES)


@pytest.mark.parametrize("recipe", [siglip_b16, coattention_b16])
def test_there_is_remat_to_try_on_the_flagships(recipe):
    tried = list(stronger_remat(recipe.get_config()))
    assert tried
    assert all(flag.endswith("=full") for flag in tried[-1])


def test_fsdp_grows_to_all_devices(config):
    found = [overrides[-1] for overrides in larger_fsdp(config, 32)]
    assert found == [f"--config.mesh.fsdp={size}" for size in (4, 16, 32)]
    config.mesh.tensor = 4
    assert [overrides[-1] for overrides in larger_fsdp(config, 16)] == ["--config.mesh.fsdp=4"]


def test_batches_shrink_as_far_as_the_devices_share_them(config):
    assert list(smaller_batches(config, 16)) == [
        ("--config.batch_size=32",),
        ("--config.batch_size=16",),
    ]


@pytest.fixture
def commands(monkeypatch):
    """The commands that a search runs; those with full remat fit."""
    run = []

    def plan(command, **_):
        run.append(command)
        fits = any("remat=full" in flag for flag in command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"fits": fits}), "")

    monkeypatch.setattr(searching.subprocess, "run", plan)
    return run


def test_each_kind_of_change_is_tried_until_it_helps(config, commands):
    trials = search(config, 16, ["--config=recipe.py", "--topology=v5e:4x4", "--schedules"])
    # Five policies; fsdp 4 and 16; two batches. One helped, so nothing is combined.
    assert [trial.fits for trial in trials] == [False] * 4 + [True] + [False] * 4
    assert all(command[3] == "--config=recipe.py" for command in commands)
    assert all(
        command.index("--noschedules") > command.index("--schedules") for command in commands
    )


def test_what_does_not_help_alone_is_tried_together(config, monkeypatch):
    config.model.image.remat = config.model.text.remat = "none"
    commands_that_fit = []

    def plan(command, **_):
        fits = any("remat=full" in x for x in command) and "--config.mesh.fsdp=16" in command
        commands_that_fit.extend([command] if fits else [])
        return subprocess.CompletedProcess(command, 0, json.dumps({"fits": fits}), "")

    monkeypatch.setattr(searching.subprocess, "run", plan)
    trials = search(config, 16, ["--config=recipe.py"])
    assert trials[-1].fits
    assert len(commands_that_fit) == 1


def test_a_change_that_is_no_run_is_told_as_such(config, monkeypatch):
    monkeypatch.setattr(
        searching.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 2, "", "error: no"),
    )
    assert all(trial.plan is None for trial in search(config, 4, []))
