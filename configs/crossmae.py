"""Pre-train with CrossMAE's decoder: it predicts a share of the hidden patches, each by itself.

    mae-jax train --config=configs/crossmae.py:variant=B/16,share=0.25 --workdir=DIR

Hardware and hours: the paper's authors took 6.3 minutes for an epoch of B/16 on two A100 of 80 GB
with share=0.25, and 9.4 for MAE (arXiv 2401.14391v2, as all numbers here).
Expected: the paper's top-1 accuracies in percent, fine-tuned after 800 epochs; we have not
measured them. Its linear probe of B/16 is 65.4 with share=0.25, and 65.1 for MAE. Others found such
a decoder no better than MAE's, and partial prediction worse for frozen features (arXiv 2512.15715).

    variant  MAE   share=0.25  share=0.75
    S/16     78.9  79.2        79.3
    B/16     83.3  83.5        83.7
    L/16     85.4  85.4        85.4
    H/14     85.8  86.3        86.4

Arguments:
    variant, epochs, batch_size, image_size  as in configs/pretrain.py
    share  of all patches, that are predicted; up to 0.75, which is all hidden ones. It sets the
           rate too: with another mask_ratio or model.decoder_share, give optim.blr as well
    maps   before and after encoder blocks, that the decoder reads; 0 = all. Of 1, 3, 6 and 12
           after the 12 blocks of B/16, 6 were the best (82.9, 83.3, 83.5, 83.3)
"""

from mae_jax.configs.common import parse_arg, to_arg
from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    args = parse_arg(
        arg, variant="B/16", epochs=800, batch_size=4096, image_size=224, share=0.25, maps=0
    )
    share, maps = args.pop("share"), args.pop("maps")
    config = recipe(to_arg(args))
    config.task = "crossmae"
    config.model.update(decoder_depth=12, decoder_share=share, decoder_maps=maps)
    # The rate goes with the number of predicted patches.
    config.optim.blr = 1.5e-4 * share / config.mask_ratio
    return config
