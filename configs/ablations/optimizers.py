"""Optimizers and schedules since the paper, beside its AdamW and cosine.

    mae-jax sweep --config=configs/ablations/optimizers.py:base=cifar10,data=PATH --workdir=DIR

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: docs/switches.md has one epoch of CIFAR-10. arXiv 2605.24770 finds Muon better than AdamW
for MAE. Lion has a third of the rate and three times the decay here, as its paper (arXiv
2302.06675) advises.
"""

from mae_jax.configs.ablations.common import sweep


def get_config(arg=None):
    return sweep(arg, rows)


def rows(config):
    o = config.optim
    lion = dict(name="lion", blr=o.blr / 3, weight_decay=3 * o.weight_decay, b2=0.99)
    return dict(
        adamw={},
        muon=dict(optim=dict(name="muon")),
        lion=dict(optim=lion),
        clipped=dict(optim=dict(clip_norm=1.0)),
        wsd=dict(optim=dict(schedule="wsd")),
    )
