"""The Swin Transformer (Liu et al. 2021, "Hierarchical Vision Transformer using Shifted Windows").

Feature maps are [batch, height, width, channels] throughout.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError, near_misses
from mmjax.layers import (
    TABLE_INIT,
    Attention,
    LayerConfig,
    MlpSublayer,
    Stack,
    drop_path,
    layer_norm,
    linear,
    split_key,
)
from mmjax.models.features import Encoded
from mmjax.models.vit import normalise, pair

# width of the first stage, depths, heads: the paper's section 3.3.
SIZES = {
    "T": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "S": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "B": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "L": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
# Of the norms after the patches and before every merging, whatever `epsilon` says of the others.
_EPSILON = 1e-5


@dataclass(frozen=True)
class SwinConfig:
    """A Swin by name (`size='T'`) or stage by stage; what is given beside a name wins."""

    size: str = ""
    image_size: int | tuple[int, int] = 224  # pixels a side, or (height, width)
    patch_size: int | tuple[int, int] = 4
    stem_width: int = 0  # of the first stage; doubled before every other
    depths: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    window: int = 7  # tokens a side
    mlp_ratio: float = 4.0  # the MLP's width, by that of its stage
    qkv_bias: bool = True
    absolute_positions: bool = False  # learnt ones, added to the patches
    activation: str = "gelu"
    epsilon: float = 1e-5  # of the blocks' and the final LayerNorm
    dropout: float = 0.0  # on the patches and on the output of every sub-layer
    drop_path: float = 0.0  # stochastic depth of the last block, less by line before it
    mean: tuple[float, ...] = field(default=(0.485, 0.456, 0.406))  # of pixels in [0, 1]
    std: tuple[float, ...] = field(default=(0.229, 0.224, 0.225))

    dtype: str = "float32"  # of activations: 'float32' or 'bfloat16'
    remat: str = "none"  # a key of mmjax.remat.REMAT_POLICIES
    unroll: bool = False  # fewer copies of what is stored, and a program of every layer to compile
    attention: str = "auto"  # an implementation of mmjax.attention

    def __post_init__(self) -> None:
        """Fill in the named size."""
        if self.size and self.size not in SIZES:
            raise InputError(f"image size {self.size!r} is unknown.{near_misses(self.size, SIZES)}")
        named = SIZES.get(self.size, (0, (), ()))
        for key, value in zip(("stem_width", "depths", "heads"), named, strict=True):
            object.__setattr__(self, key, getattr(self, key) or value)
        if not self.depths or len(self.depths) != len(self.heads):
            raise InputError(
                f"SwinConfig: depths {self.depths} and heads {self.heads} have one number a stage; "
                "give both, or a named size."
            )
        if self.window < 1 or min(*pair(self.patch_size), *pair(self.image_size)) < 1:
            raise InputError(
                f"SwinConfig: window {self.window}, patch_size {self.patch_size} and image_size "
                f"{self.image_size} are positive."
            )
        for stage in range(len(self.depths)):
            self.layers(stage)  # refuses what cannot be built

    def layers(self, stage: int) -> LayerConfig:
        """The blocks of a stage."""
        width = self.stem_width * 2**stage
        return LayerConfig(
            width=width,
            depth=self.depths[stage],
            heads=self.heads[stage],
            mlp_width=int(self.mlp_ratio * width),
            activation=self.activation,
            epsilon=self.epsilon,
            dropout=self.dropout,
            qkv_bias=self.qkv_bias,
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
            attention=self.attention,
        )

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.stem_width * 2 ** (len(self.depths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens down and across."""
        return self.grid_of_stage(len(self.depths) - 1)

    def grid_of_stage(self, stage: int) -> tuple[int, int]:
        """Height and width of a stage's map; the last row or column may lie partly outside."""
        (height, width), (down, across) = pair(self.image_size), pair(self.patch_size)
        return -(-height // (down * 2**stage)), -(-width // (across * 2**stage))


class Swin(nnx.Module):
    """Patches, then stages of windowed attention, each on a map of half the size.

    Pictures of any size are taken whose maps hold a window, or, with absolute positions, of
    `image_size` alone. The pooled vector is the mean of the tokens.
    """

    def __init__(self, config: SwinConfig, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.stem_width, config.dtype
        self.patch = linear((*pair(config.patch_size), 3), width, dtype, rngs)
        self.embedding_norm = layer_norm(width, _EPSILON, dtype, rngs)
        height, across = config.grid_of_stage(0)
        self.position_embedding = (
            nnx.Param(TABLE_INIT(rngs.params(), (height * across, width)))
            if config.absolute_positions
            else None
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.stages = nnx.List([SwinStage(config, i, rngs) for i in range(len(config.depths))])
        self.norm = layer_norm(config.width, config.epsilon, dtype, rngs)

    def __call__(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Encode pictures: uint8 ones are normalised here, float ones are taken as normalised."""
        config = self.config
        if image.dtype == jnp.uint8:
            image = normalise(image, config.mean, config.std)
        down, across = pair(config.patch_size)
        patches = rearrange(
            _padded(image.astype(config.dtype), down, across),
            "b (h p) (w q) c -> b h w p q c",
            p=down,
            q=across,
        )
        x = self.embedding_norm(self.patch(patches))
        if self.position_embedding is not None:
            if x.shape[1:3] != (grid := config.grid_of_stage(0)):
                raise InputError(
                    f"the image encoder has positions for {grid[0]}×{grid[1]} patches and the "
                    f"pictures have {x.shape[1]}×{x.shape[2]}: let data.image_size and "
                    "model.image.image_size agree."
                )
            x = x + self.position_embedding[...].reshape(1, *x.shape[1:]).astype(x.dtype)
        embedding_key, *stage_keys = split_key(key, 1 + len(self.stages))
        x = self.dropout(x, deterministic=key is None, rngs=embedding_key)
        for stage, stage_key in zip(self.stages, stage_keys, strict=True):
            x = stage(x, stage_key)
        tokens = rearrange(self.norm(x), "b h w c -> b (h w) c")
        return Encoded(tokens=tokens, mask=None, pooled=tokens.mean(axis=1))


class SwinStage(nnx.Module):
    """Blocks on maps of one size, which are halved after them, except in the last stage."""

    def __init__(self, config: SwinConfig, stage: int, rngs: nnx.Rngs):
        layers = config.layers(stage)
        self.blocks = Stack(lambda rngs: SwinBlock(config, stage, rngs), layers, rngs)
        last = stage == len(config.depths) - 1
        self.merge = None if last else PatchMerging(layers.width, config.dtype, rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch new_height new_width new_channels"]:
        """Apply the stage; `key` draws its dropout."""
        x, _ = self.blocks((x, jnp.asarray(0)), key=key)
        return x if self.merge is None else self.merge(x)


class SwinBlock(nnx.Module):
    """Attention within windows, then the MLP; windows are shifted in every other block.

    What is carried is the map and the number of blocks before it in the stage, which says whether
    this one is shifted and how often its branches are dropped.
    """

    def __init__(self, config: SwinConfig, stage: int, rngs: nnx.Rngs):
        layers = config.layers(stage)
        self.blocks_before = sum(config.depths[:stage])
        self.drop_path = config.drop_path / max(sum(config.depths) - 1, 1)
        window = min(config.window, *config.grid_of_stage(stage))
        self.window_attention = WindowAttention(layers, window, rngs)
        self.mlp = MlpSublayer(layers, rngs)

    def __call__(
        self,
        carry: tuple[Float[Array, "batch height width channels"], Int[Array, ""]],
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch height width channels"], Int[Array, ""]]:
        """Apply the block; `key` draws its dropout and whether a branch is dropped."""
        x, index = carry
        rate = self.drop_path * (self.blocks_before + index)
        attention_key, attention_path_key, mlp_key, mlp_path_key = split_key(key, 4)
        branch = self.window_attention.branch(x, index % 2 == 1, attention_key)
        x = x + drop_path(branch, rate, attention_path_key)
        x = x + drop_path(self.mlp.branch(x, mlp_key), rate, mlp_path_key)
        return x, index + 1


class WindowAttention(nnx.Module):
    """Every window attends to itself, with a learnt bias by relative position (section 3.2).

    Maps are padded with zeros, after the norm, to a whole number of windows; the zeros are attended
    to, as in the published models.
    """

    def __init__(self, config: LayerConfig, window: int, rngs: nnx.Rngs):
        self.window = window
        self.norm = layer_norm(config.width, config.epsilon, config.dtype, rngs)
        self.attention = Attention(config, rngs)
        shape = ((2 * window - 1) ** 2, config.heads)
        self.relative_position_bias = nnx.Param(TABLE_INIT(rngs.params(), shape))
        self.dropout = nnx.Dropout(config.dropout)

    def branch(
        self,
        x: Float[Array, "batch height width channels"],
        shifted: Bool[Array, ""],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch height width channels"]:
        """What is added to `x`; with `shifted`, windows lie half a window further down and right.

        Raises InputError for a map that does not hold a window.
        """
        size, (batch, height, width, _) = self.window, x.shape
        if min(height, width) < size:
            raise InputError(
                f"the image encoder's windows of {size}×{size} tokens do not fit a map of "
                f"{height}×{width}: take larger pictures."
            )
        padded = _padded(self.norm(x), size, size)
        # One window wide or high, there is nothing to shift into.
        shift = size // 2 if min(height, width) > size else 0
        rolled = jnp.where(shifted, jnp.roll(padded, (-shift, -shift), (1, 2)), padded)
        windows = rearrange(rolled, "b (h p) (w q) c -> (b h w) (p q) c", p=size, q=size)
        mask = jnp.asarray(_together(padded.shape[1], padded.shape[2], size, shift)) | ~shifted
        mask = jnp.tile(mask, (batch, 1, 1))
        bias = self.relative_position_bias[...][_relative_positions(size)]
        out = self.attention(windows, mask=mask, bias=rearrange(bias, "q k heads -> 1 heads q k"))
        out = self.dropout(out, deterministic=key is None, rngs=key)
        out = rearrange(
            out,
            "(b h w) (p q) c -> b (h p) (w q) c",
            b=batch,
            h=padded.shape[1] // size,
            p=size,
        )
        out = jnp.where(shifted, jnp.roll(out, (shift, shift), (1, 2)), out)
        return out[:, :height, :width]


class PatchMerging(nnx.Module):
    """Four neighbours' features side by side, normalised, and mapped to twice the width."""

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs):
        self.norm = layer_norm(4 * width, _EPSILON, dtype, rngs)
        self.reduction = linear(4 * width, 2 * width, dtype, rngs, bias=False)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch half_height half_width twice_channels"]:
        """A map of half the size; one of odd size is padded with zeros."""
        x = rearrange(_padded(x, 2, 2), "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)
        return self.reduction(self.norm(x))


def _padded(
    x: Float[Array, "batch height width channels"], down: int, across: int
) -> Float[Array, "batch padded_height padded_width channels"]:
    """Zeros below and to the right, up to multiples of `down` and `across`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % down), (0, -x.shape[2] % across), (0, 0)))


def _together(
    height: int, width: int, window: int, shift: int
) -> Bool[np.ndarray, "windows tokens tokens"]:
    """Which tokens of a window of the rolled map were neighbours before it was rolled.

    In the last windows down and across, the last `shift` rows and columns came from the other side.
    """
    rows, columns = np.arange(height) >= height - shift, np.arange(width) >= width - shift
    side = rearrange(2 * rows[:, None] + columns, "(h p) (w q) -> (h w) (p q)", p=window, q=window)
    return side[:, :, None] == side[:, None, :]


def _relative_positions(window: int) -> Int[np.ndarray, "tokens tokens"]:
    """The row of the bias table for each pair of a window's tokens, by their distance.

    Distances down and across, -(window - 1) to window - 1 each, are counted row by row.
    """
    rows, columns = np.divmod(np.arange(window**2), window)
    down, across = (x[:, None] - x + window - 1 for x in (rows, columns))
    return down * (2 * window - 1) + across
