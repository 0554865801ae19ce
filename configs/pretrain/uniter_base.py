"""UNITER-base (Chen et al. 2020): words and regions in one stream, and four objectives.

From the paper (section 3 and table 2's row 11, all objectives on in-domain data): BERT-base,
conditional masking of 15 % of words or regions, matching with false pictures and word-region
alignment by optimal transport, features (MRFR) and the detector's distribution (MRC-KL) of hidden
regions. From its published configuration (pretrain-indomain-base-8gpu): transport at 0.1, 200,000
steps of twice 10,240 words and regions on each of 8 GPUs (3,000 pairs of 50 or so), AdamW with b2
0.98, decay 0.01, rate 5e-5, 10,000 warm-up steps, clipping at 5.
Ours: every step sums all objectives, where the code draws one of them for each batch (masked
language and matching twice as often: hence their weights).

init_from: 'text' BERT-base's public weights take the place of the stream's.
Data: a source with regions (docs/guides/adding_a_data_set.md); scenes have them.
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config
from mmjax.data.scenes import REGION_LABELS


def get_config(arg=None):
    config = train_config()
    config.total_steps = 200_000
    config.batch_size = 3_072
    config.data.update(text_length=60, regions=True)
    config.data.vocabulary_size = 28_996
    config.model = model_section(
        "uniter",
        text={"size": "base", "dropout": 0.1, "dtype": "bfloat16", "remat": "full"},
        masked_language=True,
        matching=True,
        region_features=True,
        region_classes=1_601,
    )
    config.objectives.masked_language.weight = 2.0
    config.objectives.pairing.update(weight=2.0, replaces="image", transport=0.1)
    config.objectives.region_features.weight = 1.0
    # (the original takes the mean over classes, too)
    config.objectives.region_distributions.weight = 1 / 1_601
    config.optimizer.update(learning_rate=5e-5, b2=0.98, weight_decay=0.01, clip_norm=5.0)
    config.optimizer.schedule.update(kind="linear", warmup_steps=10_000)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.model.region_classes = len(REGION_LABELS)
    config.objectives.region_distributions.weight = 1.0
