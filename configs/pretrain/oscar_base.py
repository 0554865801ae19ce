"""Oscar-base (Li et al. 2020): words, object tags and regions, the tags as anchors.

From the paper (section 3; table 1's rows of Oscar_B): BERT-base, regions of 2,048 features and 6
numbers of place, 35 tokens of text and tags of which 15 % are masked, and a contrast of the true
tags against those of another picture, half of the time; batch 768, one million steps, AdamW at
5e-5. From its code: decay 0.01, linear fall of the rate, clipping at 10.
Ours: a warm-up of 10,000 steps (1 %), where its code has none: the new layers start gently.

init_from: 'text' BERT-base's public weights take the place of the stream's.
Data: a source with regions (docs/guides/adding_a_data_set.md); scenes have them. They have tags
too.
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 1_000_000
    config.batch_size = 768
    config.data.update(text_length=35, regions=True, tags=True, false_tags=True)
    config.data.vocabulary_size = 30_522
    config.model = model_section(
        "oscar",
        text={"size": "base", "dropout": 0.1, "dtype": "bfloat16", "remat": "full"},
        masked_language=True,
        contrasts=2,
    )
    config.objectives.masked_language.weight = 1.0
    config.objectives.labelled_pairing.weight = 1.0
    config.optimizer.update(learning_rate=5e-5, b2=0.999, weight_decay=0.01, clip_norm=10.0)
    config.optimizer.schedule.update(kind="linear", warmup_steps=10_000)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.data.text_length = 40
