"""VisualBERT (Li et al. 2019): a BERT that reads regions behind the words.

From the paper (section 3.3, task-agnostic pre-training on COCO captions; table 1's row of
VisualBERT): BERT-base, masked language with the picture whole, and two captions of which the
second is another picture's half of the time, to be told; Adam with 10 % warm-up. From its
published configuration (vqa/coco-pre-train): batch 48, 10 epochs, rate 5e-5, clipping at 1.
Ours: 64 tokens, which hold two captions of COCO (the paper cuts at 128); AdamW with BERT's decay.

init_from: 'text' BERT-base's public weights take the place of the stream's.
Data: a source with regions (docs/guides/adding_a_data_set.md); scenes have them.
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 118_000  # 10 epochs of the 567,000 captions of Karpathy's split
    config.batch_size = 48
    config.data.update(text_length=64, regions=True, second_caption=True)
    config.data.vocabulary_size = 30_522
    config.model = model_section(
        "visualbert",
        text={"size": "base", "dropout": 0.1},
        region_width=2_048,
        masked_language=True,
        next_sentence=True,
    )
    config.objectives.masked_language.weight = 1.0
    config.objectives.labelled_pairing.weight = 1.0
    config.optimizer.update(learning_rate=5e-5, b2=0.999, weight_decay=0.01)
    config.optimizer.schedule.update(kind="linear", warmup_steps=11_800)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.data.text_length = 48
