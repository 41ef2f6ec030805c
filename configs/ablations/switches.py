"""Switches for what was found since the paper, one at a time, and where they come together.

    mae-jax sweep --config=ablations/switches:base=cifar10,data=PATH,epochs=4,seeds=3 --workdir=DIR

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: docs/switches.md has one epoch of CIFAR-10 with three seeds, and its command. For other
data and lengths see the files that the rows are from: masks.py, optimizers.py, blocks.py and
crossmae.py, which have more rows of each kind.
"""

from mae_jax.configs.ablations import crossmae, masks, optimizers
from mae_jax.configs.ablations.common import sweep
from mae_jax.configs.vit5 import get_config as vit5


def get_config(arg=None):
    return sweep(arg, rows)


def rows(config):
    mask, optimizer, cross = (x.rows(config) for x in (masks, optimizers, crossmae))
    block = vit5().model.block.to_dict()
    cls_tokens, cells = dict(model=dict(cls_tokens=4)), mask.get("cells_2", {})
    deeper = dict(decoder_depth=2 * config.model.decoder_depth)
    return dict(
        plain={},
        **{name: mask[name] for name in ("cells_2", "green", "inverse_block") if name in mask},
        four_masks=mask["random_four_masks"],
        **{name: optimizer[name] for name in ("muon", "lion", "clipped", "wsd")},
        crossmae=cross["share_25"],
        **{name: dict(model=dict(block={name: value})) for name, value in block.items()},
        cls_tokens_4=cls_tokens,
        vit5=dict(model=dict(block=block)),
        pixio=cells | dict(model=cls_tokens["model"] | deeper),
    )
