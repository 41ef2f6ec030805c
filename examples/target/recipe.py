"""Pre-train on histograms of gradients.

mae-jax train --config=examples/target/recipe.py --workdir=DIR --config.data.source=folder:X
"""

from mae_jax.configs.folder import get_config as recipe


def get_config(arg=None):
    config = recipe(arg)
    config.target.update(name="target.hog.hog", bins=9)
    return config
