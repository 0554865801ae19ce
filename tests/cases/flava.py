import numpy as np

from tests.cases.case import LAYERS, NAMES, UNCOMMON_LAYERS, Case, pictures, renamed, texts

IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 20, "max_position_embeddings": 12}


def _pairs(rng, **sizes):
    return texts(rng) | {"image": pictures(rng, **sizes)}


def _hidden(rng):
    """Patches that are hidden, words of two types, more examples."""
    inputs = texts(rng, batch=3, pad=1)
    return inputs | {
        "text_type": rng.integers(0, 3, inputs["text"].shape),
        "image": pictures(rng, 3, 16, 24),
        "patch_mask": rng.random((3, 8)) < 0.4,
    }


def _named(inputs):
    return renamed(inputs, NAMES | {"patch_mask": "bool_masked_pos"})


def _without_loss(inputs):
    return _named(inputs) | {"return_loss": np.array(False)}


def _pretraining(t):
    layers = LAYERS | {"layer_norm_eps": 1e-6}
    return t.FlavaConfig(
        image_config={**layers, **IMAGE, "vocab_size": 6, "hidden_act": "relu"},
        text_config={**layers, **TEXT},
        multimodal_config=layers | {"num_hidden_layers": 1},
        hidden_size=layers["hidden_size"],
        projection_dim=6,
        init_codebook=False,
    )


def _once(outputs):
    """The class runs FlavaModel twice: without and with what is masked, which here is nothing."""
    fused = {name: value for name, value in outputs.items() if name.startswith("multimodal_masked")}
    others = {name: value for name, value in outputs.items() if "masked" not in name}
    return others | {name.replace("masked_", ""): value for name, value in fused.items()}


def _pretrained(name, inputs):
    return Case(
        name=f"flava-pretraining{name}",
        kind="FlavaForPreTraining",
        config=_pretraining,
        inputs=inputs,
        theirs=_without_loss,
        outputs=_once,
    )


CASES = (
    Case(
        name="flava",
        recorded=True,
        kind="FlavaModel",
        config=lambda t: t.FlavaConfig(
            image_config={**LAYERS, **IMAGE},
            text_config={**LAYERS, **TEXT},
            multimodal_config=LAYERS,
            projection_dim=6,
        ),
        inputs=_pairs,
    ),
    Case(
        name="flava-masked",
        kind="FlavaModel",
        config=lambda t: t.FlavaConfig(
            image_config={
                **UNCOMMON_LAYERS,
                "image_size": (16, 24),
                "patch_size": (8, 6),
                "qkv_bias": False,
                "hidden_act": "gelu_new",
                "layer_norm_eps": 1e-5,
            },
            text_config={
                **LAYERS,
                **TEXT,
                "type_vocab_size": 3,
                "pad_token_id": 1,
                "layer_norm_eps": 1e-4,
            },
            multimodal_config={
                **UNCOMMON_LAYERS,
                "hidden_size": 15,
                "use_cls_token": False,
                "qkv_bias": False,
                "hidden_act": "relu",
            },
            projection_dim=10,
        ),
        inputs=_hidden,
        theirs=_named,
    ),
    _pretrained("", _pairs),
    _pretrained("-texts", texts),
    _pretrained("-pictures", lambda rng: {"image": pictures(rng)}),
)
