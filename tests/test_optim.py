"""Schedule and decay by role; test_recipes.py has the updates, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from mae_jax import optim, tasks


def test_the_schedule_gives_the_rates_of_a_public_log_of_the_official_code():
    """300 epochs, 15 of warm-up, 312 steps each, peak 2.4e-3 (sunsmarterjie/beyond_masking#1)."""
    schedule = optim.cosine_schedule(optim.peak_lr(1.5e-4, 4096), 300 * 312, 15 * 312)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(300 * 312)), np.float64).reshape(300, 312)
    assert abs(rates[0].mean() / 7.974358974e-05 - 1) < 1e-5
    assert abs(rates[68].mean() / 2.197310728603634e-03 - 1) < 1e-5


def test_the_schedule_starts_at_zero_peaks_after_warm_up_and_ends_at_the_floor():
    schedule = optim.cosine_schedule(1.0, 100, 10, min_lr=0.1)
    assert schedule(0) == 0
    assert schedule(5) == 0.5
    assert schedule(10) == 1
    assert abs(schedule(55) - 0.55) < 1e-6
    assert abs(schedule(100) - 0.1) < 1e-6
    assert optim.cosine_schedule(1.0, 100, 0)(0) == 1


# Role by role: matrices and tokens are decayed in pre-training, the rest is not
DECAYED = {
    "decoder/embed/kernel",
    "decoder/mask_token",
    "decoder/pred/kernel",
    "decoder/stack/blocks/attn/proj/kernel",
    "decoder/stack/blocks/attn/qkv/kernel",
    "decoder/stack/blocks/mlp/fc1/kernel",
    "decoder/stack/blocks/mlp/fc2/kernel",
    "encoder/cls_token",
    "encoder/patch_embed/kernel",
    "encoder/stack/blocks/attn/proj/kernel",
    "encoder/stack/blocks/attn/qkv/kernel",
    "encoder/stack/blocks/mlp/fc1/kernel",
    "encoder/stack/blocks/mlp/fc2/kernel",
}


def test_decay_goes_by_role_over_the_whole_tree():
    params = jax.eval_shape(tasks.build(tiny_config()).init, jax.random.key(0))[0]

    def decayed(*roles):
        leaves = jax.tree_util.tree_leaves_with_path(optim.decay_mask(params, *roles))
        return {optim.path_name(path) for path, is_decayed in leaves if is_decayed}

    assert decayed() == DECAYED
    assert decayed(("matrix",)) == DECAYED - {"encoder/cls_token", "decoder/mask_token"}


def test_a_parameter_without_a_role_raises():
    with pytest.raises(ValueError, match="'adapter/weights' has no role"):
        optim.decay_mask({"adapter": {"weights": jnp.ones(2)}})
