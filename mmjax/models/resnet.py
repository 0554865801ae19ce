"""The residual network (He et al. 2016, "Deep Residual Learning for Image Recognition")."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from mmjax.errors import InputError, near_misses
from mmjax.layers import ACTIVATIONS
from mmjax.models.convolution import ConvolutionConfig, NormedConvolution, Stage, encoded
from mmjax.models.features import Encoded
from mmjax.models.vit import normalise, pair

# kind of layer, widths and depths of the stages: the paper's table 1.
SIZES = {
    "18": ("basic", (64, 128, 256, 512), (2, 2, 2, 2)),
    "34": ("basic", (64, 128, 256, 512), (3, 4, 6, 3)),
    "50": ("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
    "101": ("bottleneck", (256, 512, 1024, 2048), (3, 4, 23, 3)),
    "152": ("bottleneck", (256, 512, 1024, 2048), (3, 8, 36, 3)),
}
LAYERS = ("basic", "bottleneck")


@dataclass(frozen=True)
class ResNetConfig(ConvolutionConfig):
    """A ResNet by name (`size='50'`) or stage by stage; what is given beside a name wins."""

    size: str = ""
    layer: str = ""  # two 3×3 convolutions ('basic'), or 1×1, 3×3, 1×1 ('bottleneck')
    stem_width: int = 64
    widths: tuple[int, ...] = ()  # of the stages' outputs
    depths: tuple[int, ...] = ()
    stride_in_first_stage: bool = False
    stride_in_reduction: bool = False  # in a bottleneck's first 1×1 (the paper), not in its 3×3

    def __post_init__(self) -> None:
        """Fill in the named size."""
        if self.size and self.size not in SIZES:
            raise InputError(f"image size {self.size!r} is unknown.{near_misses(self.size, SIZES)}")
        named = SIZES.get(self.size, ("bottleneck", (), ()))
        for key, value in zip(("layer", "widths", "depths"), named, strict=True):
            object.__setattr__(self, key, getattr(self, key) or value)
        super().__post_init__()
        if self.layer not in LAYERS:
            raise InputError(
                f"ResNetConfig: layer is {self.layer!r}.{near_misses(self.layer, LAYERS)}"
            )
        if not self.widths or len(self.widths) != len(self.depths):
            raise InputError(
                f"ResNetConfig: widths {self.widths} and depths {self.depths} have one number a "
                "stage; give both, or a named size."
            )
        if min(*self.widths, *self.depths, self.stem_width) < 1 or (
            self.layer == "bottleneck" and any(width % 4 for width in self.widths)
        ):
            raise InputError(
                f"ResNetConfig: stem_width {self.stem_width}, widths {self.widths} and depths "
                f"{self.depths} are positive, the widths of bottlenecks multiples of 4."
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """What each stage divides the map's size by."""
        return (2 if self.stride_in_first_stage else 1,) + (2,) * (len(self.widths) - 1)

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.widths[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens down and across."""
        stride = 4 * 2 ** sum(stride == 2 for stride in self.strides)
        height, width = pair(self.image_size)
        return -(-height // stride), -(-width // stride)


class ResNet(nnx.Module):
    """A strided stem, then stages of residual layers; tokens are the last map's positions.

    Pictures of any size are taken. The pooled vector is the mean over positions.
    """

    def __init__(self, config: ResNetConfig, rngs: nnx.Rngs):
        self.config = config
        self.stem = NormedConvolution(
            3, config.stem_width, 7, config, rngs, stride=2, activation=config.activation
        )
        inputs = (config.stem_width, *config.widths)
        self.stages = nnx.List(
            [
                _stage(config, *sizes, rngs)
                for sizes in zip(inputs, config.widths, config.depths, config.strides, strict=False)
            ]
        )

    def __call__(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Encode pictures: uint8 ones are normalised here, float ones are taken as normalised.

        Nothing in a ResNet is random; `key` is there because every encoder takes one.
        """
        if image.dtype == jnp.uint8:
            image = normalise(image, self.config.mean, self.config.std)
        x = self.stem(image.astype(self.config.dtype))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in self.stages:
            x = stage(x)
        return encoded(x)


class ResidualLayer(nnx.Module):
    """activation(x + convolutions(x)), where x is projected if the sum needs another shape.

    Between the convolutions are ReLUs whatever the activation is: it is so in `transformers`, the
    one source of other activations.
    """

    def __init__(
        self, config: ResNetConfig, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs
    ):
        self.activation = config.activation

        def convolution(inputs, outputs, kernel, stride=1, activation="relu"):
            return NormedConvolution(
                inputs, outputs, kernel, config, rngs, stride=stride, activation=activation
            )

        if config.layer == "basic":
            layers = [
                convolution(inputs, outputs, 3, stride),
                convolution(outputs, outputs, 3, activation=""),
            ]
        else:
            narrow = outputs // 4
            first, second = (stride, 1) if config.stride_in_reduction else (1, stride)
            layers = [
                convolution(inputs, narrow, 1, first),
                convolution(narrow, narrow, 3, second),
                convolution(narrow, outputs, 1, activation=""),
            ]
        self.convolutions = nnx.List(layers)
        self.shortcut = (
            convolution(inputs, outputs, 1, stride, activation="")
            if inputs != outputs or stride != 1
            else None
        )

    def __call__(
        self, x: Float[Array, "batch height width inputs"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch new_height new_width outputs"]:
        """Apply the layer."""
        branch = x
        for convolution in self.convolutions:
            branch = convolution(branch)
        x = x if self.shortcut is None else self.shortcut(x)
        return ACTIVATIONS[self.activation](x + branch)


def _stage(
    config: ResNetConfig, inputs: int, outputs: int, depth: int, stride: int, rngs: nnx.Rngs
) -> Stage:
    return Stage(
        lambda rngs: ResidualLayer(config, inputs, outputs, stride, rngs),
        lambda rngs: ResidualLayer(config, outputs, outputs, 1, rngs),
        depth,
        config,
        rngs,
    )
