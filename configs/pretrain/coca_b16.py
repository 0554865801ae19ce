"""CoCa-Base (Yu et al. 2022): a contrast and a caption from one pass through each model.

From the paper (sections 3 and 4.1, and table 1's row of CoCa-Base): ViT of width 768 with 12
layers, a decoder of 12 layers whose upper half looks at 256 pooled picture tokens, temperature
0.07 at the start, contrastive weight 1 and captioning weight 2, batch 65,536, 500,000 steps, rate
8e-4 with 2 % warm-up and a linear decay, weight decay 0.01.
Ours: patches of 16 at 256 px (the paper's are of 18 at 288: 256 tokens in both), a space of 512,
AdamW where the paper has Adafactor, a vocabulary of 32,000 (64,000 there), pairs alone (there
half of a batch are labelled pictures), and no last epoch at 576 px.

Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 500_000
    config.batch_size = 65_536
    config.data.update(image_size=256, text_length=64)
    config.data.vocabulary_size = 32_000
    layers = {"dtype": "bfloat16", "remat": "full"}
    config.model = model_section(
        "coca",
        image={"size": "B/16", "image_size": 256, "pool": "mean", **layers},
        text={"width": 768, "depth": 6, "heads": 12, "multimodal_depth": 6, **layers},
        embedding_width=512,
        # [CLS], [SEP] and [PAD] of a vocabulary that is trained here.
        generation={"bos_token_id": 2, "eos_token_id": (3,), "pad_token_id": 0},
    )
    config.objectives.contrastive.weight = 1.0
    config.objectives.captioning.weight = 2.0
    config.optimizer.update(learning_rate=8e-4, b2=0.999, weight_decay=0.01)
    config.optimizer.schedule.update(kind="linear", warmup_steps=10_000)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.model.text.multimodal_depth = 2
    config.model.caption_queries = 8
