"""ALBEF (Li et al. 2021): align before fuse, with a momentum model that teaches.

From the paper and its published configuration (table 1's 4M and 14M rows): ViT-B/16 at 256 px,
BERT-base split into six layers of text and six that look at the picture, space of 256,
temperature 0.07 clamped to [0.001, 0.5]; momentum 0.995, queue of 65,536, distillation 0.4 ramped
over the first epoch; matching with hard negatives; 15 % of the words masked; batch 512, 30
epochs, AdamW with decay 0.02, 1,000 warm-up steps to 1e-4, cosine to 1e-5; crops from 0.2, flip,
RandAugment(2, 7); 25 tokens without [SEP].
Ours: bfloat16; negatives and queue of the global batch, where the code sees one GPU's; the
momentum model runs without dropout; the warm-up begins at 0, and is the paper's, where its code
takes 2,000 steps from 1e-5; gradients are clipped at 1, where its code does not clip.

init_from: 'image' a DeiT-B's public weights, 'text' BERT-base's (its first six layers are the
text's).
Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 300_000  # 30 epochs of 5.1 million pairs, the 4M corpus
    config.batch_size = 512
    config.data.update(image_size=256, text_length=25, end_token=False)
    config.data.update(crop_scale=0.2, flip=True, randaugment=(2, 7))
    config.data.vocabulary_size = 30_522
    layers = {"dtype": "bfloat16", "remat": "full"}
    config.model = model_section(
        "albef",
        image={"size": "B/16", "image_size": 256, **layers},
        text={"size": "base", "padding": 0, "dropout": 0.1, **layers},
        embedding_width=256,
        matching=True,
        masked_language=True,
    )
    ramp = 10_000  # an epoch
    config.objectives.momentum_contrastive.update(weight=1.0, distill=0.4, ramp_steps=ramp)
    config.objectives.matching.weight = 1.0
    config.objectives.masked_language.update(weight=1.0, distill=0.4, ramp_steps=ramp)
    config.optimizer.update(learning_rate=1e-4, b2=0.999, weight_decay=0.02, ema_decay=0.995)
    config.optimizer.schedule.update(warmup_steps=1_000, end_fraction=0.1)
    config.optimizer.bounds = ((".*/temperature", (0.001, 0.5)),)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.model.fusion_layer = 1
    for objective in ("momentum_contrastive", "masked_language"):
        config.objectives[objective].ramp_steps = 100
    config.objectives.momentum_contrastive.queue_size = 64
