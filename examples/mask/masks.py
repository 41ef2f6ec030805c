"""A mask that looks like a gaze: what is kept lies around one random place of each image."""

import jax
import jax.numpy as jnp


def gaze(rng, batch, grid, ratio, *, blur=1.0):
    """Return the distance of every patch (B, L) to its image's own centre, in patches, plus noise.

    The lowest scores are kept, `1 - ratio` of them. `blur` is config.masking.blur.
    """
    centre_rng, noise_rng = jax.random.split(rng)
    centre_B2 = jax.random.uniform(centre_rng, (batch, 2)) * jnp.array(grid)
    rows_L, cols_L = (x.reshape(-1) + 0.5 for x in jnp.indices(grid))
    distance_BL = jnp.hypot(rows_L - centre_B2[:, :1], cols_L - centre_B2[:, 1:])
    return distance_BL + blur * jax.random.normal(noise_rng, distance_BL.shape)
