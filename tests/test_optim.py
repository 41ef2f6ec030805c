"""Schedule, decay by role, and one update, against direct renderings in numpy."""

import math

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


def tiny_params():
    task = tasks.build(tiny_config())
    return task.init(jax.random.key(0))[0]


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
    leaves = jax.tree_util.tree_leaves_with_path(optim.decay_mask(tiny_params()))
    names = {optim.path_name(path): decayed for path, decayed in leaves}
    assert {name for name, decayed in names.items() if decayed} == DECAYED
    matrices = jax.tree_util.tree_leaves_with_path(optim.decay_mask(tiny_params(), ("matrix",)))
    left = {optim.path_name(path) for path, decayed in matrices if decayed}
    assert left == DECAYED - {"encoder/cls_token", "decoder/mask_token"}


def test_a_parameter_without_a_role_raises():
    with pytest.raises(ValueError, match="'adapter/weights' has no role"):
        optim.decay_mask({"adapter": {"weights": jnp.ones(2)}})


def test_updates_are_those_of_adamw_written_out():
    rng = np.random.default_rng(0)
    shapes = {"fc1": {"kernel": (3, 2), "bias": (2,)}, "cls_token": (1, 1, 2)}
    params = jax.tree.map(
        lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    schedule = optim.cosine_schedule(0.1, 10, 2)
    tx = optim.adamw(schedule)
    ours = jax.tree.map(jnp.asarray, params)
    state = tx.init(ours)
    m = v = jax.tree.map(np.zeros_like, params)
    for step in range(4):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
        updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        lr = 0.1 * step / 2 if step < 2 else 0.05 * (1 + math.cos(math.pi * (step - 2) / 8))
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)
        decay = {"fc1": {"kernel": 0.05, "bias": 0.0}, "cls_token": 0.05}

        def written_out(p, m, v, decay, lr=lr, t=step + 1):
            p = p * (1 - lr * decay)
            return p - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)

        params = jax.tree.map(written_out, params, m, v, decay)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
