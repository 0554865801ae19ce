"""What every test needs: eight simulated devices, a compilation cache, the shared data."""

import os
import tempfile
from pathlib import Path

import pytest

# All of this is read when jax is imported, which the tests do after this file.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"mmjax-jax-cache-{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and recorded oracles; the test is skipped where it is absent."""
    beside_the_repository = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MMJAX_SHARED", beside_the_repository))
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}; MMJAX_SHARED names another folder")
    return folder
