"""Oscar and VinVL (microsoft/Oscar)."""

from mmjax.models.oscar import Oscar, OscarConfig
from mmjax.weights.families import bert
from mmjax.weights.family import Family
from mmjax.weights.names import Table, modules, under

ENCODER: Table = (
    *under(bert.EMBEDDINGS, "text_embeddings/", "embeddings."),
    *modules(
        {
            "region_embeddings/projection": "img_embedding",
            "region_embeddings/norm": "LayerNorm",
            "fusion/pooler": "pooler.dense",
        }
    ),
    *under(bert.LAYER, "fusion/blocks/layers/", "encoder.layer.{n}."),
)
PRETRAINING: Table = (
    *under(bert.MASKED_LANGUAGE, "masked_language/", "cls.predictions."),
    *modules({"contrast": "cls.seq_relationship"}),
)


def _table(config: OscarConfig) -> Table:
    task = "matching" if config.matching else "reasoning" if config.reasoning else "answering"
    last = 3 if config.reasoning and config.region_epsilon else 2  # behind a LayerNorm
    return (
        *under(ENCODER, "", "bert."),
        *PRETRAINING,
        *modules(
            {
                task: "classifier",
                f"{task}/hidden": "classifier.0",
                f"{task}/norm": "classifier.2",
                f"{task}/classifier": f"classifier.{last}",
            }
        ),
    )


FAMILY = Family(
    name="oscar",
    model=Oscar,
    config=OscarConfig,
    table=_table,
    tied={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
    unused=bert.UNUSED,
)
