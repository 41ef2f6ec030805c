"""Mask tokens in the encoder or not: the paper's Table 1c.

    mae-jax sweep --config=configs/ablations/tokens.py --workdir=DIR --dry_run

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: the paper's numbers, which the table repeats; we have not measured them.
"""

from mae_jax.configs.ablations.common import sweep


def get_config(arg=None):
    rows = dict(without={}, with_tokens=dict(masking=dict(tokens_in_encoder=True)))
    return sweep(arg, rows, dict(without=(84.9, 73.5), with_tokens=(84.2, 59.6)))
