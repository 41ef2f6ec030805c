"""Pre-train with a mask of our own.

mae-jax train --config=examples/mask/recipe.py --workdir=DIR --config.data.source=folder:X
"""

from mae_jax.configs.folder import get_config as recipe


def get_config(arg=None):
    config = recipe(arg)
    config.masking = dict(name="mask.masks.gaze", blur=0.5, tokens_in_encoder=False)
    return config
