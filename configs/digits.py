"""A small masked autoencoder on scikit-learn's 1,797 handwritten digits, for comparisons.

    mae-jax train --config=configs/digits.py --workdir=DIR

Arguments: mask_ratio, steps, seed. Needs scikit-learn (the extra `quickstart`) and no download.
Made for 2 CPU cores, and nothing of it was tuned. Digits are not mirrored, and little of them is
cut away. What was learned is then measured by

    mae-jax train --config=configs/knn.py:init=DIR,source=bundled:digits,test=test --workdir=DIR_knn
"""

from configs.common import parse_arg
from configs.pretrain import get_config as recipe


def get_config(arg=None):
    args = parse_arg(arg, mask_ratio=0.75, steps=1000, seed=0)
    config = recipe("batch_size=128,image_size=16")
    config.seed = args["seed"]
    config.train_for = f"{args['steps']} steps"
    config.mask_ratio = args["mask_ratio"]
    config.model.update(
        patch_size=(2, 2), channels=1, width=64, depth=4, heads=4,
        decoder_width=32, decoder_depth=2, decoder_heads=4, dtype="float32",
    )  # fmt: skip
    config.optim.update(blr=4e-3, warmup=f"{args['steps'] // 20} steps")
    config.target.name = "pixels"
    config.data.update(
        source="bundled:digits", mean=(0.5,), std=(0.5,), crop_scale=(0.6, 1.0), flip=0.0
    )
    config.evals.reconstruct.update(every="", split="test", images=64, batch_size=64)
    config.checkpoint.update(every="500 steps", keep_every="")
    config.log_every = "50 steps"
    return config
