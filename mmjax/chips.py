"""What a TPU chip is, a generation a line."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip, by its vendor's data sheet (cloud.google.com/tpu/docs, a page a generation).

    Two numbers are in no data sheet. What a program may have of the HBM is what libtpu names when
    one asks for more. The clock follows from the peak and from the FLOPs of a cycle, which the
    compiler's estimate of a large matrix product shows: 2¹⁷ on v5e, 2¹⁸ on v4 and v5p, 2¹⁹ on v6e,
    2²⁰ on tpu7x.
    """

    device_kinds: tuple[str, ...]  # jax's names of its devices
    accelerator_type: str  # a slice of it, for TPU_ACCELERATOR_TYPE
    devices: int  # that jax shows for a chip
    peak_flops: float  # dense bf16, FLOP/s
    clock: float  # cycles/s
    hbm_bytes: float  # that a program may have
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s out of a chip and into it, over all its links together
    config: str | None = None  # libtpu's name of the way that the chip's cores are run


CHIPS = {
    "v4": Chip(
        device_kinds=("TPU v4",),
        accelerator_type="v4-8",
        config="megacore",  # both cores as one device, as jax runs it; libtpu alone would say two
        devices=1,
        peak_flops=275e12,
        clock=1.05e9,
        hbm_bytes=30.75 * GIB,
        hbm_bandwidth=1228e9,
        ici_bandwidth=600e9,
    ),
    "v5e": Chip(
        device_kinds=("TPU v5 lite", "TPU v5e"),
        accelerator_type="v5litepod-4",
        devices=1,
        peak_flops=197e12,
        clock=1.5e9,
        hbm_bytes=15.75 * GIB,
        hbm_bandwidth=819e9,
        ici_bandwidth=400e9,
    ),
    "v5p": Chip(
        device_kinds=("TPU v5", "TPU v5p"),
        accelerator_type="v5p-8",
        devices=1,
        peak_flops=459e12,
        clock=1.75e9,
        hbm_bytes=95.74 * GIB,
        hbm_bandwidth=2765e9,
        ici_bandwidth=1200e9,
    ),
    "v6e": Chip(
        device_kinds=("TPU v6 lite", "TPU v6e"),
        accelerator_type="v6e-4",
        devices=1,
        peak_flops=918e12,
        clock=1.75e9,
        hbm_bytes=31.25 * GIB,
        hbm_bandwidth=1638e9,
        ici_bandwidth=800e9,
    ),
    "tpu7x": Chip(
        device_kinds=("TPU7x",),
        accelerator_type="tpu7x-8",
        devices=2,
        peak_flops=2307e12,
        clock=2.2e9,
        hbm_bytes=2 * 94.75 * GIB,
        hbm_bandwidth=7380e9,
        ici_bandwidth=1200e9,
    ),
}
