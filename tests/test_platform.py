"""Programs are made for the backend at hand, or for the one that is assumed."""

import jax
import jax.numpy as jnp

from mmjax import platform
from mmjax.attention import attention


def test_current_is_jaxs_own_unless_another_is_assumed():
    assert platform.current() == "cpu"
    with platform.assume("tpu"):
        assert platform.current() == "tpu"
    assert platform.current() == "cpu"


def test_what_was_traced_for_one_platform_is_not_reused_for_another():
    traced = []

    @jax.jit
    def function(x):
        traced.append(platform.current())
        return x

    function(0.0)
    with platform.assume("tpu"):
        function(0.0)
    function(0.0)
    assert traced == ["cpu", "tpu"]


def test_attention_is_that_of_the_assumed_platform():
    x = jnp.ones((1, 4, 2, 8))

    def transposes():
        return str(jax.make_jaxpr(lambda x: attention(x, x, x))(x)).count("transpose[")

    here = transposes()
    with platform.assume("tpu"):
        assert transposes() < here  # only the CPU's way puts heads before positions
