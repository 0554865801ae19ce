import numpy as np

from tests.cases.case import LAYERS, NAMES, UNCOMMON_LAYERS, Case, pictures, renamed, texts

SIZES = {"vocab_size": 20, "max_position_embeddings": 12, "image_size": 16, "patch_size": 8}
UNCOMMON_SIZES = {
    "vocab_size": 20,
    "max_position_embeddings": 9,
    "type_vocab_size": 3,
    "image_size": 12,
    "patch_size": 4,
    "pad_token_id": 0,
    "qkv_bias": False,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
}


def _padded(rng, batch=3, height=16, width=24):
    """Pictures of several sizes, filled up to one; words of two types."""
    mask = np.zeros((batch, height, width), bool)
    for row, (high, wide) in zip(mask, ((12, 24), (16, 16), (4, 8)), strict=True):
        row[:high, :wide] = True
    inputs = texts(rng, batch=batch)
    types = rng.integers(0, 2, inputs["text"].shape)
    image = pictures(rng, batch, height, width) * mask[..., None]
    return inputs | {"text_type": types, "image": image, "image_mask": mask}


def _all_in_order(rng):
    """Without its last patch a picture counts as one of fewer patches, which stay in their order.

    Those of the largest are shuffled there.
    """
    inputs = texts(rng) | {"image": pictures(rng, height=16, width=32)}
    mask = np.ones((2, 16, 32), bool)
    mask[:, 8:, 24:] = False
    return inputs | {"image_mask": mask}


def _two_pictures(rng):
    first, second = _padded(rng), _padded(rng)
    return first | {"image_b": second["image"], "image_mask_b": second["image_mask"][::-1]}


def _masked(inputs):
    return renamed(inputs, NAMES | {"image_mask": "pixel_mask"})


def _stacked(inputs):
    pair = {name: inputs[name] for name in inputs if name.endswith("_b")}
    first = _masked({name: inputs[name] for name in inputs if name not in pair})
    second = _masked({name.removesuffix("_b"): array for name, array in pair.items()})
    return first | {name: np.stack([first[name], second[name]], axis=1) for name in second}


CASES = (
    Case(
        name="vilt",
        kind="ViltModel",
        config=lambda t: t.ViltConfig(**LAYERS, **SIZES),
        inputs=_all_in_order,
        theirs=_masked,
    ),
    Case(
        name="vilt-padded",
        kind="ViltModel",
        config=lambda t: t.ViltConfig(**UNCOMMON_LAYERS, **UNCOMMON_SIZES),
        inputs=_padded,
        theirs=_masked,
        # Patches are shuffled there; the words' states are compared by their scores below.
        outputs=lambda out: {"pooler_output": out["pooler_output"]},
    ),
    Case(
        name="vilt-masked",
        recorded=True,
        kind="ViltForMaskedLM",
        config=lambda t: t.ViltConfig(**UNCOMMON_LAYERS, **UNCOMMON_SIZES),
        inputs=_padded,
        theirs=_masked,
    ),
    Case(
        name="vilt-questions",
        kind="ViltForQuestionAnswering",
        config=lambda t: t.ViltConfig(**LAYERS, **SIZES, num_labels=3),
        inputs=lambda rng: texts(rng) | {"image": pictures(rng)},
    ),
    Case(
        name="vilt-retrieval",
        kind="ViltForImageAndTextRetrieval",
        config=lambda t: t.ViltConfig(**LAYERS, **UNCOMMON_SIZES),
        inputs=_padded,
        theirs=_masked,
    ),
    Case(
        name="vilt-reasoning",
        kind="ViltForImagesAndTextClassification",
        config=lambda t: t.ViltConfig(
            **UNCOMMON_LAYERS, **UNCOMMON_SIZES, num_images=2, modality_type_vocab_size=3
        ),
        inputs=_two_pictures,
        theirs=_stacked,
    ),
)
