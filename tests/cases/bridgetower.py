from functools import partial

from tests.cases.case import LAYERS, UNCOMMON_LAYERS, Case, pictures, texts

# None is among the goldens: an image encoder there has heads of 64 features, whatever its config.
_Case = partial(Case)

TEXT = {"vocab_size": 20, "max_position_embeddings": 12}


def _config(t, hidden_size=LAYERS["hidden_size"], **options):
    return t.BridgeTowerConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        text_config={**LAYERS, **TEXT, "hidden_size": hidden_size},
        hidden_size=hidden_size,
        num_hidden_layers=2,
        **options,
    )


def _uncommon_config(t):
    """Fewer bridges than layers, norms of their own, a layer named that is not there."""
    return t.BridgeTowerConfig(
        vision_config={
            "hidden_size": 128,
            "num_hidden_layers": 5,
            "remove_last_layer": True,
            "image_size": 24,
            "patch_size": 8,
            "layer_norm_eps": 1e-3,
        },
        text_config={
            **UNCOMMON_LAYERS,
            **TEXT,
            "num_hidden_layers": 4,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-6,
            "type_vocab_size": 2,
        },
        hidden_size=UNCOMMON_LAYERS["hidden_size"],
        num_hidden_layers=3,
        layer_norm_eps=1e-2,
    )


def _pairs(rng, **sizes):
    return {"image": pictures(rng, batch=3, **sizes), **texts(rng, batch=3, pad=1)}


def _unmasked_pairs(rng):
    """Padding is attended to, and keeps its own position all the same."""
    inputs = _pairs(rng)
    del inputs["text_mask"]
    return inputs


CASES = (
    _Case(name="bridgetower", kind="BridgeTowerModel", config=_config, inputs=_pairs),
    _Case(
        name="bridgetower-matching",
        kind="BridgeTowerForImageAndTextRetrieval",
        config=_uncommon_config,
        inputs=lambda rng: _pairs(rng, height=24, width=24),
    ),
    _Case(
        name="bridgetower-masked",
        kind="BridgeTowerForMaskedLM",
        config=lambda t: _config(t, hidden_act="relu", layer_norm_eps=1e-3),
        inputs=_unmasked_pairs,
    ),
    _Case(
        name="bridgetower-contrastive",  # all widths are one in this class
        kind="BridgeTowerForContrastiveLearning",
        config=lambda t: _config(
            t, hidden_size=64, contrastive_hidden_size=12, logit_scale_init_value=2.6592
        ),
        inputs=_pairs,
    ),
)
