"""METER-CLIP16 (Dou et al. 2022): co-attention above CLIP's picture encoder and a BERT.

From the paper (section 4.1 and table 8's last row) and its published configuration
(task_mlm_itm_clip_bert): CLIP's ViT-B/16 without its last layer at 288 px, six co-attention
layers a stream, texts of 50 tokens, masked language by whole words and matching with random
pictures, batch 4,096, 100,000 steps, 10 % of them warm-up, linear, AdamW (0.9, 0.98) with decay
0.01, rate 1e-5 for encoders, five times that for the fusion and heads; pictures are not
augmented.
Ours: BERT-base with its vocabulary, which that configuration has too, where the best row has
RoBERTa (and masks tokens); square pictures, where the code cuts out their middle; gradients are
clipped at 1, where the code does not clip.

init_from: 'image' CLIP ViT-B/16's public weights, 'text' a BERT's.
Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 100_000
    config.batch_size = 4_096
    config.data.update(image_size=288, text_length=50)
    config.data.vocabulary_size = 30_522
    config.masking.whole_words = True
    layers = {"dtype": "bfloat16", "remat": "full"}
    config.model = model_section(
        "meter",
        image={"image_size": 288, **layers},
        text={
            **{"vocabulary_size": 0, "max_length": 512, "first_position": 0, "padding": 0},
            **{"types": 2, "epsilon": 1e-12},
            **layers,
        },
        fusion=layers,
    )
    config.objectives.masked_language.weight = 1.0
    config.objectives.pairing.update(weight=1.0, replaces="image")
    config.optimizer.update(learning_rate=1e-5, b2=0.98, weight_decay=0.01)
    config.optimizer.rates = (("(image|text)/.*", 1.0), (".*", 5.0))
    config.optimizer.schedule.update(kind="linear", warmup_steps=10_000)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.optimizer.rates = ()  # nothing is pre-trained
