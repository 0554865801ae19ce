"""A ViT and a BERT from public weights, brought together by a contrast.

What `transformers` calls a VisionTextDualEncoder; LiT's "UU" setting (Zhai et al. 2022, section
3: both towers start pre-trained, both learn). From there: batch, steps and warm-up. Of ours:
towers that are pre-trained learn at a tenth of the rate of the new projections, as in METER's
fine-tuning.

init_from names a folder or a Hub name for each tower; data.vocabulary the BERT's vocab.txt,
unless it lies in the folder.
Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 55_000
    config.batch_size = 16_384
    config.init_from = {
        "image": "hf://google/vit-base-patch16-224-in21k",
        "text": "hf://google-bert/bert-base-uncased",
    }
    config.data.image_size = 224
    config.data.text_length = 32
    config.data.flip = True
    layers = {"epsilon": 1e-12, "dtype": "bfloat16", "remat": "full", "pooler": True}
    config.model = model_section(
        "two_tower",
        image={"size": "B/16", "image_size": 224, **layers},
        text={"size": "base", **layers},
        contrastive={"width": 512, "bias": False},
    )
    config.objectives.contrastive.weight = 1.0
    config.optimizer.update(learning_rate=5e-4, weight_decay=1e-4)
    config.optimizer.rates = (("(image|text)/.*", 0.1),)
    config.optimizer.schedule.warmup_steps = 10_000
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.optimizer.rates = ()  # nothing is pre-trained
    config.model.contrastive.width = 32
