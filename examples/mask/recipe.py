"""Pre-train with a mask of our own.

mae-jax train --config=examples/mask/recipe.py --workdir=DIR --config.data.source=folder:X
"""

from mae_jax.configs.folder import get_config as recipe


def get_config(arg=None):
    config = recipe(arg)
    config.masking.update(name="mask.masks.gaze", blur=0.5)
    return config
