import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mmjax.errors import InputError
from mmjax.json_files import read_json
from mmjax.weights.files import open_tensors, write_safetensors

ONE = np.ones(2, np.float32)


def refused(path, *words):
    with pytest.raises(InputError) as error:
        dict(open_tensors(path))
    for word in (str(path), *words):
        assert word in str(error.value)


def sharded(folder, weight_map, shards):
    """A folder of shards (name -> names of its tensors) and an index that says `weight_map`."""
    for file, names in shards.items():
        save_file({name: np.full(2, len(name), np.float32) for name in names}, folder / file)
    index = json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


# Folders


def test_safetensors_are_preferred_then_their_index_then_archives(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
    sharded(tmp_path, {"sharded": "model-00001-of-00001.safetensors"}, {
        "model-00001-of-00001.safetensors": ["sharded"]
    })  # fmt: skip
    assert list(open_tensors(tmp_path)) == ["sharded"]
    save_file({"single": ONE}, tmp_path / "model.safetensors")
    assert list(open_tensors(tmp_path)) == ["single"]
    assert open_tensors(tmp_path).origin == str(tmp_path)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "model.safetensors"])
def test_names_of_single_files(tmp_path, name):
    save_file({"a": ONE}, tmp_path / name)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"garbage")
    assert list(open_tensors(tmp_path)) == ["a"]


def test_archive_in_a_folder(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert list(open_tensors(tmp_path)) == ["a"]


def test_folder_without_weights(tmp_path):
    refused(tmp_path, "holds: nothing")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "epoch_3.pth").write_bytes(b"1")
    refused(tmp_path, "config.json, epoch_3.pth", "model.safetensors", "pass that file")
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text("")
    refused(tmp_path, "and 32 more")


def test_links_as_in_the_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": ONE}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert open_tensors(snapshot)["a"].tolist() == [1, 1]
    (snapshot / "model.safetensors").unlink()
    sharded(snapshot, {"a": "model-00001-of-00001.safetensors"}, {})
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/0123")
    assert open_tensors(snapshot)["a"].tolist() == [1, 1]
    (blobs / "0123").unlink()
    refused(snapshot, "not there")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    refused(snapshot, "gone")


# Shards


def test_shards(tmp_path):
    weight_map = {"a": "one.safetensors", "bb": "one.safetensors", "ccc": "two.safetensors"}
    shards = {"one.safetensors": ["a", "bb"], "two.safetensors": ["ccc"]}
    tensors = open_tensors(sharded(tmp_path, weight_map, shards))
    assert {name: tensors[name].tolist() for name in tensors} == {
        "a": [1, 1],
        "bb": [2, 2],
        "ccc": [3, 3],
    }
    assert set(open_tensors(tmp_path / "model.safetensors.index.json")) == set(tensors)


def test_shards_of_archives(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{i}-of-00002.bin" for name, i in (("a", 1), ("b", 2))}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    tensors = open_tensors(tmp_path)
    assert (tensors["a"].tolist(), tensors["b"].tolist()) == ([1, 1], [0, 0])


@pytest.mark.parametrize(
    "written",
    ["../x.safetensors", "/etc/x.safetensors", "sub/../../x.safetensors", "..\\x.safetensors",
     "c:x.safetensors", "sub/x.safetensors", "x.bin", ".safetensors", "", "..", 3, None, ["x"],
     "x\0.safetensors", "x.safetensors\n"],
)  # fmt: skip
def test_shards_are_named_without_a_path(tmp_path, written):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for path in ("x.safetensors", "folder/sub/x.safetensors"):
        save_file({"a": ONE}, tmp_path / path)
    refused(sharded(tmp_path / "folder", {"a": written}, {}), "'a'", "without a path")


def test_missing_shards_are_listed(tmp_path):
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"}
    folder = sharded(tmp_path, weight_map, {"one.safetensors": ["a"]})
    refused(folder, "three.safetensors, two.safetensors", "of 3 shards")


def test_tensor_that_its_shard_has_not(tmp_path):
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    shards = {"one.safetensors": ["a"], "two.safetensors": ["b", "c"]}
    refused(sharded(tmp_path, weight_map, shards), "'b' in one.safetensors")


def test_tensor_in_two_shards(tmp_path):
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    shards = {"one.safetensors": ["a"], "two.safetensors": ["a", "b"]}
    refused(sharded(tmp_path, weight_map, shards), "'a'", "one.safetensors", "two.safetensors")
    index = '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, "'a'", "twice")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]", "x"])
def test_index_that_is_none(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, "model.safetensors.index.json")


# Names


def test_names_are_normalised(tmp_path):
    arrays = {
        "module.bert.embeddings.LayerNorm.gamma": ONE,
        "module.bert.embeddings.LayerNorm.beta": 2 * ONE,
        "module.blocks.0.ls1.gamma": 3 * ONE,
        "module.LayerNorm.gamma.x": 4 * ONE,
        "module.module.x": 5 * ONE,
    }
    save_file(arrays, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    assert {name: tensors[name][0] for name in tensors} == {
        "bert.embeddings.LayerNorm.weight": 1,
        "bert.embeddings.LayerNorm.bias": 2,
        "blocks.0.ls1.gamma": 3,
        "LayerNorm.gamma.x": 4,
        "module.x": 5,
    }


def test_prefix_of_some_names_stays(tmp_path):
    save_file({"module.a": ONE, "b": ONE}, tmp_path / "model.safetensors")
    assert set(open_tensors(tmp_path)) == {"module.a", "b"}


def test_two_names_for_one_tensor(tmp_path):
    save_file({"LayerNorm.gamma": ONE, "LayerNorm.weight": ONE}, tmp_path / "model.safetensors")
    refused(tmp_path, "'LayerNorm.weight'", "'LayerNorm.gamma'", "twice")


def test_absent_tensor_is_a_key_error(tmp_path):
    save_file({"a": ONE}, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    assert "b" not in tensors
    assert tensors.get("b") is None
    with pytest.raises(KeyError):
        tensors["b"]


# Values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_values_that_are_not_finite(tmp_path, kind, value):
    path = tmp_path / "model.safetensors"
    broken = np.array([[1, value], [value, 2]], kind)
    save_file({"good": np.ones(2, np.float32), "layer.0.bad": broken}, path)
    tensors = open_tensors(path)
    assert tensors["good"].tolist() == [1, 1]
    with pytest.raises(InputError, match=r"model.safetensors.*of the 4 .*'layer.0.bad', 2 are NaN"):
        tensors["layer.0.bad"]


def test_float64_beyond_float32(tmp_path):
    save_file({"a": np.array([1e300])}, tmp_path / "model.safetensors")
    refused(tmp_path, "'a'", "float32")


# Writing


def test_written_arrays_are_read_by_the_library_and_by_us(tmp_path):
    values = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    arrays = {
        "plain": values,
        "transposed": values.T,
        "strided": values[::2, ::-1],
        "scalar": np.float32(2.5),
        "bfloat16": values.astype(ml_dtypes.bfloat16),
        "half": values.astype(np.float16),
        "ids": np.arange(3),
        "mask": values > 0,
        "jax": jnp.array(values),
        "big_endian": values.astype(">f4"),
    }
    write_safetensors(tmp_path / "new" / "model.safetensors", arrays)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "new" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        for name in arrays.keys() - {"bfloat16"}:  # which the library cannot read into numpy
            np.testing.assert_array_equal(file.get_tensor(name), arrays[name])
            assert file.get_tensor(name).shape == arrays[name].shape
    tensors = open_tensors(tmp_path / "new")
    assert tensors.dtype("bfloat16") == ml_dtypes.bfloat16
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name], np.asarray(array, tensors[name].dtype))


def test_written_shards(tmp_path):
    arrays = {f"layer.{i}": np.full(10, i, np.float32) for i in range(5)}
    arrays["large"] = np.zeros(100, np.float32)
    write_safetensors(tmp_path / "model.safetensors", arrays, max_shard_bytes=100)
    names = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = "model.safetensors.index.json"
    assert sorted(file.name for file in tmp_path.iterdir()) == [*names, index]
    assert [set(load_file(tmp_path / name)) for name in names] == [
        {"layer.0", "layer.1"},
        {"layer.2", "layer.3"},
        {"layer.4"},
        {"large"},
    ]
    assert read_json(tmp_path / index) == {
        "metadata": {"total_parameters": 150, "total_size": 600},
        "weight_map": {name: file for file in names for name in load_file(tmp_path / file)},
    }
    tensors = open_tensors(tmp_path)
    assert {name: tensors[name].tolist() for name in tensors} == {
        name: array.tolist() for name, array in arrays.items()
    }


def test_shards_as_transformers_splits_them(tmp_path):
    torch = pytest.importorskip("torch")
    hub = pytest.importorskip("huggingface_hub")
    generator = np.random.default_rng(0)
    arrays = {
        f"{i}": np.zeros(size, np.float32) for i, size in enumerate(generator.integers(1, 99, 40))
    }
    write_safetensors(tmp_path / "model.safetensors", arrays, max_shard_bytes=1000)
    split = hub.split_torch_state_dict_into_shards(
        {name: torch.from_numpy(array) for name, array in arrays.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=1000,
    )
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"]["total_size"] == split.metadata["total_size"]


def test_nothing_of_an_earlier_writing_remains(tmp_path):
    path = tmp_path / "model.safetensors"
    others = ["vision_model.safetensors", "model.safetensors.md", "model-1.safetensors"]
    for other in others:
        (tmp_path / other).write_text("")
    arrays = {"a": ONE, "b": ONE}
    write_safetensors(path, {"old": ONE, **arrays}, max_shard_bytes=8)
    write_safetensors(path, arrays, max_shard_bytes=8)
    assert set(open_tensors(tmp_path)) == {"a", "b"}
    write_safetensors(path, {"c": ONE})
    assert set(open_tensors(tmp_path)) == {"c"}
    assert sorted(os.listdir(tmp_path)) == sorted(["model.safetensors", *others])
    write_safetensors(path, arrays, max_shard_bytes=8)
    assert set(open_tensors(tmp_path)) == {"a", "b"}


def test_failed_writing_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": ONE})
    calls = []

    def full_disk(arrays, file, metadata):
        calls.append(file)
        if len(calls) == 2:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(arrays, file, metadata)

    monkeypatch.setattr("mmjax.weights.files.save_file", full_disk)
    with pytest.raises(InputError, match=r"model.safetensors: .*No space left"):
        write_safetensors(path, {"b": ONE, "c": ONE}, max_shard_bytes=8)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert open_tensors(tmp_path)["a"].tolist() == [1, 1]


def test_what_is_not_written(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=r"'a'.*NaN"):
        write_safetensors(path, {"a": np.array([np.nan], np.float32)})
    with pytest.raises(InputError, match=r"'a'.*complex64"):
        write_safetensors(path, {"a": np.ones(2, np.complex64)})
    assert not path.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_safetensors(tmp_path / "file" / "model.safetensors", {"a": ONE})


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    write_safetensors(tmp_path / "model.safetensors", {"a": ONE})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# JSON


def test_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"width": 8, "name": "größe", "a": 1, "a": 1}', "utf-8")
    assert read_json(path) == {"width": 8, "name": "größe", "a": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b'{"a": 1', "line 1, column 8"),
        (b"[1]", "found a list"),
        (b"3", "found a int"),
        (b'"\xff"', "not JSON"),
        (b"", "empty"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_broken_json(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert f"{path}" in str(error.value)
    assert words in str(error.value)


def test_json_that_is_not_there_or_too_large(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**12)  # takes no space on the disk
    with pytest.raises(InputError, match="1,000,000,000,000 bytes"):
        read_json(tmp_path / "config.json")
