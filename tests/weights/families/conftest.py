"""Recorded originals are float32 throughout, so products here are too."""

import jax
import pytest


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield
