from tests.cases.case import Case, pictures

CASES = (
    Case(
        name="swin",
        recorded=True,
        kind="SwinModel",
        config=lambda t: t.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=2
        ),
        inputs=lambda rng: {"image": pictures(rng)},
    ),
    Case(
        # Odd depths and heads; patches that are no squares; maps that fill neither patches, nor
        # windows, nor pairs.
        name="swin-padded",
        kind="SwinModel",
        config=lambda t: t.SwinConfig(
            patch_size=(4, 2),
            embed_dim=6,
            depths=[1, 3, 1],
            num_heads=[3, 2, 6],
            window_size=3,
            mlp_ratio=2.5,
            hidden_act="gelu_new",
            layer_norm_eps=1e-3,
            qkv_bias=False,
        ),
        inputs=lambda rng: {"image": pictures(rng, batch=2, height=46, width=29)},
    ),
    Case(
        name="swin-positions",
        kind="SwinForImageClassification",
        config=lambda t: t.SwinConfig(
            image_size=(16, 24),
            patch_size=2,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[1, 2],
            window_size=4,
            use_absolute_embeddings=True,
            num_labels=3,
        ),
        inputs=lambda rng: {"image": pictures(rng, height=16, width=24)},
    ),
)
