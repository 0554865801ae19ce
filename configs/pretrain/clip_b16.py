"""CLIP ViT-B/16 (Radford et al. 2021): two towers, and the softmax over a batch's similarities.

From the paper (section 2, table 18, and table 20's row of ViT-B/16): ViT with a LayerNorm before
its first layer, text tower of width 512 with 12 layers and 8 heads that reads left to right, its
end token stands for the text, 77 tokens, space of 512 dimensions, 224 px; batch 32,768, 32 epochs
of 400 million pairs, Adam with rate 5e-4, b2 0.98, epsilon 1e-6 and decay 0.2, 2,000 warm-up
steps, cosine; scale 1 / 0.07 at the start, at most 100; crops. From open_clip: crops keep 0.9 of
the area, GELU in place of its quick approximation.
Ours: WordPiece in place of byte-pair words, with the last [SEP] as the end token; gradients are
clipped at 1.

Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 390_000
    config.batch_size = 32_768
    config.data.image_size = 224
    config.data.text_length = 77
    config.data.vocabulary_size = 49_408
    config.data.crop_scale = 0.9
    layers = {"activation": "gelu", "epsilon": 1e-5, "dtype": "bfloat16", "remat": "full"}
    config.model = model_section(
        "two_tower",
        image={
            **{"size": "B/16", "image_size": 224, "embedding_norm": True, "patch_bias": False},
            **layers,
        },
        text={
            **{"kind": "text_tower", "width": 512, "depth": 12, "heads": 8, "max_length": 77},
            # [SEP] is the fourth of a vocabulary that is trained here.
            **{"pool": "end", "end_token": 3},
            **layers,
        },
        contrastive={"width": 512, "bias": False},
    )
    config.objectives.contrastive.weight = 1.0
    config.optimizer.update(learning_rate=5e-4, b2=0.98, epsilon=1e-6, weight_decay=0.2)
    config.optimizer.schedule.warmup_steps = 2_000
    config.checkpoint.every = 5_000
    return sized(config, arg)
