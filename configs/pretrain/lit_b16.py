"""LiT B/16 (Zhai et al. 2022): a locked picture tower, and a text tower that learns from it.

The model of row mixed_B16B_2 in the table of the authors' published models (big_vision's
README_lit.md): BERT-base, and no layer on top of the picture tower.
From the paper (section 4 and appendix, the setting "Lu", or "LU" with public weights): the image
tower is a pre-trained ViT-B/16 at 224 px that gets no gradient, the text tower a BERT-base from
scratch or from public weights, texts of 16 tokens, batch 16,384, rate 1e-3, 10,000 warm-up steps,
cosine over 55,000 steps; weight decay 1e-4, which big_vision does not multiply with the rate: 0.1
here.
Ours: AdamW, where the paper has a modified Adafactor; the paper's steps, where that row has 60,000.

Set init_from = {'image': FOLDER} to a ViT's public weights (and 'text' to a BERT's).
Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 55_000
    config.batch_size = 16_384
    config.init_from = {"image": "hf://google/vit-base-patch16-224-in21k"}
    config.data.image_size = 224
    config.data.text_length = 16
    config.data.vocabulary_size = 32_000
    config.model = model_section(
        "two_tower",
        image={"size": "B/16", "image_size": 224, "epsilon": 1e-12, "pooler": True},
        text={"size": "base", "dtype": "bfloat16", "remat": "full"},
        contrastive={"width": 768, "project_image": False},
    )
    config.objectives.contrastive.weight = 1.0
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.1)
    config.optimizer.rates = (("image/.*", 0.0),)  # locked
    config.optimizer.schedule.warmup_steps = 10_000
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.data.text_length = 32
    config.model.contrastive.width = 32
