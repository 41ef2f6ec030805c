"""Pre-train on your own images, without labels, on one machine.

    mae-jax train --config=configs/folder.py --config.data.source=folder:PATH --workdir=DIR

Hardware: a ViT-S/16 at 224 pixels with a decoder of 4 blocks fits a GPU with 8 GB.
Expected: no number is known. Nothing was tuned; with few images, train longer.

Arguments:
    variant, epochs, batch_size, image_size  as in configs/pretrain.py
"""

from mae_jax.configs.common import parse_arg, to_arg
from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    args = parse_arg(arg, variant="S/16", epochs=800, batch_size=64, image_size=224)
    config = recipe(to_arg(args))
    config.model.update(decoder_width=256, decoder_depth=4, decoder_heads=8)
    config.data.update(source="folder:", split="train[:95%]")
    config.evals.reconstruct.update(
        every="1000 steps", source="", split="train[95%:]", images=64, batch_size=32
    )
    config.checkpoint.update(every="1000 steps", keep_every="")
    return config
