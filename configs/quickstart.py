"""Watch a small masked autoencoder learn from the photographs inside a few Python wheels.

    bash launch/quickstart.sh

The script starts it from weights/cifar10-s-pixels, trained on 50,000 photographs of 32 x 32 pixels;
patches of 4 x 4 pixels become 12 x 12. From the few photographs in the wheels alone it learns less
than linear interpolation knows.

Hardware and time: a few minutes on 2 CPU cores; nothing is downloaded but the packages.
Expected: pictures of the images that it fills in. The target is plain pixels, which give better
pictures; normalised pixels, as in configs/pretrain.py, give better features.

Arguments:
    batch_size  images of one update
    image_size  height and width in pixels
"""

from mae_jax.configs.common import parse_arg, to_arg
from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    config = recipe(to_arg(parse_arg(arg, batch_size=64, image_size=96)))
    config.train_for = "200 steps"
    config.target.name = "pixels"
    config.model.update(
        patch_size=(12, 12), width=128, depth=6, heads=4,
        decoder_width=64, decoder_depth=2, decoder_heads=2, dtype="float32",
    )  # fmt: skip
    config.optim.update(blr=1e-3, warmup="20 steps")
    config.data.update(
        source="bundled:photos",
        mean=(0.492, 0.483, 0.447), std=(0.245, 0.243, 0.261),  # as the weights have them
    )  # fmt: skip
    config.evals.reconstruct.update(
        every="50 steps", source="bundled:photos", split="test", images=24, batch_size=24
    )
    config.checkpoint.update(every="100 steps", keep=2, keep_every="")
    config.log_every = "10 steps"
    return config
