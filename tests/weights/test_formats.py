import argparse
import builtins
import io
import itertools
import json
import os
import pickle
import re
import sys
import tracemalloc
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmjax.errors import InputError
from mmjax.weights.files import open_tensors


def write_header(path, header, data=b"", length=None):
    """A safetensors file from its parts, as broken as the parts are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(begin=0, end=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refused(path, *words):
    """The message of the refusal, which names the file."""
    with pytest.raises(InputError) as error:
        dict(open_tensors(path))
    message = str(error.value)
    assert str(path) in message
    for word in words:
        assert word in message
    return message


class Malicious:
    """What a pickle can do: an instance, read back, makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


# Safetensors


def test_safetensors_of_every_type_against_the_library(tmp_path):
    values = np.random.default_rng(0).standard_normal((2, 3, 4)) * 10
    arrays = {
        kind: values.astype(kind)
        for kind in ("float16", "bfloat16", "float32", "float64", "int8", "int64", "uint16", "bool")
    }
    arrays["scalar"] = np.array(3, np.int32)
    arrays["nothing"] = np.zeros((0, 5), np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path / "model.safetensors")
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert tensors.shape(name) == array.shape
        assert tensors.dtype(name) == array.dtype
        floats = name in ("float16", "bfloat16", "float32", "float64", "nothing")
        assert tensors[name].dtype == (np.float32 if floats else array.dtype)
        np.testing.assert_array_equal(tensors[name], array.astype(tensors[name].dtype))


def test_safetensors_that_torch_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    state = {
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "weight": torch.randn(5),
        "ids": torch.arange(4),
    }
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    tensors = open_tensors(tmp_path)
    np.testing.assert_array_equal(tensors["half"], state["half"].float().numpy())
    np.testing.assert_array_equal(tensors["weight"], state["weight"].numpy())
    np.testing.assert_array_equal(tensors["ids"], state["ids"].numpy())


def test_opening_reads_no_tensor(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"large": np.zeros(10_000_000, np.float32), "small": np.ones(2, np.float32)}, path)
    tracemalloc.start()
    try:
        tensors = open_tensors(path)
        assert tensors.shape("large") == (10_000_000,)
        assert "large" in tensors
        assert tensors["small"].tolist() == [1, 1]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("missing", [1, 100, 1000])
def test_truncated_safetensors(tmp_path, missing):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(300, np.float32), "b": np.zeros((7, 7), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-missing])
    refused(path, "cut short")


def test_safetensors_cut_in_the_header_or_before(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(300, np.float32)}, path)
    whole = path.read_bytes()
    for length in (1, 7, 8, 20):
        path.write_bytes(whole[:length])
        refused(path, "cut short")


@pytest.mark.parametrize("length", [2**63, 200_000_000, 3])
def test_absurd_header_length(tmp_path, length):
    refused(write_header(tmp_path / "model.safetensors", b"{}", length=length), "header of")


def test_web_page_instead_of_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    refused(path, "no safetensors file")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"garbage", "line 1, column 1"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "found a list"),
        (b'{"a": {}, "a": 1}', "twice"),
        (b"{}", "no tensors"),
    ],
)
def test_garbage_in_the_header(tmp_path, header, word):
    refused(write_header(tmp_path / "model.safetensors", header), word)


@pytest.mark.parametrize(
    "header",
    [
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": entry(shape=(-1,))},
        {"a": entry(shape=(True,))},
        {"a": entry(shape=(1.0,))},
        {"a": entry(shape=(1,) * 100)},
        {"a": entry(begin=4, end=0)},
        {"a": entry(begin=-4, end=0)},
        {"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    ],
)
def test_malformed_entries(tmp_path, header):
    refused(write_header(tmp_path / "model.safetensors", header, b"1234"), "'a'", "must give")


@pytest.mark.parametrize("dtype", ["F99", "F8_E4M3", "C64", "float32"])
def test_unknown_dtype(tmp_path, dtype):
    path = write_header(tmp_path / "model.safetensors", {"a": entry(dtype=dtype)}, b"1234")
    refused(path, "'a'", dtype, "bfloat16")


@pytest.mark.parametrize(
    ("header", "size", "word"),
    [
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "overlap"),
        ({"a": entry(0, 8, shape=(2,)), "b": entry(4, 12, shape=(2,))}, 12, "overlap"),
        ({"a": entry(4, 8)}, 8, "gap"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "gap"),
        ({"a": entry(0, 4)}, 8, "cut short or damaged"),
        ({"a": entry(2**40, 2**40 + 4)}, 4, "cut short or damaged"),
        ({"a": entry(0, 4, shape=(2,))}, 4, "does not take the 4 bytes"),
        ({"a": entry(0, 4, shape=(2**40, 2**40))}, 4, "does not take the 4 bytes"),
        ({"a": entry(0, 4, dtype="F16")}, 4, "does not take the 4 bytes"),
    ],
)
def test_offsets_that_contradict(tmp_path, header, size, word):
    refused(write_header(tmp_path / "model.safetensors", header, bytes(size)), word)


def test_layouts_are_refused_where_the_library_refuses(tmp_path):
    path = tmp_path / "model.safetensors"
    accepted = 0
    for begin_a, end_a, begin_b, end_b, extra in itertools.product((0, 4, 8), repeat=5):
        header = {
            "a": entry(begin_a, end_a, shape=(abs(end_a - begin_a) // 4,)),
            "b": entry(begin_b, end_b, shape=(abs(end_b - begin_b + extra) // 4,)),
        }
        write_header(path, header, bytes(8))
        try:
            theirs = set(safe_open(path, "np").keys())
        except SafetensorError:
            theirs = set()
        try:
            ours = set(open_tensors(path))
        except InputError:
            ours = set()
        assert ours == theirs, header
        accepted += bool(ours)
    assert accepted == 6  # a takes none, half or all; what it leaves is b's, behind or before


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(300, np.float32)}, path)
    tensors = open_tensors(path)
    os.truncate(path, 200)
    with pytest.raises(InputError, match="'a' cannot be read"):
        tensors["a"]


# What every format refuses


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".bin"])
def test_empty_absent_pointer(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    refused(path, "no such file")
    path.write_bytes(b"")
    refused(path, "empty")
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 438000000\n"
    )
    refused(path, "Git LFS pointer", "git lfs pull")
    path.unlink()
    path.symlink_to("gone")
    refused(path, "link to a file that is gone")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".bin"])
def test_random_bytes(tmp_path, suffix):
    if suffix == ".bin":
        pytest.importorskip("torch")
    path = tmp_path / f"model{suffix}"
    for seed in range(10):
        path.write_bytes(np.random.default_rng(seed).bytes(1000))
        refused(path)


def test_other_suffixes_and_impossible_names(tmp_path):
    path = tmp_path / "model.h5"
    path.write_bytes(b"1234")
    refused(path, ".safetensors", "'.h5'")
    refused(tmp_path / ("x" * 5000 + ".npz"), "no such file")


# numpy


def test_npz(tmp_path):
    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((4, 3))
    arrays = {
        "params/img/embedding/kernel": kernel.astype(np.float32),
        "params/img/fortran": np.asfortranarray(kernel),
        "params/img/big_endian": kernel.astype(">f4"),
        "params/img/half": kernel.astype(np.float16),
        "params/img/bfloat16": kernel.astype(ml_dtypes.bfloat16),
        "params/t": np.array(2.5, np.float32),
        "step": np.array([7]),
    }
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "siglip.npz", **arrays)
        tensors = open_tensors(tmp_path / "siglip.npz")
        assert set(tensors) == set(arrays)
        assert tensors.dtype("params/img/bfloat16") == ml_dtypes.bfloat16
        assert tensors["step"].dtype == np.int64
        for name, array in arrays.items():
            assert tensors.shape(name) == array.shape
            np.testing.assert_array_equal(tensors[name], array.astype(tensors[name].dtype))
            assert tensors[name].dtype.isnative


def test_npz_with_objects_executes_nothing(tmp_path):
    objects = np.array([Malicious(tmp_path / "executed")], dtype=object)
    np.savez(tmp_path / "a.npz", good=np.ones(2), bad=objects)
    refused(tmp_path / "a.npz", "'bad'", "objects")
    np.savez(tmp_path / "b.npz", bad=np.ones(2))
    tensors = open_tensors(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", bad=objects)  # put in its place after it was opened
    with pytest.raises(InputError, match="'bad' cannot be read"):
        tensors["bad"]
    assert not (tmp_path / "executed").exists()


def test_npz_that_claims_more_than_it_has(tmp_path):
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", buffer.getvalue() + bytes(8))
    refused(tmp_path / "a.npz", "'a'", "does not take the 8 bytes")


def test_damaged_npz(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(1000.0), text=np.array(["x"]))
    refused(path, "'text'", "type")
    np.savez(path, a=np.arange(1000.0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(path, "no intact .npz")
    path.write_bytes(whole[:4000] + b"\x01" + whole[4001:])
    refused(path, "'a' cannot be read", "CRC")


# PyTorch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def state_dict(torch):
    return OrderedDict(
        weight=torch.randn(3, 2),
        half=torch.randn(4).half(),
        bfloat16=torch.randn(4).to(torch.bfloat16),
        double=torch.randn(2, 2, dtype=torch.float64),
        transposed=torch.randn(3, 5).T,
        parameter=torch.nn.Parameter(torch.randn(2)),
        ids=torch.arange(5).expand(1, -1),
        scalar=torch.tensor(0.07),
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".th"])
def test_pytorch_archive(torch, tmp_path, suffix, zipped):
    state = state_dict(torch)
    path = tmp_path / f"a{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    tensors = open_tensors(path)
    assert list(tensors) == list(state)
    assert tensors.dtype("bfloat16") == ml_dtypes.bfloat16
    assert tensors["ids"].dtype == np.int64
    for name, tensor in state.items():
        assert tensors.shape(name) == tuple(tensor.shape)
        expected = tensor if name == "ids" else tensor.float()
        np.testing.assert_array_equal(tensors[name], expected.detach().numpy())


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: state}}},
        lambda state: {"model": state, "epoch": 3, "config": {"lr": 1e-4}},
        lambda state: {"model_state_dict": state, "loss": 0.1},
        lambda state: {"module": state, "dp_world_size": 8},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {**state, "epoch": 3, "name": "x", "nothing": None, 5: "number"},
    ],
)
def test_nests_and_what_is_no_tensor(torch, tmp_path, nest):
    state = state_dict(torch)
    torch.save(nest(state), tmp_path / "a.pth")
    tensors = open_tensors(tmp_path / "a.pth")
    assert set(tensors) == set(state)
    np.testing.assert_array_equal(tensors["weight"], state["weight"].numpy())


def test_archive_that_contains_itself(torch, tmp_path):
    state = {"epoch": 1}
    state["model"] = state
    torch.save(state, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "no tensors")


@pytest.mark.parametrize("content", [[1, 2], "text", {"a": 1}])
def test_archive_without_named_tensors(torch, tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "tensors")


@pytest.mark.parametrize(
    "save",
    [
        lambda torch, content, path: torch.save(content, path),
        lambda torch, content, path: torch.save(
            content, path, _use_new_zipfile_serialization=False
        ),
        lambda torch, content, path: path.write_bytes(pickle.dumps(content)),
    ],
)
def test_code_in_an_archive_is_not_executed(torch, tmp_path, save):
    executed = tmp_path / "executed"
    path = tmp_path / "a.pth"
    save(torch, {"state_dict": {"a": torch.ones(2)}, "b": Malicious(executed)}, path)
    message = refused(path, "executed", "trust", "weights_only=False")
    assert not executed.exists()
    # The file is what it pretends to be: the conversion that is told executes it, and converts.
    if zipfile.is_zipfile(path):
        follow(message, tmp_path)
        assert executed.exists()


def follow(message, folder):
    """Runs the lines that a message recommends, in the folder of the file."""
    code = "\n".join(line[2:] for line in message.splitlines() if line.startswith("  "))
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(code, {})
    finally:
        os.chdir(before)


def test_archive_that_needs_more_is_converted_by_the_recipe(torch, tmp_path):
    weight = torch.randn(3, 2)
    state = {"tied": weight, "weight": weight, "transposed": torch.randn(3, 2).T}
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "albef.pth")
    message = refused(tmp_path / "albef.pth", "argparse.Namespace", "convert")
    follow(message, tmp_path)
    tensors = open_tensors(tmp_path / "albef.safetensors")
    assert set(tensors) == set(state)
    for name in state:
        np.testing.assert_array_equal(tensors[name], state[name].numpy())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_converted_by_the_recipe(torch, tmp_path):
    layer = torch.nn.Linear(3, 2)
    torch.jit.save(torch.jit.trace(layer, torch.ones(1, 3)), tmp_path / "clip.pt")
    follow(refused(tmp_path / "clip.pt", "TorchScript"), tmp_path)
    tensors = open_tensors(tmp_path / "clip.safetensors")
    np.testing.assert_array_equal(tensors["weight"], layer.weight.detach().numpy())


def test_without_torch(tmp_path, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": Malicious(tmp_path / "executed")}))
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refused(path, "pip install torch==2.13.0", "weights_only=True")
    assert not (tmp_path / "executed").exists()
    monkeypatch.undo()
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, path)
    follow(message, tmp_path)
    assert open_tensors(tmp_path / "model.safetensors")["a"].tolist() == [1, 1]


def test_torch_is_imported_for_its_own_files_only(tmp_path, monkeypatch):
    imported = []
    real = builtins.__import__

    def watched(name, *rest, **options):
        imported.append(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", watched)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    dict(open_tensors(tmp_path / "model.safetensors"))
    dict(open_tensors(tmp_path / "a.npz"))
    assert not [name for name in imported if re.match(r"torch\b|transformers\b", name)]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_archive(torch, tmp_path, zipped, kept):
    path = tmp_path / "a.pth"
    torch.save(state_dict(torch), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    refused(path)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda torch: torch.zeros(1).expand(2**40), "too few values"),
        (lambda torch: torch.eye(3).to_sparse(), "sparse"),
        (lambda torch: torch.ones(2, dtype=torch.complex64), "complex64"),
        (lambda torch: torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda torch: torch.tensor([1.0, float("nan")]), "NaN"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_tensors_that_are_no_weights(torch, tmp_path, make, word):
    torch.save({"good": torch.ones(2), "bad": make(torch)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "'bad'", word)
