"""python -m mmjax.weights, as users call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mmjax.weights.files import open_tensors

GOLDENS = Path(__file__).parents[1] / "goldens"
WEIGHTS = GOLDENS / "clip" / "model.safetensors"


def convert(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-m", "mmjax.weights", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_there_and_back(tmp_path):
    to_ours = convert(GOLDENS / "clip", "ours", folder=tmp_path)
    assert to_ours.returncode == 0, to_ours.stderr
    lines = to_ours.stdout.splitlines()
    assert lines.pop(0).startswith("No processor goes along: ")  # a golden has none
    assert lines[0].split() == ["there", "here", "shape", "what", "is", "done"]
    row = next(line for line in lines if "image/blocks/layers/mlp/up/kernel" in line)
    assert row.split(maxsplit=3) == [
        "vision_model.encoder.layers.{0…0}.mlp.fc1.weight",
        "image/blocks/layers/mlp/up/kernel",
        "1×12×20",
        "transposed, 1 layers stacked",
    ]
    back = convert("ours", "theirs", folder=tmp_path)
    assert back.returncode == 0, back.stderr
    before, after = open_tensors(GOLDENS / "clip"), open_tensors(tmp_path / "theirs")
    assert set(before) == set(after)
    for name in before:
        assert (before[name] == after[name]).all(), name
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["architectures"] == ["CLIPModel"]


def test_bad_input_is_one_sentence(tmp_path):
    for arguments, message in (
        (("nowhere", "there"), "there is no such file or folder"),
        ((WEIGHTS, "there", "--family=clop"), "Did you mean clip"),
    ):
        run = convert(*arguments, folder=tmp_path)
        assert run.returncode == 2
        assert run.stderr.startswith("error: ")
        assert message in run.stderr
        assert "Traceback" not in run.stderr
    assert not (tmp_path / "there").exists()
