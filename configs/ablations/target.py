"""Targets, and the patches that count: the paper's Table 1d without its tokenizer.

    mae-jax sweep --config=configs/ablations/target.py --workdir=DIR --dry_run

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: the paper's numbers, which the table repeats; we have not measured them. Loss on all
patches is not in the table; the text says that it costs about half a percent.
"""

from mae_jax.configs.ablations.common import sweep

PAPER = dict(pixels=(84.9, 73.5), norm_pixels=(85.4, 73.9), pca=(84.6, 72.3))


def get_config(arg=None):
    return sweep(arg, rows, PAPER)


def rows(config):
    numbers = config.model.patch_size[0] * config.model.patch_size[1] * config.model.channels
    return dict(
        pixels=dict(target=dict(name="pixels")),
        norm_pixels=dict(target=dict(name="norm_pixels")),
        pca=dict(target=dict(name="pca", components=min(96, numbers // 2))),
        pixels_of_all_patches=dict(target=dict(name="pixels"), task="all_patches"),
    )
