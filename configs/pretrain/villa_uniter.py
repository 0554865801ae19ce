"""VILLA (Gan et al. 2020): UNITER-base's pre-training, adversarially.

From the paper (section 3 and algorithm 1; its rows of VILLA-base): perturbations of embedded
words or regions, in turn, and a divergence between clean and perturbed predictions. From its
published configurations, which are those of fine-tuning: three steps of size 1e-3 in the l2 norm,
from 0, without a bound, and a weight of 1.5 for the divergence.
Ours: the same numbers for pre-training, whose code is not public. The model, its objectives and
the rest are uniter_base.py's.

init_from: a UNITER-base's public weights, or 'text' BERT-base's, as there.
Data: a source with regions (docs/guides/adding_a_data_set.md); scenes have them.
"""

from configs.pretrain import uniter_base
from configs.sizes import sized


def get_config(arg=None):
    config = uniter_base.get_config()
    config.adversarial.update(steps=3, modality="alternate", kl_weight=1.5)
    config.adversarial.update(text_step_size=1e-3, image_step_size=1e-3)
    return sized(config, arg, uniter_base.adapt)
