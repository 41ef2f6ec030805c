"""CrossMAE's decoder beside MAE's: its share of predicted patches, and the blocks that it reads.

    mae-jax sweep --config=configs/ablations/crossmae.py:base=cifar10,data=PATH --workdir=DIR

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: docs/switches.md has one epoch of CIFAR-10. With B/16 for 800 epochs arXiv 2401.14391 has
83.3 % fine-tuned for MAE, 83.5 with a quarter of the patches and 83.7 with all hidden ones. Its
decoder has half as many blocks again, and the rate goes with the share.
"""

from mae_jax.configs.ablations.common import sweep


def get_config(arg=None):
    return sweep(arg, rows)


def rows(config):
    depth = round(1.5 * config.model.decoder_depth)

    def row(share, maps=0):
        model = dict(decoder_depth=depth, decoder_share=share, decoder_maps=maps)
        rate = config.optim.blr * share / config.mask_ratio
        return dict(task="crossmae", model=model, optim=dict(blr=rate))

    return dict(mae={}, share_75=row(0.75), share_25=row(0.25), share_25_last_block=row(0.25, 1))
