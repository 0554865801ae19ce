import asyncio
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import temporary_paths

from mmjax.errors import InputError
from mmjax.training import checkpoints
from mmjax.training.checkpoints import Checkpointer, find_checkpoint, load_assets, load_parameters

ASSETS = {
    "config": {"model": {"width": 8}, "names": ["ä", "b"]},
    "tokenizer": '{"model": "WordPiece",\r\n "vocab": {"hätte": 0}}\n',
    "answers": ["yes", "no"],
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "ema"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict | None


def make_state(step=0, *, width=8, head="head", ema=False):
    rng = np.random.default_rng(step)
    params = {
        "encoder": {
            "kernel": jnp.array(rng.normal(size=(512, width)), jnp.float32),
            "bias": jnp.zeros(width),
        },
        head: {"kernel": jnp.array(rng.normal(size=(width, 16)), jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    average = jax.tree.map(lambda leaf: leaf + 1, params) if ema else None
    return State(jnp.array(step, jnp.int32), params, optimizer.init(params), average)


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding(leaf) if sharding else leaf.sharding
        ),
        state,
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def save_all(workdir, steps, *, metrics=None, keep=9, ema=False, **options):
    with Checkpointer(workdir, every=1, keep=keep, **options) as checkpointer:
        for step in steps:
            state = make_state(step, ema=ema)
            assert checkpointer.save(step, state, ASSETS, metrics and metrics.get(step))


def test_a_new_work_directory_has_no_checkpoint(tmp_path):
    with Checkpointer(tmp_path / "run", every=1, keep=1) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(InputError, match="holds no checkpoint"):
            checkpointer.restore(abstract(make_state()))


@pytest.mark.parametrize("ema", [False, True])
def test_restores_state_and_assets_exactly(tmp_path, ema):
    save_all(tmp_path, [3, 7], ema=ema)
    with Checkpointer(tmp_path, every=1, keep=9) as checkpointer:
        assert checkpointer.latest_step() == 7
        like = abstract(make_state(ema=ema))
        assert_same(checkpointer.restore(like), make_state(7, ema=ema))
        assert_same(checkpointer.restore(like, 3), make_state(3, ema=ema))
        with pytest.raises(InputError, match=r"no checkpoint of step 5; it has \[3, 7\]"):
            checkpointer.restore(like, 5)
    assert load_assets(tmp_path) == ASSETS


def test_assets_are_plain_files(tmp_path):
    save_all(tmp_path, [1])
    folder = tmp_path / "checkpoints" / "1" / "assets"
    assert json.loads((folder / "config.json").read_text("utf-8")) == ASSETS["config"]
    assert "ä" in (folder / "config.json").read_text("utf-8")
    assert (folder / "tokenizer.text").read_bytes().decode() == ASSETS["tokenizer"]


def test_saves_on_schedule_and_when_forced_but_no_step_twice(tmp_path):
    with Checkpointer(tmp_path, every=2, keep=9) as checkpointer:
        written = [checkpointer.save(step, make_state(step), {}) for step in range(1, 6)]
        assert written == [False, True, False, True, False]
        assert checkpointer.save(5, make_state(5), {}, force=True)
        assert not checkpointer.save(5, make_state(5), {}, force=True)
        assert checkpointer.steps == [2, 4, 5]


def test_a_save_is_never_skipped_because_another_runs(tmp_path):
    save_all(tmp_path, range(1, 9))
    with Checkpointer(tmp_path, every=1, keep=9) as checkpointer:
        assert checkpointer.steps == list(range(1, 9))


def test_a_failed_save_is_told_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    save_all(tmp_path, [1])

    async def full(directory):
        async def write():
            raise OSError("No space left on device")

        return write()

    with Checkpointer(tmp_path, every=1, keep=1) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._Assets, "save", lambda self, directory: full(directory))
            assert checkpointer.save(2, make_state(2), {})
            with pytest.raises(OSError, match="No space left"):
                checkpointer.wait()
        assert find_checkpoint(tmp_path).name == "1"
        assert checkpointer.save(3, make_state(3), {})
    assert find_checkpoint(tmp_path).name == "3"


def test_the_state_may_be_donated_right_after_saving(tmp_path):
    overwrite = jax.jit(
        lambda state: jax.tree.map(lambda leaf: leaf * 0 - 7, state), donate_argnums=0
    )
    state = make_state(1)
    big = jax.random.normal(jax.random.key(0), (1000, 1000))
    state = dataclasses.replace(state, params={**state.params, "big": big})
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    like = abstract(state)
    overwrite(jax.tree.map(jnp.copy, state))  # compiled, so that the next call comes at once
    with Checkpointer(tmp_path, every=1, keep=1) as checkpointer:
        checkpointer.save(1, state, {})
        assert (jax.tree.leaves(overwrite(state))[-1] == -7).all()
        assert_same(checkpointer.restore(like), expected)


SCORES = {1: {"R@1": 3.0}, 2: {"R@1": 5.0, "loss": 1.0}, 3: None, 4: {"R@1": float("nan")}, 5: None}


@pytest.mark.parametrize(
    ("mode", "best", "kept"), [("max", 2, [2, 4, 5]), ("min", 1, [1, 4, 5]), ("", None, [4, 5])]
)
def test_keeps_the_latest_and_the_best(tmp_path, mode, best, kept):
    options = {"best_metric": "R@1", "best_mode": mode} if mode else {}
    save_all(tmp_path, [1, 2, 3], metrics=SCORES, keep=2, **options)
    save_all(tmp_path, [4, 5], metrics=SCORES, keep=2, **options)  # scores outlive the process
    folders = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert folders == kept
    if best:
        assert find_checkpoint(f"{tmp_path}@best").name == str(best)
        expected = make_state(best).params
        assert_same(load_parameters(f"{tmp_path}@best", abstract(expected)), expected)
    else:
        with pytest.raises(InputError, match=r"named no checkpoint.best_metric.*\[4, 5\]"):
            find_checkpoint(f"{tmp_path}@best")


def test_the_best_may_also_be_the_latest(tmp_path):
    scores = {1: {"R@1": 1.0}, 2: {"R@1": 2.0}}
    save_all(tmp_path, [1, 2], metrics=scores, keep=1, best_metric="R@1")
    with Checkpointer(tmp_path, every=1, keep=1, best_metric="R@1") as checkpointer:
        assert checkpointer.steps == [2]


def test_a_misspelt_best_metric_is_an_error_but_loses_nothing(tmp_path):
    checkpointer = Checkpointer(tmp_path, every=1, keep=1, best_metric="eval/R@l")
    with checkpointer, pytest.raises(InputError, match=r"eval/R@l.*Did you mean eval/R@1"):
        checkpointer.save(1, make_state(1), {}, {"eval/R@1": 3.0})
    assert_same(load_parameters(tmp_path, abstract(make_state().params)), make_state(1).params)


@pytest.mark.parametrize(
    ("option", "value"), [("every", -1), ("keep", 0), ("best_mode", "maximum")]
)
def test_options_out_of_range(tmp_path, option, value):
    with pytest.raises(InputError, match=f"checkpoint.{option}"):
        Checkpointer(tmp_path, **{"every": 1, "keep": 1, option: value})


KILLED = """
import sys, numpy as np, jax.numpy as jnp
from mmjax.training.checkpoints import Checkpointer
checkpointer = Checkpointer(sys.argv[1], every=1, keep=3)
for step in range(1, 1000):
    values = np.random.default_rng(step).normal(size=(1000, 1500)).astype(np.float32)
    checkpointer.save(step, {"params": {"kernel": jnp.array(values)}}, {"config": {"s": step}})
"""


def test_a_run_killed_in_mid_save_goes_on_from_the_last_whole_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])

    def unfinished():
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return [name for name in names if "tmp" in name]

    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline and child.poll() is None:
            if (folder / "3").exists() and unfinished():
                child.send_signal(signal.SIGSTOP)
                if unfinished():
                    break
                child.send_signal(signal.SIGCONT)
            time.sleep(0.001)
    finally:
        child.kill()
        child.wait()
    assert unfinished()
    assert find_checkpoint(tmp_path).name.isdecimal()
    with Checkpointer(tmp_path, every=1, keep=3) as checkpointer:
        step = checkpointer.latest_step()
        assert step >= 3
        like = {"params": {"kernel": jax.ShapeDtypeStruct((1000, 1500), jnp.float32)}}
        found = checkpointer.restore(like)["params"]["kernel"]
        assert load_assets(tmp_path) == {"config": {"s": step}}
        assert checkpointer.save(step + 10, {"params": {"kernel": found}}, {})
    assert not unfinished()
    expected = np.random.default_rng(step).normal(size=(1000, 1500)).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_restores_onto_another_mesh_and_back(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def sharded(leaf):
        spec = PartitionSpec(*(None,) * (leaf.ndim - 1), "fsdp") if leaf.ndim else PartitionSpec()
        return NamedSharding(mesh, spec)

    save_all(tmp_path, [1])
    with Checkpointer(tmp_path, every=1, keep=9) as checkpointer:
        state = checkpointer.restore(abstract(make_state(), sharded))
        assert_same(state, make_state(1))
        kernel = state.params["encoder"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec(None, "fsdp")
        assert kernel.addressable_shards[0].data.shape == (512, 2)
        checkpointer.save(2, state, {})
        assert_same(checkpointer.restore(abstract(make_state()), 2), make_state(1))
    kernels = load_parameters(tmp_path)["encoder"]["kernel"]
    assert isinstance(kernels, np.ndarray)
    np.testing.assert_array_equal(kernels, kernel)


ONE_OF_TWO = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
workdir, port, process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, int(process), initialization_timeout=30)
from mmjax.training.checkpoints import Checkpointer
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
values = np.arange(4000.0).reshape(40, 100)
def state(step):
    place = lambda index: values[index] + step
    return {"params": {"kernel": jax.make_array_from_callback(values.shape, sharding, place)}}
with Checkpointer(workdir, every=1, keep=1, best_metric="loss", best_mode="min") as checkpointer:
    for step in (1, 2, 3):
        checkpointer.save(step, state(step), {"config": {"step": step}}, {"loss": step})
"""


def test_restores_on_one_process_what_two_wrote(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", ONE_OF_TWO, str(tmp_path), port]
    environment = {**os.environ, "XLA_FLAGS": ""}
    processes = [subprocess.Popen([*command, str(i)], env=environment) for i in range(2)]
    try:
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    values = np.arange(4000.0).reshape(40, 100)
    np.testing.assert_array_equal(load_parameters(tmp_path)["kernel"], values + 3)
    np.testing.assert_array_equal(load_parameters(f"{tmp_path}@best")["kernel"], values + 1)
    assert load_assets(tmp_path) == {"config": {"step": 3}}


def test_parameters_load_in_another_type(tmp_path):
    save_all(tmp_path, [1])
    expected = make_state(1).params["encoder"]["kernel"].astype(jnp.bfloat16)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), make_state().params
    )
    found = load_parameters(tmp_path, like)["encoder"]["kernel"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_loads_the_moving_average_when_asked(tmp_path):
    save_all(tmp_path / "with", [1], ema=True)
    save_all(tmp_path / "without", [1])
    found = load_parameters(tmp_path / "with", abstract(make_state().params), ema=True)
    assert_same(found, make_state(1, ema=True).ema)
    assert_same(load_parameters(tmp_path / "with", ema=True), jax.tree.map(np.asarray, found))
    with pytest.raises(InputError, match="holds no ema"):
        load_parameters(tmp_path / "without", ema=True)


def test_another_architecture_is_told_apart_by_name(tmp_path):
    save_all(tmp_path, [1])
    wider = abstract(make_state(width=12, head="header"))
    checkpointer = Checkpointer(tmp_path, every=1, keep=1)
    with checkpointer, pytest.raises(InputError) as error:
        checkpointer.restore(wider)
    assert str(error.value).splitlines()[:10] == [
        f"The checkpoint {tmp_path}/checkpoints/1 holds another architecture than the configured "
        "model.",
        "  missing from the checkpoint (1):",
        "    params/header/kernel (nearest there: params/head/kernel)",
        "  only in the checkpoint (1):",
        "    params/head/kernel",
        "  of another shape (2):",
        "    params/encoder/bias: (8,) there, (12,) configured",
        "    params/encoder/kernel: (512, 8) there, (512, 12) configured",
        "Configure what the checkpoint was trained with (its assets/config.json), or start in an "
        "empty --workdir, with --config.init_from to take the parameters that fit.",
    ]
    with pytest.raises(InputError, match="params/encoder/bias"):
        load_parameters(tmp_path, wider.params)


def test_a_long_list_of_differences_is_cut(tmp_path):
    save_all(tmp_path, [1])
    params = {f"layer{i}": jax.ShapeDtypeStruct((2,), jnp.float32) for i in range(300)}
    with pytest.raises(InputError, match=r"\(300\)[^…]*params/layer0[^…]*… and 290 more") as error:
        load_parameters(tmp_path, params)
    assert len(str(error.value).splitlines()) < 20


def test_another_optimizer_is_not_called_another_model(tmp_path):
    save_all(tmp_path, [1])
    state = make_state()
    other = dataclasses.replace(state, opt_state=optax.adafactor(1e-3).init(state.params))
    message = r"fits the model, but the optimizer[\s\S]*opt_state/"
    checkpointer = Checkpointer(tmp_path, every=1, keep=1)
    with checkpointer, pytest.raises(InputError, match=message):
        checkpointer.restore(abstract(other))


def largest_file(folder):
    return max(
        (file for file in folder.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size
    )


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "arrays": lambda step: truncate(largest_file(step / "state" / "ocdbt.process_0")),
    "index": lambda step: truncate(largest_file(step / "state" / "d")),
    "manifest": lambda step: truncate(step / "state" / "manifest.ocdbt"),
    "no manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "tree": lambda step: truncate(step / "state" / "_METADATA"),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "nothing": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    save_all(workdir, [1, 2])
    return workdir


# Orbax abandons its other reads when one fails, and asyncio complains of that at their end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_loads(
    tmp_path, two_checkpoints, damage
):
    workdir = Path(shutil.copytree(two_checkpoints, tmp_path / "run"))
    step = workdir / "checkpoints" / "2"
    DAMAGES[damage](step)
    like = abstract(make_state())
    checkpointer = Checkpointer(workdir, every=1, keep=9)
    with checkpointer, pytest.raises(InputError, match=f"{step} cannot be read.*Delete the folder"):
        checkpointer.restore(like)
    with pytest.raises(InputError, match=str(step)):
        load_parameters(workdir, like.params)
    shutil.rmtree(step)
    with Checkpointer(workdir, every=1, keep=9) as checkpointer:
        assert_same(checkpointer.restore(like), make_state(1))


def test_damaged_assets_are_named(tmp_path, two_checkpoints):
    workdir = shutil.copytree(two_checkpoints, tmp_path / "run")
    truncate(workdir / "checkpoints" / "2" / "assets" / "config.json")
    with pytest.raises(InputError, match="checkpoints/2/assets cannot be read"):
        load_assets(workdir)
    assert load_assets(f"{workdir}@1") == ASSETS


@pytest.mark.parametrize(
    ("suffix", "step"),
    [
        ("", 2),
        ("@latest", 2),
        ("@1", 1),
        ("/checkpoints", 2),
        ("/checkpoints@1", 1),
        ("/checkpoints/1", 1),
        ("/", 2),
    ],
)
def test_ways_to_name_a_checkpoint(two_checkpoints, suffix, step):
    assert find_checkpoint(f"{two_checkpoints}{suffix}") == (
        two_checkpoints / "checkpoints" / str(step)
    )


def test_paths_without_a_checkpoint(tmp_path, two_checkpoints):
    with pytest.raises(InputError, match=f"{tmp_path}/absent: there is no such folder"):
        find_checkpoint(tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path} holds no whole checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path} holds no whole checkpoint"):
        load_parameters(tmp_path)
    with pytest.raises(InputError, match=r"no checkpoint of step 9; it has \[1, 2\]"):
        find_checkpoint(f"{two_checkpoints}@9")
    with pytest.raises(InputError, match="there is no such folder"):
        find_checkpoint(f"{two_checkpoints}@bets")


def test_closing_waits_for_the_removal_of_what_is_half_written(tmp_path, monkeypatch):
    """Its thread would print a traceback behind the message of a run that ends before a save."""
    done = []

    async def slow(*_, **__):
        await asyncio.sleep(0.5)
        done.append(True)

    monkeypatch.setattr(temporary_paths, "cleanup_temporary_paths", slow)
    with Checkpointer(tmp_path, every=1, keep=1):
        pass
    assert done


def test_saving_costs_the_loop_little_time_and_disk(tmp_path):
    params = {
        f"layer{i}": {"kernel": jax.random.normal(jax.random.key(i), (500, 400))} for i in range(10)
    }
    state = State(jnp.zeros((), jnp.int32), params, optax.adamw(1e-3).init(params), None)
    shares = []
    with Checkpointer(tmp_path, every=1, keep=1) as checkpointer:
        for step in range(1, 4):
            start = time.perf_counter()
            checkpointer.save(step, state, ASSETS)
            blocked = time.perf_counter() - start
            checkpointer.wait()
            shares.append(blocked / (time.perf_counter() - start))
    assert min(shares) < 0.5  # the rest is written while the loop goes on
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < 1.02 * 4 * 2_000_000  # the optimizer's zeros compress to nothing
