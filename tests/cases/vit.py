from tests.cases.case import LAYERS, UNCOMMON_LAYERS, Case, pictures

CASES = (
    Case(
        name="vit",
        recorded=True,
        kind="ViTModel",
        config=lambda t: t.ViTConfig(**LAYERS, image_size=16, patch_size=8),
        inputs=lambda rng: {"image": pictures(rng)},
    ),
    Case(
        name="vit-rectangular",
        kind="ViTModel",
        config=lambda t: t.ViTConfig(
            **UNCOMMON_LAYERS,
            image_size=(16, 24),
            patch_size=(8, 4),
            qkv_bias=False,
            hidden_act="gelu_new",
            layer_norm_eps=1e-5,
        ),
        inputs=lambda rng: {"image": pictures(rng, batch=3, height=16, width=24)},
    ),
    Case(
        name="vit-classifier",
        recorded=True,
        kind="ViTForImageClassification",
        config=lambda t: t.ViTConfig(**LAYERS, image_size=16, patch_size=8, num_labels=3),
        inputs=lambda rng: {"image": pictures(rng)},
    ),
)
