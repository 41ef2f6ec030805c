"""Crops and colours of the images that are trained on: the paper's Table 1e.

    mae-jax sweep --config=configs/ablations/augmentation.py --workdir=DIR --dry_run

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: the paper's numbers, which the table repeats; we have not measured them. The paper gives
no strengths of its colour jitter: those here are ours.
"""

from mae_jax.configs.ablations.common import sweep

PAPER = dict(
    none=(84.0, 65.7),
    fixed_crop=(84.7, 73.1),
    random_crop=(84.9, 73.5),
    random_crop_and_jitter=(84.3, 71.9),
)


def get_config(arg=None):
    crop = dict(crop="random_resized", flip=0.5)
    rows = dict(
        none=dict(data=dict(crop="center", flip=0.0)),
        fixed_crop=dict(data=dict(crop="fixed", flip=0.5)),
        random_crop=dict(data=crop),
        random_crop_and_jitter=dict(data=crop | dict(augment="jitter-b0.4-c0.4-s0.4-h0.1")),
    )
    return sweep(arg, rows, PAPER)
