"""What every model is made of: residual sub-layers, the Transformer block, and a stack of layers.

A layer takes its dropout key as an argument (`key=None`: no dropout), so that a model holds no
random state. Parameters are float32; `LayerConfig.dtype` is what the matrix products compute in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.attention import attention, attention_scores, attention_weights
from mmjax.attention_maps import SelfAttention, note_last_layer, note_self_attention
from mmjax.errors import InputError, near_misses
from mmjax.layouts import as_rows, matrix, rows_first
from mmjax.normalisation import layer_norm
from mmjax.remat import REMAT_POLICIES, named
from mmjax.sharding import constrain_batch

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

# 1 / √inputs keeps the scale of activations at any width; BERT's fixed 0.02 is about that at 768,
# and much too small for narrow models. Tables and tokens keep the 0.02.
_KERNEL_INIT = nnx.initializers.lecun_normal()
TABLE_INIT = nnx.initializers.truncated_normal(0.02)


@dataclass(frozen=True)
class LayerConfig:
    """One Transformer layer: its widths, the variant of the paper it follows, and how it computes.

    The first group is architecture; the second changes speed and memory and nothing else.
    """

    width: int = 0
    depth: int = 0
    heads: int = 0  # 0: width / 64
    mlp_width: int = 0  # 0: 4 × width
    norm: str = "pre"  # LayerNorm before each sub-layer ('pre', ViT) or after it ('post', BERT)
    activation: str = "gelu"
    epsilon: float = 1e-6  # of every LayerNorm
    dropout: float = 0.0  # on the output of every sub-layer
    qkv_bias: bool = True  # of the query, key and value projections

    dtype: str = "float32"  # of activations: 'float32' or 'bfloat16'
    remat: str = "none"  # a key of mmjax.remat.REMAT_POLICIES
    unroll: bool = False  # fewer copies of what is stored, and a program of every layer to compile
    attention: str = "auto"  # an implementation of mmjax.attention

    least_depth: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Fill what follows from the width, and refuse what cannot be built."""
        object.__setattr__(self, "heads", self.heads or self.width // 64)
        object.__setattr__(self, "mlp_width", self.mlp_width or 4 * self.width)
        name = type(self).__name__
        if self.width < 1 or self.depth < self.least_depth:
            raise InputError(
                f"{name}: width is {self.width} and depth {self.depth}; give both, or a named size."
            )
        if self.heads < 1 or self.width % self.heads:
            raise InputError(
                f"{name}: width {self.width} does not split into {self.heads} heads; set heads."
            )
        for key, known in (
            ("norm", ["pre", "post"]),
            ("activation", list(ACTIVATIONS)),
            ("remat", list(REMAT_POLICIES)),
            ("dtype", ["float32", "bfloat16"]),
        ):
            if (value := getattr(self, key)) not in known:
                raise InputError(f"{name}: {key} is {value!r}.{near_misses(value, known)}")

    def fill_widths(self, width: int, depth: int, heads: int, mlp_width: int) -> None:
        """Take a named size's widths where none was given. Only for `__post_init__`."""
        given = {"width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width}
        for key, value in given.items():
            object.__setattr__(self, key, getattr(self, key) or value)


@dataclass(frozen=True)
class StackConfig:
    """What a stack is told of layers that are no Transformer's (see `LayerConfig`)."""

    depth: int
    remat: str = "none"
    unroll: bool = False


class Linear(nnx.LinearGeneral):
    """x · kernel + bias: the product in `dtype`, the bias and its gradient in float32.

    `joined` keeps the axes of its kernel together on a TPU, see `mmjax.layouts.matrix`.
    """

    joined = False

    def __call__(  # type: ignore[override]  # (laid out by rules, from outside)
        self, x: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Map the last axes, as many as the layer was made for."""
        kernel, axes = self.kernel[...].astype(self.dtype), len(self.axis)
        rows, outputs = x.shape[: x.ndim - axes], kernel.shape[axes:]
        # A product of matrices, however many axes the kernel has.
        x = as_rows(x.astype(self.dtype).reshape(*rows, -1))
        y = x @ matrix(kernel, axes, self.joined)
        if self.bias is not None:
            bias = matrix(self.bias[...], 0, self.joined)
            y = (y.astype(jnp.float32) + bias).astype(self.dtype)
        return y.reshape(*rows, *outputs)


def linear(
    inputs: int | tuple[int, ...],
    outputs: int | tuple[int, ...],
    dtype: str,
    rngs: nnx.Rngs,
    bias: bool = True,
    joined: bool = False,
) -> Linear:
    """A dense layer over the last axes of its input, as many as `inputs` has sizes."""
    layer = Linear(
        inputs,
        outputs,
        axis=-1 if isinstance(inputs, int) else tuple(range(-len(inputs), 0)),
        use_bias=bias,
        dtype=jnp.dtype(dtype),
        kernel_init=_KERNEL_INIT,
        rngs=rngs,
    )
    layer.joined = joined
    return layer


def embedding(rows: int, width: int, dtype: str, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of `rows` learnt vectors."""
    return nnx.Embed(rows, width, dtype=jnp.dtype(dtype), embedding_init=TABLE_INIT, rngs=rngs)


def look_up(
    table: Float[Array, "rows width"], ids: Int[Array, "*batch"], padding: int = -1
) -> Float[Array, "*batch width"]:
    """Rows of a table; the row `padding` gets no gradient, as published tables never trained it."""
    rows = jnp.take(table, ids, axis=0)
    if padding < 0:
        return rows
    return jnp.where((ids == padding)[..., None], jax.lax.stop_gradient(rows), rows)


class KeysValues(NamedTuple):
    """What an attention looks at: of a context, or of a text as far as it has been decoded."""

    key: Float[Array, "batch keys heads head_width"]
    value: Float[Array, "batch keys heads head_width"]

    def written(self, new: "KeysValues", at: int | Int[Array, ""]) -> "KeysValues":
        """The same, with `new` in place of what stood from position `at` on."""

        def write(kept: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), at, axis=1)

        return jax.tree.map(write, self, new)


class Attention(nnx.Module):
    """Multi-head attention of `x` over `context` (over itself where there is none).

    `context_width` is that of the context; 0: the layer's own.
    """

    def __init__(self, config: LayerConfig, rngs: nnx.Rngs, context_width: int = 0):
        heads = (config.heads, config.width // config.heads)
        context_width, bias = context_width or config.width, config.qkv_bias
        self.implementation = config.attention
        joined = config.attention == "fused"  # XLA's own attention wants heads apart
        self.query = linear(config.width, heads, config.dtype, rngs, bias, joined)
        self.key = linear(context_width, heads, config.dtype, rngs, bias, joined)
        self.value = linear(context_width, heads, config.dtype, rngs, bias, joined)
        self.out = linear(heads, config.width, config.dtype, rngs, joined=joined)

    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        context: Float[Array, "batch keys context_width"] | None = None,
        mask: Bool[Array, "#batch _ keys"] | None = None,
        bias: Float[Array, "_ heads queries keys"] | None = None,
    ) -> Float[Array, "batch queries width"]:
        """Attend; `mask` is true where a query may look, `bias` is added to the scores."""
        if context is not None:
            return self.attend(x, self.keys_values(context), mask, bias)
        memory = self.keys_values(x)
        note_self_attention(
            lambda: SelfAttention(attention_scores(self.query(x), memory.key, bias), mask)
        )
        return self.attend(x, memory, mask, bias)

    def keys_values(self, context: Float[Array, "batch keys context_width"]) -> KeysValues:
        """What of a context is looked at, for `attend`."""
        return KeysValues(
            named("projected", self.key(context), joined=True),
            named("projected", self.value(context), joined=True),
        )

    def attend(
        self,
        x: Float[Array, "batch queries width"],
        memory: KeysValues,
        mask: Bool[Array, "#batch _ keys"] | None = None,
        bias: Float[Array, "_ heads queries keys"] | None = None,
    ) -> Float[Array, "batch queries width"]:
        """The same call, over keys and values that are there already."""
        query = named("projected", self.query(x), joined=True)
        heads = attention(query, memory.key, memory.value, mask, self.implementation, bias)
        return named("attended", self.out(named("heads", heads, joined=True)))

    def weights(
        self,
        x: Float[Array, "batch queries width"],
        context: Float[Array, "batch keys context_width"],
        mask: Bool[Array, "#batch _ keys"] | None = None,
    ) -> Float[Array, "batch heads queries keys"]:
        """The attention probabilities of the same call."""
        return attention_weights(self.query(x), self.key(context), mask)


class AttentionSublayer(nnx.Module):
    """x + attention(x), normalised before ('pre') or after ('post') the sum.

    `norm_context` normalises the context as well: where it is a stream of pre-norm layers, which
    nothing has normalised yet.
    """

    def __init__(
        self,
        config: LayerConfig,
        rngs: nnx.Rngs,
        context_width: int = 0,
        norm_context: bool = False,
    ):
        width = context_width or config.width
        self.pre = config.norm == "pre"
        self.attention = Attention(config, rngs, context_width)
        self.norm = layer_norm(config.width, config.epsilon, config.dtype, rngs)
        self.context_norm = (
            layer_norm(width, config.epsilon, config.dtype, rngs) if norm_context else None
        )
        self.dropout = nnx.Dropout(config.dropout)

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        context: Float[Array, "batch keys context_width"] | None = None,
        mask: Bool[Array, "#batch _ keys"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch queries width"]:
        """Apply the sub-layer; `key` draws its dropout."""
        if self.context_norm is not None and context is not None:
            context = self.context_norm(context)
        queries = self.norm(x) if self.pre else x
        return self._add(x, self.attention(queries, context, mask), key)

    def step(
        self,
        x: Float[Array, "batch queries width"],
        memory: KeysValues,
        mask: Bool[Array, "#batch _ keys"] | None = None,
        at: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch queries width"], KeysValues]:
        """The same call, over keys and values that are there already.

        With `at`, those of `x` itself are written into them first, from that position on.
        """
        queries = self.norm(x) if self.pre else x
        if at is not None:
            memory = memory.written(self.attention.keys_values(queries), at)
        return self._add(x, self.attention.attend(queries, memory, mask)), memory

    def weights(
        self,
        x: Float[Array, "batch queries width"],
        context: Float[Array, "batch keys context_width"] | None = None,
        mask: Bool[Array, "#batch _ keys"] | None = None,
    ) -> Float[Array, "batch heads queries keys"]:
        """The attention probabilities of the same call."""
        if self.context_norm is not None and context is not None:
            context = self.context_norm(context)
        queries = self.norm(x) if self.pre else x
        return self.attention.weights(queries, queries if context is None else context, mask)

    def _add(self, x, attended, key=None):
        x = x + self.dropout(attended, deterministic=key is None, rngs=key)
        return x if self.pre else self.norm(x)


class MlpSublayer(nnx.Module):
    """x + down(activation(up(x))), normalised before ('pre') or after ('post') the sum."""

    def __init__(self, config: LayerConfig, rngs: nnx.Rngs):
        self.pre = config.norm == "pre"
        self.activation = config.activation
        self.up = linear(config.width, config.mlp_width, config.dtype, rngs)
        self.down = linear(config.mlp_width, config.width, config.dtype, rngs)
        self.norm = layer_norm(config.width, config.epsilon, config.dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "batch length width"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch length width"]:
        """Apply the sub-layer; `key` draws its dropout."""
        x = x + self.branch(x, key)
        return x if self.pre else self.norm(x)

    def branch(
        self, x: Float[Array, "*batch width"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "*batch width"]:
        """What is added to `x`."""
        hidden = named("hidden", self.up(self.norm(x) if self.pre else x))
        hidden = ACTIVATIONS[self.activation](hidden)
        return self.dropout(self.down(hidden), deterministic=key is None, rngs=key)


class Block(nnx.Module):
    """The Transformer layer: self-attention, then the MLP (Vaswani et al. 2017, 3.1).

    With `cross`, attention to a context of `context_width` (0: the layer's own) stands between the
    two: the paper's decoder layer, if the mask is causal, and ALBEF's fusion layer, if it is not.
    A call without a context leaves it out, as BLIP does for text alone.
    """

    def __init__(
        self, config: LayerConfig, rngs: nnx.Rngs, cross: bool = False, context_width: int = 0
    ):
        self.self_attention = AttentionSublayer(config, rngs)
        self.cross_attention = AttentionSublayer(config, rngs, context_width) if cross else None
        self.mlp = MlpSublayer(config, rngs)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "#batch _ length"] | None = None,
        context: Float[Array, "batch keys context_width"] | None = None,
        context_mask: Bool[Array, "#batch _ keys"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Apply the layer; masks are true where a query may look, `key` draws its dropout."""
        self_key, mlp_key, *cross_key = split_key(key, 2 if self.cross_attention is None else 3)
        x = self.self_attention(x, mask=mask, key=self_key)
        if self.cross_attention is not None and context is not None:
            x = self.cross_attention(x, context, context_mask, key=cross_key[0])
        return self.mlp(x, key=mlp_key)

    def remember(self, context: Float[Array, "batch keys context_width"]) -> KeysValues:
        """The keys and values of a context, for `step`."""
        assert self.cross_attention is not None
        return self.cross_attention.attention.keys_values(context)

    def step(
        self,
        x: Float[Array, "rows tokens width"],
        own: KeysValues,
        at: int | Int[Array, ""],
        mask: Bool[Array, "rows tokens length"],
        context: KeysValues | None = None,
        context_mask: Bool[Array, "batch 1 keys"] | None = None,
    ) -> tuple[Float[Array, "rows tokens width"], KeysValues]:
        """What a call on a whole text makes of its tokens from position `at` on.

        `own` are the keys and values of the text, of which those before `at` are there; these
        tokens' are written into it. `context` is what `remember` says of the context, a row of
        which may serve several rows of `x` in succession: the beams of one picture.
        """
        x, own = self.self_attention.step(x, own, mask, at)
        if self.cross_attention is not None and context is not None:
            beams = x.reshape(len(context.key), -1, x.shape[-1])
            x = self.cross_attention.step(beams, context, context_mask)[0].reshape(x.shape)
        return self.mlp(x), own


class Stack(nnx.Module):
    """`config.depth` layers of one kind, their parameters stacked on a leading axis.

    They run as one `jax.lax.scan`: the program is compiled for one layer whatever the depth, and
    rematerialised layer by layer as `config.remat` says.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        config: LayerConfig | StackConfig,
        rngs: nnx.Rngs,
    ):
        self.depth, self.remat, self.unroll = config.depth, config.remat, config.unroll
        self.layers = nnx.vmap(make_layer)(rngs.split(config.depth))

    def __call__(self, carry: Any, *args: Any, key: Key[Array, ""] | None = None) -> Any:
        """`carry = layer(carry, *args, key=…)` for every layer; `carry` may be a tuple."""

        def call(layer, carry, key):
            return layer(carry, *args, key=key), None

        return self.run(call, carry, key)[0]

    def run(
        self,
        call: Callable[..., tuple[Any, Any]],
        carry: Any,
        key: Key[Array, ""] | None = None,
        *stacked: Any,
    ) -> tuple[Any, Any]:
        """The general form, `carry, output = call(layer, carry, key, *stacked)`.

        Outputs are stacked over layers, and of what is `stacked` each call gets its layer's.
        """
        graph, parameters = nnx.split(self.layers)

        def body(carries, layer_inputs):
            parameters, layer_key, inputs = layer_inputs
            # Without this, a sharded program may gather the whole batch on every device.
            carry = jax.tree.map(lambda x: rows_first(constrain_batch(x)), carries[0])
            after, output = call(nnx.merge(graph, parameters), carry, layer_key, *inputs)
            return (after, carry), output

        if (policy := REMAT_POLICIES[self.remat]) is not None:
            body = jax.checkpoint(body, policy=policy, prevent_cse=self.unroll)
        keys = None if key is None else jax.random.split(key, self.depth)
        of_layers = (parameters, keys, stacked)
        (carry, entered), outputs = jax.lax.scan(
            body, (carry, carry), of_layers, unroll=self.depth if self.unroll else 1
        )

        def last_layer():
            last, last_key, inputs = jax.tree.map(lambda x: x[-1], of_layers)
            call(nnx.merge(graph, last), entered, last_key, *inputs)

        note_last_layer(last_layer)
        return jax.tree.map(constrain_batch, carry), outputs


def split_key(key: Key[Array, ""] | None, count: int) -> list[Any]:
    """`count` keys out of one; as many `None` where there is none (no dropout)."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def drop_path(
    x: Float[Array, "batch ..."], rate: float | Float[Array, ""], key: Key[Array, ""] | None
) -> Float[Array, "batch ..."]:
    """Stochastic depth (Huang et al. 2016): whole rows of a residual branch are zeroed.

    What is left is scaled by 1 / (1 - `rate`), so that `key=None`, no dropping, is its expectation.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
