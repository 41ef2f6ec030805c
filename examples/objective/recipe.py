"""Pre-train with an error of our own.

mae-jax train --config=examples/objective/recipe.py --workdir=DIR --config.data.source=folder:X
"""

from mae_jax.configs.folder import get_config as recipe


def get_config(arg=None):
    config = recipe(arg)
    config.task = "objective.huber"
    config.huber = dict(delta=1.0)  # a group of our own: --config.huber.delta=0.5
    return config
