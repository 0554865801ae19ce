"""ViLT-B/32 (Kim et al. 2021): words and patches in one Transformer, without encoders.

From the paper (section 4.1, table 5's row of 200,000 steps with whole word masking): BERT-base's
layers started from a ViT-B/32, 384 px, texts of 40 tokens, whole word masking of 15 %, matching
with random pictures and word-patch alignment by optimal transport at 0.1, batch 4,096, AdamW with
decay 0.01, rate 1e-4, 10 % warm-up, linear.
Ours: pictures are square, where the paper keeps their shape (384 × up to 640) and reads 200 of
their patches at most; gradients are clipped at 1, where the code does not clip. RandAugment is
for fine-tuning alone there, and off here.

init_from: 'image' a ViT-B/32's public weights take the place of the stream's.
Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 200_000
    config.batch_size = 4_096
    config.data.update(image_size=384, text_length=40)
    config.data.vocabulary_size = 30_522
    config.masking.whole_words = True
    config.model = model_section(
        "vilt",
        **{"width": 768, "depth": 12, "heads": 12, "dtype": "bfloat16", "remat": "full"},
        **{"image_size": 384, "patch_size": 32, "padding": 0, "tied": False},
        masked_language=True,
        matching=True,
    )
    config.objectives.masked_language.weight = 1.0
    config.objectives.pairing.update(weight=1.0, replaces="image", transport=0.1)
    config.optimizer.update(learning_rate=1e-4, b2=0.98, weight_decay=0.01)
    config.optimizer.schedule.update(kind="linear", warmup_steps=20_000)
    config.checkpoint.every = 5_000
    return sized(config, arg)
