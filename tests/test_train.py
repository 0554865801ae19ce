"""The training program, as a user runs it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import train
from mmjax.errors import InputError
from mmjax.training.checkpoints import (
    Checkpointer,
    find_checkpoint,
    load_assets,
    load_parameters,
)
from mmjax.training.program import Program
from tests.models.reference import assert_same

ROOT = Path(__file__).resolve().parents[1]


def log_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses_of(workdir):
    return [line["train/loss"] for line in log_of(workdir) if "train/loss" in line]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_run(tiny_config, tmp_path):
    """With all that a state may hold: moments, an average, a queue, a count for the ramp."""
    tiny_config.objectives.contrastive.weight = 0.0
    tiny_config.objectives.momentum_contrastive.update(weight=1.0, queue_size=24)
    tiny_config.objectives.masked_language.update(distill=0.4, ramp_steps=3)
    tiny_config.optimizer.ema_decay = 0.9
    tiny_config.checkpoint.update(every=2, keep=2)
    train.train(tiny_config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(find_checkpoint(f"{tmp_path}/parts@4"))  # as if it had ended at step 3
    train.train(tiny_config, tmp_path / "parts")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    for ema in (False, True):
        one, two = (load_parameters(tmp_path / name, ema=ema) for name in ("parts", "whole"))
        assert_same(one, two)
    assert log_of(tmp_path / "parts")[-1]["train/momentum_contrastive/queue_filled"] == 1


def test_what_a_run_leaves_behind(tiny_config, tmp_path):
    tiny_config.eval.every, tiny_config.eval.retrieval.run = 3, True
    tiny_config.checkpoint.best_metric = "retrieval/image_to_text/R@1"
    tiny_config.log.profile, tiny_config.total_steps = 1, 6
    train.train(tiny_config, tmp_path)
    log = log_of(tmp_path)
    steps = {line["step"]: line for line in log if "train/loss" in line}
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    last = steps[6]
    for name in ("contrastive", "matching", "masked_language"):
        assert np.isfinite(last[f"train/{name}/loss"])
    parts = sum(last[f"train/{n}/loss"] for n in ("contrastive", "matching", "masked_language"))
    assert last["train/loss"] == pytest.approx(parts, rel=1e-5)
    assert last["train/pairs_per_second"] == pytest.approx(8 / last["train/step_seconds"])
    assert {"train/input_wait_seconds", "train/model_tflops_per_second"} < last.keys()
    assert "train/mfu" not in last  # the CPU's peak is not in the table
    evaluated = [line for line in log if "eval/retrieval/image_to_text/R@1" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    assert "eval/matching/loss" in evaluated[0]
    assert load_assets(tmp_path)["config"]["model"]["text"]["vocabulary_size"] > 100
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["batch_size"] == 8
    assert config["model"]["image"]["image_size"] == 64
    assert "text/embeddings/token_embedding/embedding" in (tmp_path / "parameters.txt").read_text()
    assert (tmp_path / "tokenizer.json").read_text() == load_assets(tmp_path)["tokenizer"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    recalls = {line["step"]: line["eval/retrieval/image_to_text/R@1"] for line in evaluated}
    best = max(recalls, key=lambda step: (recalls[step], step))  # the later of equals
    assert int(find_checkpoint(f"{tmp_path}@best").name) == best


@pytest.mark.slow
def test_fine_tuning_starts_from_the_encoders_and_resizes_positions(
    tiny_config, pretrained, tmp_path
):
    for objective in tiny_config.objectives.values():
        objective.weight = 0.0
    tiny_config.objectives.answering.weight = 1.0
    tiny_config.data.task = "questions"
    tiny_config.data.image_size = 96
    tiny_config.init_from = str(pretrained)
    tiny_config.total_steps = 1
    tiny_config.optimizer.learning_rate = 0.0
    train.train(tiny_config, tmp_path / "vqa")
    before, after = load_parameters(pretrained), load_parameters(tmp_path / "vqa")
    assert_same(before["text"], after["text"])
    assert_same(before["fusion"], after["fusion"])
    assert before["image"]["position_embedding"].shape == (5, 16)
    assert after["image"]["position_embedding"].shape == (10, 16)
    assert "answering" in after
    assert "answering" not in before


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("image", "text", "fusion"), ("image",)])
def test_bfloat16_trains_near_float32(tiny_config, pretrained, tmp_path, parts):
    for part in parts:
        tiny_config.model[part].dtype = "bfloat16"
    train.train(tiny_config, tmp_path)
    np.testing.assert_allclose(losses_of(tmp_path), losses_of(pretrained), rtol=0.02)
    for leaf in jax.tree.leaves(load_parameters(tmp_path)):
        assert leaf.dtype == np.float32


def test_a_failing_evaluation_loses_no_steps(tiny_config, tmp_path):
    class Broken:
        def score(self, state):
            raise RuntimeError("no disk")

    tiny_config.eval.every = 2
    program = SimpleNamespace(config=tiny_config, assets={"config": {}, "tokenizer": ""})
    monitor = SimpleNamespace(pause=nullcontext, require_finite=lambda step: None)
    state = {"step": np.asarray(2), "params": {"a": np.ones(3)}}
    with (
        Checkpointer(tmp_path, **tiny_config.checkpoint) as checkpointer,
        pytest.raises(RuntimeError, match="no disk"),
    ):
        train.evaluate_and_save(2, state, program, Broken(), checkpointer, monitor, ends=False)
    assert find_checkpoint(tmp_path).name == "2"


def test_another_architecture_in_the_workdir_is_refused(tiny_config, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    tiny_config.model.text.depth = 2
    with pytest.raises(InputError, match=r"another architecture[\s\S]*text/blocks/layers/mlp/up"):
        train.train(tiny_config, tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 12, "batch_size = 12 does not split over .* = 8 devices; take 8 or 16"),
        ("mesh.tensor", 3, "mesh: .* is 6 devices, but there are 8"),
        ("data.source", "flicker8k", "Did you mean flickr8k"),
        ("data.source", "flickr8k", "data.root is empty"),
        ("objectives.answering.weight", 1.0, "closed list of answers"),
        ("optimizer.accumulate", 2, "8 devices × optimizer.accumulate = 2 slices; take 16"),
        ("optimizer.schedule.kind", "cosin", "Did you mean cosine"),
        ("model.image.patch_size", 30, "image_size 64 is no multiple of patch_size 30"),
        ("init_from", "nowhere", "No checkpoint at .*nowhere"),
        ("data.vocabulary", "vocab.txt", "vocab.txt: the vocabulary cannot be read"),
        ("log.every", 0, "log.every is 0; it is at least 1"),
        ("objectives.matching.weight", -1.0, "weight is -1.0; it is at least 0"),
        ("checkpoint.best_metric", "itm/roc_auc", "set eval.every"),
    ],
)
def test_bad_settings_say_what_to_do(tiny_config, tmp_path, key, value, message):
    tiny_config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=message):
        train.train(tiny_config, tmp_path / "run")


def test_accumulation_is_refused_where_examples_are_compared(tiny_config, tmp_path):
    tiny_config.optimizer.accumulate, tiny_config.batch_size = 2, 16
    with pytest.raises(InputError, match="matching compare every example"):
        train.train(tiny_config, tmp_path / "run")


def in_place_of_training(monkeypatch, parameter_norm=1.0):
    """A step that counts, and leaves parameters of that norm's kind: no program is compiled."""

    def step(state, batch):
        params = jax.tree.map(lambda x: x * parameter_norm, state.params)
        metrics = dict.fromkeys(("loss", "gradient_norm"), 1.0)
        metrics |= {"parameter_norm": parameter_norm, "bad_records": batch["substituted"].sum()}
        return dataclasses.replace(state, params=params, step=state.step + 1), metrics

    monkeypatch.setattr(Program, "compile_step", lambda *arguments: (step, 0.0))


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(
    tiny_config, pretrained, tmp_path, monkeypatch
):
    shutil.copytree(pretrained, tmp_path / "run")
    in_place_of_training(monkeypatch, parameter_norm=np.inf)
    tiny_config.total_steps = 8
    # Every step would be saved, and none is looked at before the last one is logged.
    tiny_config.log.every, tiny_config.checkpoint.every = 4, 1
    with pytest.raises(InputError, match="the run has diverged"):
        train.train(tiny_config, tmp_path / "run")
    for leaf in jax.tree.leaves(load_parameters(tmp_path / "run")):
        assert np.isfinite(leaf).all()


@pytest.fixture
def photographs(tmp_path):
    """A Flickr8k folder of 24 pictures, the third of them truncated."""
    from PIL import Image

    folder = tmp_path / "flickr"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(24)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)).save(folder / "images" / name)
    whole = (folder / "images" / "2.jpg").read_bytes()
    (folder / "images" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    captions = [f"{name}#{k}\tpicture {name} seen {k}" for name in names for k in (0, 1)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(captions) + "\n")
    (folder / "Flickr_8k.trainImages.txt").write_text("\n".join(names) + "\n")
    (folder / "Flickr_8k.devImages.txt").write_text("\n".join(names[:12]) + "\n")
    return folder


def test_bad_pictures_are_counted_and_too_many_stop_the_run(
    tiny_config, photographs, tmp_path, monkeypatch
):
    in_place_of_training(monkeypatch)
    tiny_config.data.update(source="flickr8k", root=str(photographs), max_bad_fraction=0.2)
    tiny_config.total_steps = 3  # an epoch
    train.train(tiny_config, tmp_path / "patient")
    assert log_of(tmp_path / "patient")[-1]["train/bad_records"] == 1

    tiny_config.data.max_bad_fraction = 0.0
    tiny_config.total_steps = 9
    with pytest.raises(InputError, match="1 bad records were replaced"):
        train.train(tiny_config, tmp_path / "strict")
    step = int(next((tmp_path / "strict" / "checkpoints").iterdir()).name)
    assert step == log_of(tmp_path / "strict")[-1]["step"] < 9  # saved where it stopped

    tiny_config.data.on_bad_record = "raise"
    with pytest.raises(InputError, match=r"2\.jpg"):
        train.train(tiny_config, tmp_path / "raise")


# --- The command line itself ----------------------------------------------------------------------


def run(*arguments, cwd, program="train.py"):
    return subprocess.run(
        [sys.executable, str(ROOT / program), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batchsize=3"], 'config.batchsize is no key of the config. Did you mean "ba'),
        (["--config.data.rot=x"], 'config.data.rot is no key of the config. Did you mean "ro'),
        (["--config.batch_size=many"], "batch_size=many"),
        (["--wrkdir=x"], "Did you mean: workdir"),
        ([], "flag --workdir=None: Flag --workdir must have a value other than None"),
    ],
)
def test_bad_flags_end_in_one_sentence(arguments, message, tmp_path):
    result = run(f"--config={ROOT}/configs/quickstart.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quickstat.py", "quickstat.py. Did you mean quickstart.py?"),
        ("pretrain/siglip_b16.py:tin", "error: the recipe takes ':tiny' or nothing, not 'tin'."),
    ],
)
def test_a_mistyped_recipe_ends_in_one_sentence(recipe, message, tmp_path):
    result = run(f"--config={ROOT}/configs/{recipe}", "--workdir=x", cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_explains_itself(tmp_path):
    text = run("--help", cwd=tmp_path).stdout
    assert "--workdir" in text
    assert "total_steps" in text
    assert "resumes from its last checkpoint" in text


def test_sigterm_writes_a_checkpoint_and_stops(tmp_path):
    tiny = [
        "--config.model.image.depth=1",
        "--config.model.text.depth=1",
        "--config.model.fusion.depth=1",
        "--config.batch_size=8",
        "--config.log.every=1",
        "--config.log.tensorboard=False",
        "--config.eval.every=0",
        "--config.total_steps=100000",
    ]
    recipe = f"--config={ROOT}/configs/quickstart.py"
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), recipe, "--workdir=run", *tiny],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(steps) == 1
    assert steps[0] >= 2
    assert "SIGTERM: stopping after this step" in output


@pytest.mark.slow
def test_a_student_learns_from_a_checkpoint(tiny_config, pretrained, tmp_path):
    for name in ("contrastive", "matching", "masked_language"):
        tiny_config.objectives[name].weight = 0.0
    tiny_config.objectives.similarity_distillation.weight = 1.0
    tiny_config.objectives.word_distillation.weight = 1.0
    with pytest.raises(InputError, match=r"set config\.teacher\.checkpoint"):
        train.train(tiny_config, tmp_path / "student")
    tiny_config.teacher.checkpoint = tiny_config.init_from = str(pretrained)
    tiny_config.optimizer.learning_rate = 0.0
    train.train(tiny_config, tmp_path / "student")
    assert losses_of(tmp_path / "student")[0] == pytest.approx(0, abs=1e-5)
    assert log_of(tmp_path / "student")[0]["train/model_tflops_per_second"] > 0
    tiny_config.eval.every, tiny_config.eval.losses = 2, True
    with pytest.raises(InputError, match=r"Set eval\.losses=False"):
        train.train(tiny_config, tmp_path / "evaluated")
