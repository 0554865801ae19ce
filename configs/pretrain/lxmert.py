"""LXMERT (Tan and Bansal 2019): words and regions in encoders of their own, then co-attention.

From the paper (sections 3.1 and 3.3): 9 language, 5 region and 5 cross-modality layers of
BERT-base's size, 36 regions of 2,048 features, 15 % of words and of regions hidden in one pass,
the regions' features and labels to be guessed, matching with a false text half of the time, batch
256, 20 epochs (about 670,000 steps of that batch over 9.18 million texts), Adam at 1e-4 with
linear decay. From its code: attributes are to be guessed, too; the visual losses are weighted
1 / 0.15 and averaged over all regions; labels and attributes are asked of regions that are not
hidden as well; texts of 20 tokens, 5 % warm-up, decay 0.01, clipping at 1.
Ours: question answering is left to fine-tuning, as in table 4's rows "P20" (the best, "P10+QA10",
ends with 10 epochs of it: objectives.answer_labels adds it where the texts are questions with
answers; the paper's 9,500); AdamW.

Data: a source with regions (docs/guides/adding_a_data_set.md); scenes have them.
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config
from mmjax.data.scenes import REGION_ATTRIBUTES, REGION_LABELS


def get_config(arg=None):
    config = train_config()
    config.total_steps = 670_000
    config.batch_size = 256
    config.data.update(text_length=20, regions=True)
    config.data.vocabulary_size = 30_522
    config.masking.conditional = False
    config.model = model_section(
        "lxmert",
        text={"size": "base", "depth": 9, "dropout": 0.1, "pooler": False},
        region_depth=5,
        fusion_depth=5,
        masked_language=True,
        matching=True,
        region_objects=1_600,
        region_attributes=400,
        region_features=True,
    )
    config.objectives.masked_language.weight = 1.0
    config.objectives.pairing.weight = 1.0
    for name in ("region_labels", "region_attributes"):
        config.objectives[name].update(weight=1 / 0.15, hidden=False)
    config.objectives.region_features.update(weight=1.0, distance="smooth_l1")
    config.optimizer.update(learning_rate=1e-4, b2=0.999, weight_decay=0.01)
    config.optimizer.schedule.update(kind="linear", warmup_steps=33_500)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.model.update(region_depth=2, fusion_depth=2)
    config.model.update(region_objects=len(REGION_LABELS), region_attributes=len(REGION_ATTRIBUTES))
