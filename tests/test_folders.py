"""Runs in object storage, held against one in memory."""

import json

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from orbax.checkpoint import v1 as ocp

import eval as evaluation
from mmjax import config as configuration
from mmjax.errors import InputError
from mmjax.folders import absolute, is_remote, move
from mmjax.training import progress
from mmjax.training.checkpoints import Checkpointer, find_checkpoint
from mmjax.training.progress import MetricWriter


class Bucket(MemoryFileSystem):
    """Objects in memory under gs:// addresses; nothing can be appended to."""

    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def open(self, path, mode="rb", **options):
        assert "a" not in mode
        return super().open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    files = Bucket()
    files.store.clear()
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: files)
    return epath.Path("gs://bucket")


def test_an_address_is_not_made_a_local_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(absolute("gs://bucket/run")) == "gs://bucket/run"
    assert str(absolute("run")) == f"{tmp_path}/run"
    assert is_remote(bucket)
    assert not is_remote(tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    def missing(path):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(backend.fsspec_backend, "fs", missing)
    for use in (absolute, find_checkpoint, lambda path: Checkpointer(path, every=1, keep=1)):
        with pytest.raises(InputError, match=r"gs://bucket/run: .*gcsfs.*pip install 'mmjax\[gcs"):
            use("gs://bucket/run")


def test_orbax_gets_the_address(bucket, monkeypatch):
    asked = []
    monkeypatch.setattr(ocp.training, "Checkpointer", lambda folder, **_: asked.append(folder))
    Checkpointer("gs://bucket/run", every=1, keep=1)
    assert [str(folder) for folder in asked] == ["gs://bucket/run/checkpoints"]


def test_a_checkpoint_is_found_by_its_address(bucket):
    step = bucket / "run/checkpoints/40"
    (step / "state").mkdir(parents=True)
    (step / "state/commit_success.txt").write_text("")
    assert str(find_checkpoint(step)) == "gs://bucket/run/checkpoints/40"


def test_the_resolved_config_is_written_beside_the_run(bucket, tiny_config):
    configuration.save(tiny_config, bucket / "run" / "config.json")
    assert json.loads((bucket / "run" / "config.json").read_text())["batch_size"] == 8


def written(folder):
    return [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    ]


def test_metrics_are_rewritten_where_nothing_is_appended(bucket, monkeypatch):
    clock = iter([0.0, 30.0, 61.0, 61.0, 70.0, 70.0, *[100.0] * 9])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with MetricWriter(bucket, config={}, tensorboard=False) as writer:
        writer.write(1, {"train/loss": 1.0})  # after half a minute
        assert not (bucket / "metrics.jsonl").exists()
        writer.write(2, {"train/loss": 1.0})  # after one
        assert written(bucket) == [1, 2]
        writer.write(3, {"train/loss": 1.0})
        assert written(bucket) == [1, 2]
    assert written(bucket) == [1, 2, 3]
    with MetricWriter(bucket, config={}, tensorboard=False, resume_step=2) as writer:
        writer.write(3, {"train/loss": 1.0})
    assert written(bucket) == [1, 2, 3]


def test_a_folder_moves_there(bucket, tmp_path):
    (tmp_path / "trace" / "deep").mkdir(parents=True)
    (tmp_path / "trace" / "deep" / "file").write_bytes(b"\0\1")
    move(tmp_path / "trace", bucket / "profile")
    assert (bucket / "profile/deep/file").read_bytes() == b"\0\1"
    assert not (tmp_path / "trace").exists()


def test_reports_are_written_to_disks_alone():
    with pytest.raises(InputError, match="--output is gs://bucket/scores: reports are written to"):
        evaluation.report_folder("gs://bucket/scores")
