"""What every test needs: eight simulated devices, a compilation cache, the shared data."""

import gc
import os
import tempfile
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests.compilation import QUICKLY

# The annotated shapes are checked while the tests run.
CHECKED = [
    "mmjax.attention",
    "mmjax.fused_attention",
    "mmjax.fused_attention_kernels",
    "mmjax.layers",
    "mmjax.models",
    "mmjax.objectives",
]
install_import_hook(CHECKED, "beartype.beartype")

# All of this is read when jax is imported, which the tests do after this file.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", QUICKLY]
)
# XLA's thread pool: on few cores the collectives of eight devices block one another in it.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"mmjax-jax-cache-{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _tiny_config():
    """A recipe that compiles in seconds: one narrow layer of everything, on eight devices.

    Its schedule does not look at total_steps: runs of any length are one program, compiled once.
    """
    from configs import quickstart

    config = quickstart.get_config()
    config.total_steps, config.batch_size = 4, 8
    config.data.size, config.data.text_length = 64, 16
    width = {"width": 16, "heads": 2, "depth": 1, "unroll": False}
    config.model.image.update(**width, patch_size=32)
    config.model.text.update(**width)
    config.model.fusion.update(**width)
    config.model.embedding_width = 8
    config.optimizer.schedule.update(kind="constant", warmup_steps=1)
    config.log.update(every=1, tensorboard=False)
    config.checkpoint.every = 0
    config.eval.every = 0
    config.eval.batch_size, config.eval.data.size = 8, 20
    return config.lock()


@pytest.fixture
def tiny_config():
    return _tiny_config()


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """The workdir of four steps of the tiny recipe; who changes it copies it first."""
    import train

    workdir = tmp_path_factory.mktemp("pretrained")
    train.train(_tiny_config(), workdir)
    return workdir


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and recorded oracles; the test is skipped where it is absent."""
    beside_the_repository = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MMJAX_SHARED", beside_the_repository))
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}; MMJAX_SHARED names another folder")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """After every file: a process has 65,530 memory maps on Linux, and a program takes dozens."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
