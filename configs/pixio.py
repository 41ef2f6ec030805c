"""Pre-train a masked autoencoder as Pixio (arXiv 2512.15715) has it, with the schedule of MAE.

    mae-jax train --config=configs/pixio.py:variant=B/16,epochs=800 --workdir=DIR

Four class tokens go through encoder and decoder, each with a position of its own, and their mean is
the feature. Cells of 2 x 2 patches are hidden as one, and the decoder has 16 blocks.

Hardware and hours: `mae-jax plan` says them. A step of B/16 takes 2.1 times the FLOPs of
configs/pretrain.py, 1.6 times at the same size of images; of L/16 1.7 and 1.3 times.
Expected: no number is known for this recipe. The paper's ViT-H on ImageNet-21k went from 37.9 to
59.5 % k-NN by these three changes together, there with a decoder of 32 blocks.

What differs from the paper: optimizer, learning rate and length are MAE's. The paper's largest
model, of two billion images, has 8 class tokens, cells of 4 x 4 and a decoder of 32 blocks:
--config.model.cls_tokens=8 --config.masking.cell=4 --config.model.decoder_depth=32.

Arguments: as in configs/pretrain.py, with image_size=256; patches of 16 leave whole cells.
"""

from mae_jax.configs.common import parse_arg, to_arg
from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    args = parse_arg(arg, variant="B/16", epochs=800, batch_size=4096, image_size=256)
    config = recipe(to_arg(args))
    config.masking.update(name="granular", cell=2)  # patches along a side of a cell
    config.model.update(cls_tokens=4, decoder_depth=16)
    return config
