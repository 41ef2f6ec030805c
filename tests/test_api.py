"""The commands as functions: the same defaults, the same errors, and a model in return."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mae_jax
from mae_jax import api
from mae_jax.commands import running
from mae_jax.data import crops
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


WEIGHTS = Path(__file__).parent / "data/hf_vitmae_tiny"


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_embed_writes_what_the_command_writes_and_returns_it(suffix, tmp_path):
    """Features of the model itself, and a row of NaN for the image that cannot be read."""
    model, params = mae_jax.load(WEIGHTS)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *model.spec.image_size, 3), np.uint8)
    for i, class_name in enumerate(["cat", "cat", "dog"]):
        path = tmp_path / "photos" / class_name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(path)
    (tmp_path / "photos/cat/1.png").write_text("no image")

    out = tmp_path / f"features{suffix}"
    written = mae_jax.embed(WEIGHTS, tmp_path / "photos", out, feature="patches", layer=1)
    assert out.exists()
    assert written["name"].tolist() == ["cat/0.png", "cat/1.png", "dog/2.png"]
    assert written["label"].tolist() == [0, 0, 1]
    assert [bool(error) for error in written["error"]] == [False, True, False]
    assert np.isnan(written["features"][1]).all()
    seen = np.stack([crops.center(pixels[i], model.spec.image_size) for i in (0, 2)])
    patches = model.encode(params, seen, layer=1)[:, 1:]
    np.testing.assert_allclose(written["features"][[0, 2]], patches, rtol=0, atol=1e-5)

    again = mae_jax.embed(WEIGHTS, tmp_path / "photos", out, feature="patches", layer=1)
    np.testing.assert_array_equal(again["features"], written["features"])


def test_embed_takes_files_and_options_as_python_has_them(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        Image.fromarray(np.full((50, 60, 3), 7, np.uint8)).save(path)
    options = dict(mean=(0.5, 0.5, 0.5), std=(0.2, 0.3, 0.4), image_size=(64, 32), key=None)
    written = mae_jax.embed(WEIGHTS, paths, tmp_path / "x.npy", **options)
    assert written["name"].tolist() == [str(path) for path in paths]
    assert written["label"].tolist() == [-1, -1]
    with pytest.raises(UserError, match="fetaure"):
        mae_jax.embed(WEIGHTS, paths, tmp_path / "y.npy", fetaure="cls")
    assert not (tmp_path / "y.npy").exists()


def test_a_mistake_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no such key"):
        mae_jax.pretrain("bundled:photos", str(tmp_path / "run"), config={"mask_ratoi": 0.5})
    with pytest.raises(UserError, match="variant 'Q/16'"):
        mae_jax.pretrain("bundled:photos", str(tmp_path / "run"), variant="Q/16")
    with pytest.raises(UserError, match="steps=0: give a whole number from 1"):
        mae_jax.pretrain("bundled:photos", str(tmp_path / "run"), steps=0)
    with pytest.raises(UserError, match="write it as 'data.workers': 0"):
        mae_jax.pretrain("bundled:photos", str(tmp_path / "run"), config={"data": {"workers": 0}})
    twice = {"train_for": "3 steps", "data.source": "x"}
    with pytest.raises(UserError, match=r"\['data.source', 'train_for'\], which other arguments"):
        mae_jax.pretrain("bundled:photos", str(tmp_path / "run"), steps=3, config=twice)
    assert not list(tmp_path.iterdir())


def test_values_may_be_numbers_of_numpy(monkeypatch):
    recipes = []
    monkeypatch.setattr(running, "run", lambda config, out: recipes.append(config))
    monkeypatch.setattr(api, "load", lambda out: None)
    mean = tuple(np.array([0.4, 0.5, 0.6]))
    mae_jax.pretrain("bundled:photos", "x", config={"data.mean": mean, "data.std": np.ones(3)})
    assert (recipes[0].data.mean, recipes[0].data.std) == ((0.4, 0.5, 0.6), (1.0, 1.0, 1.0))


def test_a_script_is_not_run_again_by_the_processes_that_read(tmp_path):
    for i in range(9):
        Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    script = tmp_path / "script.py"
    script.write_text(
        "import mae_jax\nprint('begun')\n"
        f"mae_jax.embed({str(WEIGHTS)!r}, {str(tmp_path)!r}, 'x.npy', workers=2, batch_size=4)\n"
    )
    found = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("begun") == 1 and (tmp_path / "x.npy").exists()
