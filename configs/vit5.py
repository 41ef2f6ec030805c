"""Pre-train a masked autoencoder with the block of ViT-5 (arXiv 2602.08071).

    mae-jax train --config=configs/vit5.py:variant=B/16,epochs=800 --workdir=DIR

Hardware and hours: `mae-jax plan` says them; docs/blocks.md has what the options cost.
Expected: no number is known. ViT-5 reaches 82.2, 84.2 and 84.9 % as S, B and L with supervised
training; nobody has published it as a masked autoencoder.

What differs from ViT-5: q, k and v keep their bias, weights start as MAE's do, positions beside the
rotary ones are the fixed sine-cosine table, and the rotary ones are DINOv3's (arXiv 2508.10104):
coordinates from -1 to 1, so that they fit images of any size; registers are not turned.

Arguments: as in configs/pretrain.py.
"""

from ml_collections import ConfigDict

from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    config = recipe(arg)
    config.model.block = ConfigDict(
        dict(
            registers=4,  # tokens beside the patches, of the encoder; no feature shows them
            qk_norm=True,  # queries and keys of each head are normalised before they meet
            layer_scale=1e-4,  # where the scale of each branch of a block starts; 0 = none
            norm="rms",  # or layer
            rope=100.0,  # base of the frequencies of rotary positions; 0 = none
        )
    )
    return config
