"""Networks with more than the paper's: options of blocks, one by one and as vit5; class tokens.

    mae-jax sweep --config=configs/ablations/blocks.py:base=cifar10,data=PATH --workdir=DIR

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: docs/switches.md has one epoch of CIFAR-10. For other objectives: registers 79.3 -> 81.4 %
of an attentive probe (arXiv 2502.08769, 16 of them), RMSNorm +0.2 and all of ViT-5 +0.4 % top-1
(arXiv 2602.08071, supervised), rotary positions between none and +2 %, and four class tokens 63.3
-> 75.1 % k-NN (arXiv 2512.15715, with cells of 2 and a decoder of 32 blocks).
"""

from mae_jax.configs.ablations.common import sweep
from mae_jax.configs.vit5 import get_config as vit5


def get_config(arg=None):
    block = vit5().model.block.to_dict()
    changes = {name: {"block": {name: value}} for name, value in block.items()}
    changes["vit5"] = {"block": block}
    rows = {name: {"model": x} for name, x in changes.items()}
    return sweep(arg, {"plain": {}, "cls_tokens_4": {"model": {"cls_tokens": 4}}, **rows})
