from einops import rearrange

from tests.cases.case import Case, pictures


def in_rows(outputs):
    """Feature maps as rows of positions."""
    rows = dict(outputs)
    if "last_hidden_state" in rows:
        rows["last_hidden_state"] = rearrange(rows["last_hidden_state"], "b c h w -> b (h w) c")
    if "pooler_output" in rows:
        rows["pooler_output"] = rows["pooler_output"].reshape(len(rows["pooler_output"]), -1)
    return rows


CASES = (
    Case(
        name="resnet",
        recorded=True,
        kind="ResNetModel",
        config=lambda t: t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 3]),
        inputs=lambda rng: {"image": pictures(rng, height=24, width=24)},
        outputs=in_rows,
    ),
    Case(
        name="resnet-strides",
        kind="ResNetModel",
        config=lambda t: t.ResNetConfig(
            embedding_size=12,
            hidden_sizes=[12, 20],
            depths=[1, 2],
            hidden_act="silu",
            downsample_in_bottleneck=True,
            downsample_in_first_stage=True,
        ),
        inputs=lambda rng: {"image": pictures(rng, batch=3, height=31, width=42)},
        outputs=in_rows,
    ),
    Case(
        name="resnet-basic",
        kind="ResNetForImageClassification",
        config=lambda t: t.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
        ),
        inputs=lambda rng: {"image": pictures(rng, height=33, width=20)},
        outputs=in_rows,
    ),
)
