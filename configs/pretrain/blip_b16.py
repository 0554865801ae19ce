"""BLIP base (Li et al. 2022): one text model that encodes, matches and writes.

From the paper (section 4.1; table 1, ViT-B, 14M images, no CapFilt): ViT-B/16 at 224 px,
BERT-base with a cross-attention in every layer, the decoder shares all but its self-attention;
batch 2,880, 20 epochs, rate 3e-4, decay 0.05; captioning with label smoothing 0.1; crops,
RandAugment. From its published configuration and code: space of 256, momentum 0.995, queue of
57,600, distillation 0.4 ramped over two epochs, matching with hard negatives, 3,000 warm-up
steps; crops from 0.2, flip, RandAugment(2, 5), 30 tokens. (That has 2,400 pairs a step, which in
the paper is the batch of ViT-L.)
Ours: cosine, where the rate falls by 0.85 an epoch (0.9 in the code); no decay of vectors;
gradients are clipped at 1; hard negatives are drawn by the softmax alone, without the 1e-4 that
is added to every candidate there, which does not scale with the batch; the start token of texts
is [CLS] for all three uses, because a vocabulary that is trained here has no [DEC] and [ENC].
With BLIP's own set model.text.vocabulary_size=30524, model.pair_token=30523 and
objectives.captioning.start_id=30522.

init_from: 'image' a ViT-B/16's public weights, 'text' BERT-base's.
Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 100_000  # 20 epochs of 14 million pairs
    config.batch_size = 2_880
    config.data.update(image_size=224, text_length=30)
    config.data.update(crop_scale=0.2, flip=True, randaugment=(2, 5))
    config.data.vocabulary_size = 30_522
    layers = {"dtype": "bfloat16", "remat": "full"}
    config.model = model_section(
        "blip",
        image={"size": "B/16", "image_size": 224, **layers},
        text={"size": "base", "types": 0, "padding": 0, "dropout": 0.1, **layers},
        decoder="image",
        shared=True,
        embedding_width=256,
        matching=True,
        # [CLS], [SEP] and [PAD] of a vocabulary that is trained here.
        generation={"bos_token_id": 2, "eos_token_id": (3,), "pad_token_id": 0},
    )
    config.objectives.momentum_contrastive.update(
        weight=1.0, distill=0.4, ramp_steps=10_000, queue_size=57_600
    )
    config.objectives.matching.weight = 1.0
    config.objectives.captioning.update(weight=1.0, smoothing=0.1)
    config.optimizer.update(learning_rate=3e-4, b2=0.999, weight_decay=0.05, ema_decay=0.995)
    config.optimizer.schedule.warmup_steps = 3_000
    config.optimizer.bounds = ((".*/temperature", (0.001, 0.5)),)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.objectives.momentum_contrastive.update(ramp_steps=100, queue_size=64)
    config.objectives.captioning.smoothing = 0.0
