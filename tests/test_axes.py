"""The paper's ablations that are no plain key: PCA as a target, loss on all patches, jitter."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from tiny import batch_of, run, tiny_config

from mae_jax import tasks
from mae_jax.data import jitter, settings
from mae_jax.errors import UserError
from mae_jax.models import pca
from mae_jax.models.patchify import patchify


def photographs():
    """Return the patches of two photographs at a quarter of their size, (L, 768), centred."""
    found = []
    for picture in load_sample_images().images:
        small = np.asarray(Image.fromarray(picture).resize((160, 96), Image.Resampling.BICUBIC))
        found.append(np.asarray(patchify(jnp.asarray(small[None] / 127.5 - 1), (8, 8))[0]))
    patches = np.concatenate(found)
    return patches - patches.mean(0)


def test_the_pca_target_holds_nearly_as_much_variance_as_the_best_basis():
    patches = photographs()
    values = np.linalg.eigvalsh(patches.T @ patches)[::-1]
    basis = pca._basis((8, 8), 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(192), atol=1e-12)
    for count in (24, 96):
        held = np.square(patches @ basis[:, :count]).sum() / values.sum()
        assert held > 0.97 * values[:count].sum() / values.sum()
    others = np.square(patches @ basis[:, -24:]).sum() / values.sum()
    assert others < 0.01


def test_the_pca_target_has_the_asked_width_and_loses_nothing_at_full_width():
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    assert pca.pca(images, (8, 8)).shape == (2, 4, 96)
    whole = pca.pca(images, (8, 8), components=192) @ pca._basis((8, 8), 3).T
    np.testing.assert_allclose(whole, patchify(images, (8, 8)), atol=1e-5)
    config = tiny_config()
    config.target = dict(name="pca", components=10)
    assert tasks.build(config).spec.target_dim == 10
    config.target.components = 65
    with pytest.raises(UserError, match="components=65: patches of 8 x 8 pixels of 1 .* have 64"):
        tasks.build(config)


@pytest.mark.parametrize("change", [{"task": "all_patches"}, {"target": dict(name="pca")}])
def test_the_axes_train_and_measure(change, tmp_path):
    config = tiny_config(**change)
    if "target" in change:
        config.target.components = 10
    config.train_for = "2 steps"
    config.evals.reconstruct.update(every="", split="test", images=16, batch_size=16)
    assert int(run(config, tmp_path, (8, 1, 1)).step) == 2


def test_the_loss_on_all_patches_is_their_mean():
    config = tiny_config(task="all_patches")
    task = tasks.build(config)
    params, _ = jax.jit(task.init)(jax.random.key(0))
    batch = task.prepare(batch_of(config), lambda _: jax.random.key(1))
    outputs = jax.jit(task.reconstruct)(params, {}, batch)
    error_BL = jnp.square(outputs["pred_BLT"] - outputs["target_BLT"]).mean(-1)
    assert task.objective(outputs) == pytest.approx(float(error_BL.mean()), rel=1e-6)
    hidden = outputs["mask_BL"] > 0
    assert float(outputs["loss_BL"][hidden].mean()) == pytest.approx(
        float(error_BL.mean()), rel=1e-6
    )
    hidden_only = tasks.build(tiny_config()).objective(outputs)
    assert abs(float(hidden_only) - float(error_BL.mean())) > 1e-3


def picture(channels=3):
    return np.random.default_rng(0).integers(0, 256, (16, 16, channels), np.uint8)


def test_a_jitter_is_the_same_of_the_same_rng_and_keeps_shape_and_type():
    distort = pickle.loads(pickle.dumps(jitter.parse("jitter-b0.4-c0.4-s0.4-h0.1")))
    assert distort == jitter.ColourJitter(0.4, 0.4, 0.4, 0.1)
    for channels in (1, 3):
        draws = [distort(picture(channels), np.random.default_rng(seed)) for seed in (1, 1, 2)]
        assert draws[0].shape == picture(channels).shape
        assert draws[0].dtype == np.uint8
        np.testing.assert_array_equal(draws[0], draws[1])
        assert (draws[0] != draws[2]).any()


def test_each_kind_of_jitter_changes_what_it_is_named_for():
    image = Image.fromarray(picture() // 2 + 30)

    def changed(kind, amount):
        return np.asarray(jitter.shift(image, kind, amount)).astype(float)

    old = np.asarray(image).astype(float)
    np.testing.assert_allclose(changed("brightness", 0.2), old * 1.2, atol=1)
    assert changed("contrast", -0.5).std() == pytest.approx(old.std() / 2, rel=0.02)
    grey = changed("saturation", -1.0)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    turned = changed("hue", 1 / 3)  # red becomes green
    np.testing.assert_allclose(turned, np.roll(old, 1, -1), atol=8)
    np.testing.assert_allclose(changed("hue", 1.0), old, atol=8)


@pytest.mark.parametrize(
    "name", ["jitter", "jitter-x0.4", "jitter-b2", "jitter-h0.6", "jitter-b", "jitter-b0.4-b0.1"]
)
def test_a_jitter_that_is_none_is_refused(name):
    config = tiny_config()
    config.data.augment = name
    with pytest.raises(UserError, match="write jitter-bB-cC-sS-hH"):
        settings.check(config.data)


def test_a_jitter_is_for_images_of_8_bits():
    config = tiny_config()
    config.data.update(augment="jitter-b0.4", value_range=(0, 100))
    with pytest.raises(UserError, match="is for 8-bit images"):
        settings.check(config.data)


@pytest.mark.parametrize("name", ["jitter-b0.4", "rand-m9-mstd0.5-inc1"])
def test_bands_that_cannot_be_augmented_are_refused_before_anything_is_written(name, tmp_path):
    config = tiny_config()
    config.model.channels = 4
    config.data.update(augment=name, mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(UserError, match="1 or 3 channels, and config.model.channels=4: set augm"):
        run(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
