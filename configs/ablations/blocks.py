"""What blocks may have beside the paper's, one by one and together as configs/vit5.py has them.

    mae-jax sweep --config=configs/ablations/blocks.py:base=cifar10,data=PATH --workdir=DIR

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: we have measured none of them. For other objectives: registers 79.3 -> 81.4 % of an
attentive probe (arXiv 2502.08769, 16 of them), RMSNorm +0.2 and all of ViT-5 +0.4 % top-1
(arXiv 2602.08071, supervised), rotary positions between none and +2 %.
"""

from mae_jax.configs.ablations.common import sweep
from mae_jax.configs.vit5 import get_config as vit5


def get_config(arg=None):
    block = vit5().model.block.to_dict()
    rows = {name: dict(model=dict(block={name: value})) for name, value in block.items()}
    return sweep(arg, dict(plain={}, **rows, vit5=dict(model=dict(block=block))))
