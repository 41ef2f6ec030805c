"""Pre-train, and measure the rank of the features.

mae-jax train --config=examples/evaluator/recipe.py --workdir=DIR --config.data.source=folder:X
"""

from mae_jax.configs.folder import get_config as recipe


def get_config(arg=None):
    config = recipe(arg)
    config.evals.rank = dict(
        type="evaluator.rank",
        every="1000 steps",
        source="",
        split="train[95%:]",
        feature="mean",
        batch_size=64,
    )
    return config
