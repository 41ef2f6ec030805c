"""Pre-train on images of many bands, in groups that are masked independently of each other.

    mae-jax prepare folder --source=PATH --value_range=0,10000     # prints mean and std, see below
    mae-jax train --config=configs/bands.py:data=PATH,variant=B/16 --workdir=DIR

The groups are for the 12 bands of Sentinel-2's level 2A, in the order B1 to B8, B8A, B9, B11, B12:
10 m with the near infrared (B2, B3, B4, B8), red edge (B5, B6, B7, B8A), short wave (B11, B12), as
SatMAE has them (arXiv 2207.08051), and those of 60 m that it leaves out (B1, B9). For other bands
give --config.model.channels=5 --config.model.channel_groups="((0,1,2),(3,4))".

Hardware and hours: `mae-jax plan` says them. With four groups an image has four times the tokens:
at 96 pixels 144, and 14.6 GFLOPs forward in place of 3.8 without groups (B/16).
Expected: no number is known for this recipe, and we have measured none.

Arguments:
    data        folder of the images, TIFF or .npy; see docs/data.md
    variant, epochs, batch_size  as in configs/pretrain.py
    image_size  pixels

--config.data.mean and --config.data.std want 12 numbers, which `prepare folder` prints.
"""

from mae_jax.configs.common import parse_arg, to_arg
from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    args = parse_arg(arg, data="", variant="B/16", epochs=400, batch_size=1024, image_size=96)
    data = args.pop("data")
    config = recipe(to_arg(args))
    config.task = "channel_groups"
    config.model.channels = 12
    config.model.channel_groups = ((1, 2, 3, 7), (4, 5, 6, 8), (10, 11), (0, 9))
    if data:
        config.data.update(source=f"folder:{data}", split="train[:95%]")
        config.evals.reconstruct.update(split="train[95%:]", images=64, batch_size=32)
    config.data.update(mean=(0.2,) * 12, std=(0.1,) * 12, value_range=(0, 10_000))
    config.evals.reconstruct.bands = (4, 3, 2)
    return config
