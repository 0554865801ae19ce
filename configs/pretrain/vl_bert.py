"""VL-BERT-base (Su et al. 2020): every token carries a picture, every region a place in the text.

The model of row vl-bert-base-prec in the authors' table of published models
(PREPARE_PRETRAINED_MODELS.md): features of regions are given, not trained.
From the paper (section 3.3): BERT-base, masked words with visual clues and masked regions with
linguistic clues, 15 % of each in one pass, no matching (its ablation finds that it harms). From
its published configuration (base_prec_withouttextonly_4x16G_fp32, an ablation of the paper):
batch 256, 10 epochs of 3.3 million pairs, AdamW with decay 1e-4, rate 1e-7 a pair, 8,000 warm-up
steps, linear, clipping at 10; texts come with pictures alone, where the paper's best mixes in a
text corpus.
Ours: bfloat16, and pictures are not mirrored: their regions come from a file.

init_from: 'text' BERT-base's public weights take the place of the stream's.
Data: a source with regions (docs/guides/adding_a_data_set.md); scenes have them.
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config
from mmjax.data.scenes import REGION_LABELS


def get_config(arg=None):
    config = train_config()
    config.total_steps = 130_000
    config.batch_size = 256
    config.data.update(text_length=64, regions=True)
    config.data.vocabulary_size = 30_522
    config.masking.conditional = False
    config.model = model_section(
        "vl_bert",
        text={"size": "base", "dropout": 0.1, "dtype": "bfloat16", "remat": "full"},
        masked_language=True,
        region_classes=1_601,
        whole_picture=True,
    )
    config.objectives.masked_language.weight = 1.0
    config.objectives.region_distributions.weight = 1.0
    config.optimizer.update(learning_rate=2.56e-5, b2=0.999, weight_decay=1e-4, clip_norm=10.0)
    config.optimizer.schedule.update(kind="linear", warmup_steps=8_000)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.model.update(region_classes=len(REGION_LABELS), box_width=4)
