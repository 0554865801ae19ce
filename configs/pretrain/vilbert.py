"""ViLBERT (Lu et al. 2019): BERT-base and a stream of regions, joined by co-attention layers.

From the paper (sections 3.1 and 3.2; table 1's rows of ViLBERT): BERT-base's twelve layers for
text, six co-attention layers, regions of 2,048 features embedded by features and place, 15 % of
words and of regions hidden in one pass, the detector's distribution over classes to be guessed of
regions, matching with false texts; batch 512, 10 epochs of 3.1 million pairs, Adam at 1e-4,
warm-up, linear decay.
Ours: the generic two-stream model. Its co-attention follows the whole text encoder of six layers,
in place of alternating with its upper six; both streams are 768 wide (the regions' 1,024 there),
a layer crosses first and then attends to itself, and the picture is the mean of its regions,
where the paper puts a region of the whole picture in front.

init_from: 'text' BERT-base's public weights. Its code lets them learn at a tenth of the rate:
optimizer.rates = (('text/.*', 0.1),).
Data: a source with regions (docs/guides/adding_a_data_set.md); scenes have them.
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config
from mmjax.data.scenes import REGION_LABELS


def get_config(arg=None):
    config = train_config()
    config.total_steps = 60_000
    config.batch_size = 512
    config.data.update(text_length=36, regions=True)
    config.data.vocabulary_size = 30_522
    config.masking.conditional = False
    layers = {"dropout": 0.1, "dtype": "bfloat16", "remat": "full"}
    config.model = model_section(
        "vision_language",
        image={"kind": "region_encoder", "width": 768, "depth": 0, "heads": 12, **layers},
        text={"size": "base", "depth": 6, **layers},
        fusion={
            **{"width": 768, "depth": 6, "heads": 12, "order": "cross_first"},
            **{"norm": "post", "epsilon": 1e-12},
            **layers,
        },
        embedding_width=0,
        region_classes=1_601,
    )
    config.objectives.masked_language.weight = 1.0
    config.objectives.pairing.weight = 1.0
    config.objectives.region_distributions.weight = 1.0
    config.optimizer.update(learning_rate=1e-4, b2=0.999, weight_decay=0.01)
    config.optimizer.schedule.update(kind="linear", warmup_steps=6_000)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.model.image.depth = 0
    config.model.region_classes = len(REGION_LABELS)
