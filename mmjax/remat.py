"""What of a layer is stored for the backward pass, by name; the rest is computed again.

A layer names the values that cost more to compute than to store (`named`), and a policy of
`REMAT_POLICIES` says which of them are kept. What a Transformer layer of width D stores of a token,
beside the D numbers that enter the layer:

| policy | numbers | computed again |
|---|---|---|
| `none` | whatever automatic differentiation likes | nothing |
| `products` | 9 D: all of `NAMES` | norms, activation, the probabilities of attention |
| `attention` | 5 D: all but `hidden` | and the first product of the MLP |
| `heads` | 4 D: all but `hidden` and `attended` | and the last product of attention |
| `dots` | 8 D: what products with weights give | norms, activation, attention |
| `full` | none | everything: a third more FLOPs |

A cross-attention stores 5 D more with `products` and `attention`, 4 D more with `heads`.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

# `projected`: queries, keys and values; `heads`: what they attend to; `attended`: its projection;
# `hidden`: of the MLP, before the activation; `statistics`: of every LayerNorm, two numbers, and
# of our own attention kernels one a head.
NAMES = ("projected", "heads", "attended", "hidden", "statistics")


def _keep_all_but(*names):
    kept = (name for name in NAMES if name not in names)
    return jax.checkpoint_policies.save_only_these_names(*kept)


REMAT_POLICIES = {
    "none": None,
    "products": _keep_all_but(),
    "attention": _keep_all_but("hidden"),
    "heads": _keep_all_but("hidden", "attended"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def named(name: str, x: jax.Array, *, joined: bool = False) -> jax.Array:
    """`x`, known to the policies as one of `NAMES`; `joined`: with its last two axes as one.

    A TPU stores heads that stand apart, 64 wide, as if they were 128 wide.
    """
    assert name in NAMES
    if joined:
        return checkpoint_name(x.reshape(*x.shape[:-2], -1), name).reshape(x.shape)
    return checkpoint_name(x, name)
