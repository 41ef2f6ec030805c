"""Pre-train on the images of a .npy.

mae-jax train --config=examples/source/recipe.py:FILE.npy --workdir=DIR
"""

from mae_jax.configs.folder import get_config as recipe


def get_config(arg="images.npy"):
    config = recipe()
    config.data.source = f"source.arrays.open_arrays:{arg}"
    return config
