"""Pre-train a masked autoencoder on CIFAR-10: a published protocol for a GPU, a small one for CPUs.

    mae-jax train --config=configs/cifar10.py:data=PATH --workdir=DIR
    mae-jax train --config=configs/cifar10.py:data=PATH,small=true --workdir=DIR

PATH holds train/CLASS/*.jpg and test/CLASS/*.jpg. Without data=, tfds's cifar10 is read.

Hardware and time: ViT-Ti/2 for 150 epochs, under 10 minutes of one H100 (not yet run). The small
model for 40 epochs, about an hour of 2 CPU cores.
Expected: for ViT-Ti/2 a course repository publishes a loss of .0401 (pixels in [-1, 1], no norm per
patch), a linear probe of 53.1 %, and 82.2 % fine-tuned. The small model's numbers are our own.

Arguments:
    data        folder of the images; '' = tfds's cifar10
    small       true: width 128, 6 blocks, patch 4, a decoder of 64 x 2; in float32, for CPUs
    epochs      0 = 150, or 40 for the small model
    mask_ratio
    seed
"""

from mae_jax.configs.common import parse_arg
from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    args = parse_arg(arg, data="", small=False, epochs=0, mask_ratio=0.75, seed=0)
    small = args["small"]
    epochs = args["epochs"] or (40 if small else 150)
    batch_size = 256 if small else 512
    config = recipe(f"variant=Ti/2,image_size=32,epochs={epochs},batch_size={batch_size}")
    config.seed = args["seed"]
    config.mask_ratio = args["mask_ratio"]
    config.data.update(mean=(0.492, 0.483, 0.447), std=(0.245, 0.243, 0.261))
    if small:
        config.model.update(
            width=128, depth=6, heads=4, patch_size=(4, 4), dtype="float32",
            decoder_width=64, decoder_depth=2, decoder_heads=2,
        )  # fmt: skip
        config.optim.blr = 1e-3
    else:  # as published: pixels in [-1, 1] as they are, nothing cropped or mirrored
        config.target.name = "pixels"
        config.model.update(decoder_width=192, decoder_depth=4, decoder_heads=3)
        config.data.update(mean=(0.5,) * 3, std=(0.5,) * 3, crop="center", flip=0.0)
    config.optim.warmup = f"{max(1, epochs // 10)} epochs"
    train, test = "cifar10", "cifar10"
    if args["data"]:
        train, test = f"folder:{args['data']}/train", f"folder:{args['data']}/test"
    config.data.source = train
    config.evals.reconstruct.update(
        # A slice of a folder shows every class; its first images are all of one.
        source=test,
        split="train[:5%]" if args["data"] else "test[:5%]",
        images=500,
        batch_size=100,
    )
    config.evals.reconstruct.every = "25 epochs"
    config.checkpoint.update(every="25 epochs" if not small else "2 epochs", keep_every="")
    config.log_every = "100 steps"
    return config
