import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.errors import InputError
from mmjax.weights.files import open_tensors
from mmjax.weights.hub import resolve

hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """The Hub's cache in a folder of the test, and no way to the network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    # The library reads the environment when it is first imported, which may be long ago.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def cached(cache: Path, repository: str, files: dict[str, bytes], commit=COMMIT, ref="main"):
    """A repository as the library lays it out: references, and links into a store of contents."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    for number, (name, content) in enumerate(files.items()):
        blob = folder / "blobs" / f"{commit}{number}"
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def weights(folder: Path) -> bytes:
    save_file({"a": np.ones(2, np.float32)}, folder / "temporary")
    return (folder / "temporary").read_bytes()


def refused(source, *words, **options):
    with pytest.raises(InputError) as error:
        resolve(source, **options)
    for word in words:
        assert word in str(error.value)


# Paths


def test_local_paths_stay(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for path in ("owner/name", Path("owner/name"), str(tmp_path), "owner/name@best", "gs://a/b"):
        assert resolve(path) == Path(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"


def test_path_that_is_not_there(tmp_path):
    refused(tmp_path / "x", str(tmp_path / "x"), "no such file or folder")
    refused("openai/clip-vit-base-patch32", "hf://openai/clip-vit-base-patch32")
    refused("owner/name@best", "hf://owner/name@best")


# The cache


def test_cached_repository(offline, tmp_path):
    files = {"config.json": b"{}", "model.safetensors": weights(tmp_path), "README.md": b""}
    snapshot = cached(offline, "owner/name", files)
    assert resolve("hf://owner/name") == snapshot
    assert resolve("hf://owner/name/") == snapshot
    assert open_tensors(resolve("hf://owner/name"))["a"].tolist() == [1, 1]


def test_revisions(offline, tmp_path):
    files = {"model.safetensors": weights(tmp_path)}
    main = cached(offline, "owner/name", files)
    older = cached(offline, "owner/name", files, OLDER, ref="v1.0")
    assert resolve("hf://owner/name@main") == main
    assert resolve("hf://owner/name@v1.0") == older
    assert resolve(f"hf://owner/name@{OLDER}") == older
    request = cached(offline, "owner/name", files, "a" * 40, ref="refs/pr/3")
    assert resolve("hf://owner/name@refs/pr/3/model.safetensors") == request / "model.safetensors"
    refused("hf://owner/name@v2.0", "hf://owner/name@v2.0", "--revision v2.0")


def test_inside_a_repository(offline, tmp_path):
    files = {"sub/deep/model.safetensors": weights(tmp_path), "siglip/vit.npz": b"1"}
    snapshot = cached(offline, "google/models", files)
    assert resolve("hf://google/models/sub/deep") == snapshot / "sub" / "deep"
    assert resolve("hf://google/models/siglip/vit.npz") == snapshot / "siglip" / "vit.npz"
    refused("hf://google/models/siglip/other.npz", "other.npz", "vit.npz")
    refused("hf://google/models/absent", "absent", "Files there: none")
    refused("hf://google/models", "siglip, sub", "model.safetensors")


def test_description_alone(offline, tmp_path):
    snapshot = cached(offline, "owner/name", {"tokenizer.json": b"{}"})
    assert resolve("hf://owner/name", weights=False) == snapshot
    refused("hf://owner/name", "pytorch_model.bin", "tokenizer.json")


def test_not_cached(offline):
    words = (
        "hf://openai/clip",
        str(offline),
        "HF_HUB_OFFLINE",
        "HF_HOME",
        "hf download openai/clip",
    )
    refused("hf://openai/clip", *words)
    cached(offline, "openai/other", {})
    refused("hf://openai/clip", *words)


def test_environment_as_a_user_sets_it(tmp_path):
    snapshot = cached(tmp_path / "home" / "hub", "owner/name", {"config.json": b"{}"})
    script = (
        "from mmjax.weights.hub import resolve\n"
        "print(resolve('hf://owner/name', weights=False))\n"
        "resolve('hf://owner/other')"
    )
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "hf_secret",
    }
    environment.pop("HF_HUB_CACHE", None)
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert ran.stdout == f"{snapshot}\n"
    assert "InputError: hf://owner/other: the Hub cannot be reached" in ran.stderr
    assert "hf_secret" not in ran.stderr


@pytest.mark.parametrize(
    "source",
    [
        "hf://name",
        "hf://",
        "hf://owner/name@",
        "hf://owner/name@a@b",
        "hf://owner/name/../other",
        "hf://owner/name@../../x",
        "hf://owner/name@..",
        "hf://../name",
        "hf://owner/name//etc/passwd",
    ],
)
def test_sources_that_name_nothing(offline, source):
    cached(offline, "owner/name", {"model.safetensors": b"1"})
    refused(source, source, "hf://owner/name@revision")


def test_names_that_the_hub_does_not_allow():
    refused("hf://owner/na--me", "hf://owner/na--me", "no name of a repository")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("hf://owner/name", "pip install huggingface_hub")


# The network, played


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A repository `files` on a Hub that fetches what it is asked for, and remembers it."""
    from huggingface_hub.utils import filter_repo_objects

    played = SimpleNamespace(files=[], fetched=[], error=None)
    snapshot = tmp_path / "snapshot"

    def snapshot_download(repository, *, revision, allow_patterns, ignore_patterns):
        if played.error:
            raise played.error
        for name in filter_repo_objects(
            played.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_text("")
            played.fetched.append(name)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return played


DESCRIPTIONS = ["config.json", "preprocessor_config.json", "vocab.txt", "spiece.model"]


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], ["model.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (["open_clip_model.safetensors", "pytorch_model.bin"], ["open_clip_model.safetensors"]),
        (["open_clip_pytorch_model.bin"], ["open_clip_pytorch_model.bin"]),
        (["model.safetensors", "open_clip_model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "onnx/model.safetensors", "a/config.json"], ["model.safetensors"]),
        (
            [
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.fp16.safetensors",
            ],
            [
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ],
        ),
    ],
)
def test_one_kind_of_weights_is_fetched(server, there, fetched):
    server.files = [*DESCRIPTIONS, "README.md", *there]
    resolve("hf://owner/name")
    assert set(server.fetched) == {*DESCRIPTIONS, *fetched}


def test_no_weights_are_fetched_for_a_processor(server):
    server.files = [*DESCRIPTIONS, "model.safetensors", "pytorch_model.bin"]
    resolve("hf://owner/name", weights=False)
    assert set(server.fetched) == set(DESCRIPTIONS)


def test_a_folder_and_a_file_of_a_repository(server):
    server.files = ["config.json", "sub/config.json", "sub/model.safetensors", "sub/a/vocab.txt"]
    server.files += ["sub/x.npz", "sub/y.npz"]
    assert resolve("hf://owner/name/sub").name == "sub"
    assert set(server.fetched) == {"sub/config.json", "sub/model.safetensors"}
    server.fetched.clear()
    assert resolve("hf://owner/name/sub/x.npz").name == "x.npz"
    assert set(server.fetched) == {"sub/config.json", "sub/x.npz"}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", ("gated", "https://huggingface.co/owner/name", "HF_TOKEN")),
        ("RepositoryNotFoundError", ("no such repository", "private", "hf auth login")),
        ("RevisionNotFoundError", ("no branch, tag or commit 'v9'",)),
        ("LocalEntryNotFoundError", ("cannot be reached", "HF_HOME")),
        ("HfHubHTTPError", ("download failed", "HfHubHTTPError")),
    ],
)
def test_what_the_hub_refuses(server, kind, words):
    error = getattr(hub.errors, kind)
    # The constructors want a response of whichever client library is in use.
    server.error = error.__new__(error, "Bearer hf_secret at https://user:password@proxy")
    with pytest.raises(InputError) as told:
        resolve("hf://owner/name@v9")
    for word in ("hf://owner/name@v9", *words):
        assert word in str(told.value)
    assert "hf_secret" not in str(told.value)
    assert "password" not in str(told.value)


def test_a_full_disk_is_no_missing_network(server):
    server.error = OSError(28, "No space left on device")
    refused("hf://owner/name", "download failed: No space left on device")
