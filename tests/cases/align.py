from tests.cases.case import LAYERS, UNCOMMON_LAYERS, Case, pictures, texts
from tests.cases.resnet import in_rows

STAGES = {
    "kernel_sizes": [3, 5],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "strides": [1, 2],
    "num_block_repeats": [1, 2],
    "expand_ratios": [1, 4],
    "width_coefficient": 0.5,
    "depth_coefficient": 1.0,
    "hidden_dim": 32,
}
# Odd maps with either padding, and scaled depths and widths.
UNCOMMON_STAGES = {
    "kernel_sizes": [3, 5, 3],
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "strides": [2, 2, 1],
    "num_block_repeats": [2, 1, 1],
    "expand_ratios": [3, 1, 2],
    "depthwise_padding": [3],
    "width_coefficient": 0.3,
    "depth_coefficient": 1.2,
    "depth_divisor": 6,
    "squeeze_expansion_ratio": 0.4,
    "hidden_act": "relu",
    "pooling_type": "max",
    "batch_norm_eps": 1e-2,
    "hidden_dim": 32,
}


def _pairs(rng, **sizes):
    return {"image": pictures(rng, **sizes), **texts(rng, batch=3)}


def _with_rows(outputs):
    return {**outputs, "vision_model_output": in_rows(outputs["vision_model_output"])}


CASES = (
    Case(
        name="align",
        recorded=True,
        kind="AlignModel",
        config=lambda t: t.AlignConfig(
            text_config={**LAYERS, "vocab_size": 20, "max_position_embeddings": 12},
            vision_config=STAGES,
            projection_dim=16,
        ),
        inputs=_pairs,
        outputs=_with_rows,
    ),
    Case(
        name="align-uncommon",
        kind="AlignModel",
        config=lambda t: t.AlignConfig(
            text_config={**UNCOMMON_LAYERS, "vocab_size": 20, "max_position_embeddings": 12},
            vision_config=UNCOMMON_STAGES,
            projection_dim=12,
        ),
        inputs=lambda rng: _pairs(rng, height=45, width=31),
        outputs=_with_rows,
    ),
    Case(
        name="align-vision",
        kind="AlignVisionModel",
        config=lambda t: t.AlignVisionConfig(
            width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=64
        ),
        inputs=lambda rng: {"image": pictures(rng, height=64, width=64)},
        outputs=in_rows,  # too large, and `align` holds such an encoder
    ),
)
