"""Which patches are hidden: the paper's Table 1f, and masks since.

    mae-jax sweep --config=configs/ablations/masks.py --workdir=DIR --dry_run
    mae-jax sweep --config=configs/ablations/masks.py:base=cifar10,data=PATH --workdir=DIR

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: the paper's numbers, which the table repeats. For masks since the paper, arXiv 2512.15715
has 35.3 -> 54.3 % k-NN by cells of 2 (ViT-H), and arXiv 2407.13036 83.17 -> 83.57 % fine-tuned by
green noise (ViT-B): with other data and lengths. docs/switches.md has one epoch of CIFAR-10 for
four of them.
"""

from mae_jax.configs.ablations.common import sweep

PAPER = {
    "random": (84.9, 73.5),
    "block_50": (83.9, 72.3),
    "block_75": (82.8, 63.9),
    "grid_75": (84.0, 66.0),
}


def get_config(arg=None):
    return sweep(arg, rows, PAPER)


def rows(config):
    model = config.model
    grid = [side // p for side, p in zip(model.image_size, model.patch_size, strict=True)]
    cells = {
        f"cells_{cell}": dict(masking=dict(name="granular", cell=cell))
        for cell in (2, 4)
        if not any(side % cell for side in grid)
    }
    return dict(
        random={},
        block_50=dict(masking=dict(name="block"), mask_ratio=0.5),
        block_75=dict(masking=dict(name="block")),
        grid_75=dict(masking=dict(name="grid")),
        **cells,
        green=dict(masking=dict(name="green")),
        inverse_block=dict(masking=dict(name="inverse_block")),
        random_four_masks=dict(data=dict(repeat=4)),
    )
