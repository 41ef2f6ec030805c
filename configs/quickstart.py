"""Watch a small masked autoencoder learn from the photographs inside a few Python wheels.

    bash launch/quickstart.sh

Hardware and time: a few minutes on 2 CPU cores; nothing is downloaded but the packages.
Expected: pictures of the images that it fills in. The target is plain pixels, which give better
pictures; normalised pixels, as in configs/pretrain.py, give better features.

Arguments: as in configs/pretrain.py.
"""

from mae_jax.configs.pretrain import get_config as recipe


def get_config(arg=None):
    config = recipe(f"batch_size=64,image_size=96{',' if arg else ''}{arg or ''}")
    config.train_for = "600 steps"
    config.target.name = "pixels"
    config.model.update(
        patch_size=(12, 12), width=192, depth=4, heads=3,
        decoder_width=128, decoder_depth=2, decoder_heads=4, dtype="float32",
    )  # fmt: skip
    config.optim.update(blr=5e-3, warmup="50 steps")
    config.data.update(source="bundled:photos")
    config.evals.reconstruct.update(
        every="150 steps", source="bundled:photos", split="test", images=24, batch_size=24
    )
    config.checkpoint.update(every="100 steps", keep=2, keep_every="")
    config.log_every = "10 steps"
    return config
