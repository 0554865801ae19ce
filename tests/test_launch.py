"""The files to copy in launch/: whole, and of keys, flags and recipes that exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmjax.config import train_config

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.s*"))
FILES = [*SCRIPTS, ROOT / "docs" / "scale.md", ROOT / "docs" / "troubleshooting.md"]


def stand_in(folder, name):
    """A program of that name in `folder` which prints what it was called with."""
    path = folder / name
    path.write_text('#!/bin/bash\nprintf "%s\\n" "${0##*/}" "$@"\nexit ${STATUS:-0}\n')
    path.chmod(0o755)


def call(script, *arguments, folder="", **variables):
    """The exit status and the output of a script; programs in `folder` go before the system's."""
    result = subprocess.run(
        ["bash", str(script), *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/home/me", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    head = script.read_text()
    assert head.startswith("#!/usr/bin/env bash\n# One run on ")
    assert os.access(script, os.X_OK) == (script.suffix == ".sh")


@pytest.mark.parametrize("script", [p for p in SCRIPTS if p.suffix == ".sh"], ids=lambda p: p.name)
def test_scripts_say_what_they_do(script):
    told = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    for command in re.findall(r"^  (\w+)\)$", script.read_text(), re.MULTILINE):
        assert f"launch/{script.name} {command} " in told.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_key_recipe_and_file_exists(path):
    text, config = path.read_text(), train_config()
    for key in re.findall(r"--config\.([\w.]+)=", text):
        part = config
        for name in key.split("."):
            assert name in part, f"{path.name}: --config.{key}"
            part = part[name]
    for file in re.findall(r"\b(?:configs|launch|docs|mmjax)/[\w/]+\.(?:py|sh|sbatch|md)\b", text):
        assert (ROOT / file).exists(), f"{path.name}: {file}"


def test_every_flag_exists():
    told = subprocess.run(
        [sys.executable, "train.py", "--helpfull"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    flags = r"--(distributed|coordinator|num_processes|process_id|\w+_timeout|interrupted_status)"
    for path in FILES:
        for flag in re.findall(flags, path.read_text()):
            assert f"--{flag}" in told or f"--[no]{flag}" in told, f"{path.name}: --{flag}"


@pytest.mark.parametrize("spot", ["true", "false"])
def test_the_jobset_is_what_its_variables_say(spot):
    script = ROOT / "launch" / "gke_jobset.sh"
    _, text = call(script, "print", NAME="mine", HOSTS="2", SPOT=spot, BUCKET="gs://b")
    jobset = yaml.safe_load(text)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert jobset["metadata"]["name"] == "mine"
    assert job["completions"] == job["parallelism"] == 2
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # else there is no podFailurePolicy
    assert pod["nodeSelector"].get("cloud.google.com/gke-spot") == (
        "true" if spot == "true" else None
    )
    (container,) = pod["containers"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    (command,) = container["args"]
    assert command.startswith("exec python train.py --distributed ")
    assert command.endswith(" --workdir=gs://b/mine")


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        ("0", "0", False),
        ("2", "0", False),
        ("75", "0", True),
        ("134", "3", True),
        ("75", "9", False),
    ],
)
def test_slurm_tries_again_what_may_go_better(tmp_path, status, restarts, requeued):
    stand_in(tmp_path, "srun")
    (tmp_path / "scontrol").symlink_to("/bin/echo")
    variables = {"STATUS": status, "SLURM_RESTART_COUNT": restarts, "SLURM_JOB_ID": "7"}
    script = ROOT / "launch" / "slurm.sbatch"
    found, text = call(script, folder=tmp_path, MOST_RESTARTS="9", RUN="mine", **variables)
    assert found == int(status)
    assert ("requeue 7" in text) == requeued
    assert "--workdir=/home/me/runs/mine" in text.splitlines()
    assert "--config.data.threads=8" in text.splitlines()  # OVERRIDES is several words
