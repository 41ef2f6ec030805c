"""The commands as functions: the same defaults, the same errors, and a model in return."""

import numpy as np
import pytest
from PIL import Image

import mae_jax
from mae_jax.errors import UserError

TINY = {
    "model.image_size": (16, 16), "model.patch_size": (4, 4), "model.width": 16, "model.depth": 1,
    "model.heads": 2, "model.decoder_width": 16, "model.decoder_depth": 1, "model.decoder_heads": 2,
    "batch_size": 8, "optim.warmup": "1 steps", "evals.reconstruct.batch_size": 8,
}  # fmt: skip


def test_pretrain_trains_on_a_folder_resumes_and_returns_the_model(tmp_path):
    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    photos.mkdir()
    for i in range(40):
        pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    out = str(tmp_path / "run")
    model, params = mae_jax.pretrain(str(photos), out, steps=2, config=TINY)
    latent = model.encode(params, np.zeros((1, 16, 16, 3), np.uint8))
    assert latent.shape == (1, 17, 16)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["2"]
    again = mae_jax.pretrain(str(photos), out, steps=2, config=TINY)[1]
    np.testing.assert_array_equal(again["encoder"]["cls_token"], params["encoder"]["cls_token"])


def test_a_mistake_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no such key"):
        mae_jax.pretrain("bundled:photos", str(tmp_path / "run"), config={"mask_ratoi": 0.5})
    with pytest.raises(UserError, match="variant 'Q/16'"):
        mae_jax.pretrain("bundled:photos", str(tmp_path / "run"), variant="Q/16")
    assert not list(tmp_path.iterdir())
