"""Pre-train with a decoder of our own.

mae-jax train --config=examples/decoder/recipe.py --workdir=DIR --config.data.source=folder:X
"""

from mae_jax.configs.folder import get_config as recipe


def get_config(arg=None):
    config = recipe(arg)
    config.model.update(decoder="decoder.convolutions", decoder_depth=6, decoder_heads=16)
    return config
