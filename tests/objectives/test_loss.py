"""What objectives have in common."""

import jax.numpy as jnp
import numpy as np

from mmjax.objectives.loss import cross_entropy


def test_cross_entropy_of_any_rows():
    rng = np.random.default_rng(0)
    logits = (5 * rng.normal(size=(2, 3, 4))).astype(np.float32)
    labels = rng.integers(0, 4, (2, 3))
    x = logits.astype(np.float64)
    log_p = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    found = cross_entropy(jnp.array(logits), jnp.array(labels))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    labels[0, 1] = -1
    found = cross_entropy(jnp.array(logits), jnp.array(labels))
    assert np.isfinite(found).all()
