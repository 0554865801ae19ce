"""EfficientNet (Tan and Le 2019) without its classifier, as ALIGN (Jia et al. 2021) uses it."""

from dataclasses import dataclass, field
from math import ceil

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from mmjax.errors import InputError, near_misses
from mmjax.layers import ACTIVATIONS, drop_path, split_key
from mmjax.models.convolution import ConvolutionConfig, NormedConvolution, Stage, encoded
from mmjax.models.features import Encoded
from mmjax.models.vit import normalise, pair

# width coefficient, depth coefficient, pixels a side: the authors' published models.
SIZES = {
    "b0": (1.0, 1.0, 224),
    "b1": (1.0, 1.1, 240),
    "b2": (1.1, 1.2, 260),
    "b3": (1.2, 1.4, 300),
    "b4": (1.4, 1.8, 380),
    "b5": (1.6, 2.2, 456),
    "b6": (1.8, 2.6, 528),
    "b7": (2.0, 3.1, 600),
}
STEM_WIDTH = 32  # of b0
POOLS = ("mean", "max")


@dataclass(frozen=True)
class EfficientNetConfig(ConvolutionConfig):
    """An EfficientNet by name (`size='b7'`) or by its two coefficients.

    The stages are given as those of the b0 network (the paper's table 1); the coefficients scale
    them to `widths` and `depths` (section 3.3).
    """

    image_size: int | tuple[int, int] = 0  # 0: the named size's; for `grid` alone
    activation: str = "silu"
    epsilon: float = 1e-3
    mean: tuple[float, ...] = field(default=(0.5, 0.5, 0.5))
    std: tuple[float, ...] = field(default=(0.5, 0.5, 0.5))

    size: str = ""
    width_coefficient: float = 0.0
    depth_coefficient: float = 0.0
    width_unit: int = 8  # scaled widths are multiples of it
    base_widths: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)  # of the stages' outputs
    base_depths: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    kernels: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze: float = 0.25  # width of the squeeze, as a fraction of the block's input
    # Blocks, counted from 0, whose strided convolution pads both sides alike. TensorFlow, where the
    # weights come from, does so where the map's size is odd, and else pads one pixel less in front.
    symmetric_blocks: tuple[int, ...] = ()
    pool: str = "mean"  # or 'max', over positions
    drop_path: float = 0.0  # stochastic depth of the last block, less by line before it

    def __post_init__(self) -> None:
        """Fill in the named size."""
        if self.size and self.size not in SIZES:
            raise InputError(f"image size {self.size!r} is unknown.{near_misses(self.size, SIZES)}")
        names = ("width_coefficient", "depth_coefficient", "image_size")
        for key, value in zip(names, SIZES[self.size or "b0"], strict=True):
            object.__setattr__(self, key, getattr(self, key) or value)
        super().__post_init__()
        if min(self.width_coefficient, self.depth_coefficient, self.width_unit) <= 0:
            raise InputError(
                f"EfficientNetConfig: width_coefficient {self.width_coefficient}, "
                f"depth_coefficient {self.depth_coefficient} and width_unit {self.width_unit} are "
                "positive."
            )
        if self.pool not in POOLS:
            raise InputError(f"image pool is {self.pool!r}.{near_misses(self.pool, POOLS)}")
        stages = {
            name: getattr(self, name)
            for name in ("base_widths", "base_depths", "kernels", "strides", "expansions")
        }
        if len({len(values) for values in stages.values()}) != 1 or not self.strides:
            raise InputError(f"EfficientNetConfig: one number a stage each; found {stages}.")
        if min(min(values) for values in stages.values()) < 1:
            raise InputError(f"EfficientNetConfig: numbers below 1 in {stages}.")
        if any(kernel % 2 == 0 for kernel in self.kernels) or max(self.strides) > 2:
            raise InputError(
                f"EfficientNetConfig: kernels {self.kernels} are odd and strides {self.strides} "
                "are 1 or 2."
            )

    @property
    def stem_width(self) -> int:
        """Channels after the first convolution."""
        return self._scaled(STEM_WIDTH)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each stage."""
        return tuple(self._scaled(width) for width in self.base_widths)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return tuple(ceil(self.depth_coefficient * depth) for depth in self.base_depths)

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.widths[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens down and across."""
        return self.grid_of(*pair(self.image_size))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Tokens down and across of a picture of another size."""
        sides = height // 2, width // 2
        for stage, stride in enumerate(self.strides):
            if stride == 2:
                extra = sum(self.depths[:stage]) in self.symmetric_blocks
                sides = (sides[0] + extra) // 2, (sides[1] + extra) // 2
        return sides

    def _scaled(self, width: int) -> int:
        """The nearest multiple of `width_unit`, but not below nine tenths."""
        exact, unit = width * self.width_coefficient, self.width_unit
        nearest = max(unit, int(exact + unit / 2) // unit * unit)
        return nearest + unit if nearest < 0.9 * exact else nearest


class EfficientNet(nnx.Module):
    """A strided stem, then stages of inverted bottlenecks; tokens are the last map's positions.

    Pictures of any size are taken that leave a position. The pooled vector is over positions.
    """

    def __init__(self, config: EfficientNetConfig, rngs: nnx.Rngs):
        self.config = config
        self.stem = NormedConvolution(
            3,
            config.stem_width,
            3,
            config,
            rngs,
            stride=2,
            padding=(0, 1),
            activation=config.activation,
        )
        self.stages = nnx.List(
            [_stage(config, stage, rngs) for stage in range(len(config.strides))]
        )

    def __call__(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Encode pictures: uint8 ones are normalised here, float ones are taken as normalised."""
        config = self.config
        if min(config.grid_of(*image.shape[1:3])) < 1:
            raise InputError(
                f"pictures of {image.shape[1]}×{image.shape[2]} pixels are too small for the image "
                f"encoder, which divides their size by {2 * 2 ** config.strides.count(2)}."
            )
        if image.dtype == jnp.uint8:
            image = normalise(image, config.mean, config.std)
        carry = self.stem(image.astype(config.dtype)), jnp.asarray(0)
        keys = split_key(key, len(self.stages))
        for stage, stage_key in zip(self.stages, keys, strict=True):
            carry = stage(carry, stage_key)
        return encoded(carry[0], config.pool)


class InvertedBottleneck(nnx.Module):
    """Expand, convolve each channel by itself, reweigh channels, project (Sandler et al. 2018).

    All but the first block of a stage add their input. What is carried is the map and the number
    of blocks before, which says how often the added branch is dropped.
    """

    def __init__(self, config: EfficientNetConfig, stage: int, first: bool, rngs: nnx.Rngs):
        inputs = (config.stem_width, *config.widths)[stage if first else stage + 1]
        kernel, stride = config.kernels[stage], config.strides[stage] if first else 1
        hidden, activation = inputs * config.expansions[stage], config.activation
        symmetric = stride == 1 or sum(config.depths[:stage]) in config.symmetric_blocks
        self.residual = not first
        self.drop_path = config.drop_path / sum(config.depths)
        self.expand = (
            NormedConvolution(inputs, hidden, 1, config, rngs, activation=activation)
            if config.expansions[stage] != 1
            else None
        )
        self.depthwise = NormedConvolution(
            hidden,
            hidden,
            kernel,
            config,
            rngs,
            stride=stride,
            padding=(kernel // 2 - (not symmetric), kernel // 2),
            groups=hidden,
            activation=activation,
        )
        self.excitation = SqueezeExcitation(
            hidden, max(1, int(inputs * config.squeeze)), config, rngs
        )
        self.project = NormedConvolution(hidden, config.widths[stage], 1, config, rngs)

    def __call__(
        self,
        carry: tuple[Float[Array, "batch height width inputs"], Int[Array, ""]],
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch new_height new_width outputs"], Int[Array, ""]]:
        """Apply the block; `key` draws whether its branch is dropped."""
        x, index = carry
        branch = x if self.expand is None else self.expand(x)
        branch = self.project(self.excitation(self.depthwise(branch)))
        if self.residual:
            branch = x + drop_path(branch, self.drop_path * index, key)
        return branch, index + 1


class SqueezeExcitation(nnx.Module):
    """Each channel times a weight that all channels' means decide (Hu et al. 2018)."""

    def __init__(self, width: int, squeezed: int, config: EfficientNetConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        dtype = jnp.dtype(config.dtype)
        self.reduce = nnx.Conv(width, squeezed, (1, 1), dtype=dtype, rngs=rngs)
        self.expand = nnx.Conv(squeezed, width, (1, 1), dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Reweigh the channels."""
        weights = ACTIVATIONS[self.activation](self.reduce(x.mean(axis=(1, 2), keepdims=True)))
        return x * jax.nn.sigmoid(self.expand(weights))


def _stage(config: EfficientNetConfig, stage: int, rngs: nnx.Rngs) -> Stage:
    return Stage(
        lambda rngs: InvertedBottleneck(config, stage, True, rngs),
        lambda rngs: InvertedBottleneck(config, stage, False, rngs),
        config.depths[stage],
        config,
        rngs,
    )
