"""Precision of the matrix products and of the tokens between blocks.

    mae-jax sweep --config=configs/ablations/precision.py:base=cifar10,data=PATH --workdir=DIR

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: on CIFAR-10 for one epoch, the same last losses to 0.0012 and features within the spread
of three seeds (docs/switches.md); float32_sums, which only several devices have, was not run.
Parameters, their update, LayerNorm, the softmax and the loss are in float32 in every row.
"""

from mae_jax.configs.ablations.common import sweep

ROWS = {
    "float32": dict(model=dict(dtype="float32")),
    "bfloat16": dict(model=dict(dtype="bfloat16")),  # as in the published recipe
    "float32_sums": dict(model=dict(dtype="bfloat16", float32_sums=True)),
    "bfloat16_residual": dict(model=dict(dtype="bfloat16", residual_dtype="bfloat16")),
}


def get_config(arg=None):
    return sweep(arg, ROWS)
