"""Linear and attentive probes: the head by hand, the encoder untouched, a whole run."""

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models import probe


def features(rows=24, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) * 3 + 2).astype(np.float32)


# --- the heads ---


def test_batch_norm_in_training_uses_the_statistics_of_each_group():
    x = features()
    got, _ = probe.batch_norm(jnp.asarray(x), probe.initial_stats(8), 6, train=True)
    for rows, normalised in zip(x.reshape(4, 6, 8), got.reshape(4, 6, 8), strict=True):
        expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-6)
        np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-5)
    whole, _ = probe.batch_norm(jnp.asarray(x), probe.initial_stats(8), 24, train=True)
    assert np.max(np.abs(whole - got)) > 0.1


def test_running_statistics_follow_the_first_group_with_the_unbiased_variance():
    stats = probe.initial_stats(8)
    mean, var = np.zeros(8), np.ones(8)
    for seed in range(3):
        x = features(seed=seed)
        _, stats = probe.batch_norm(jnp.asarray(x), stats, 6, train=True)
        mean = 0.9 * mean + 0.1 * x[:6].mean(0)
        var = 0.9 * var + 0.1 * x[:6].var(0, ddof=1)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)
    x = features(seed=9)
    got, after = probe.batch_norm(jnp.asarray(x), stats, 6, train=False)
    np.testing.assert_allclose(got, (x - mean) / np.sqrt(var + 1e-6), rtol=1e-4, atol=1e-5)
    assert after is stats


def test_the_linear_head_starts_with_deviation_001_and_all_heads_alike():
    params = probe.init_heads(
        probe.LinearHead(100), jax.random.key(0), jnp.zeros((1, 400)), count=3
    )
    kernel = np.asarray(params["head"]["kernel"])
    assert kernel.shape == (3, 400, 100)
    assert abs(kernel.std() - 0.01) < 1e-4
    np.testing.assert_array_equal(kernel[0], kernel[2])
    assert not np.any(params["head"]["bias"])


def test_the_attentive_head_is_softmax_pooling_written_out():
    head, x = probe.AttentiveHead(5, heads=2), features(2 * 7).reshape(2, 7, 8)
    params = probe.init_heads(head, jax.random.key(1), jnp.asarray(x), count=1)
    got = probe.apply_heads(head, params, jnp.asarray(x))[:, 0]
    p = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params)
    key_value = np.einsum("bld,dcsf->blcsf", x, p["kv"]["kernel"]) + p["kv"]["bias"]
    score = np.einsum("sf,blsf->bsl", p["query_token"][0], key_value[:, :, 0]) / np.sqrt(4)
    weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    pooled = np.einsum("bsl,blsf->bsf", weight, key_value[:, :, 1]).reshape(2, 8)
    normed = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(
        pooled.var(-1, keepdims=True) + 1e-6
    )
    linear = p["linear"]["head"]
    np.testing.assert_allclose(got, normed @ linear["kernel"] + linear["bias"], atol=1e-5)
