"""What `mae-jax prepare folder` prints: a command that works as it stands."""

import shlex

import numpy as np
import pytest
from PIL import Image
from tiny import noise

from mae_jax.commands import prepare, recipes, running
from mae_jax.data.sources import open_source
from mae_jax.errors import UserError


def next_config(capsys):
    """Return the config of the command that was printed."""
    words = shlex.split(capsys.readouterr().out.partition("Next: mae-jax train ")[2])
    return recipes.parse(words, running.define, "train")[0]


def folder(path, **splits):
    """Write images in folders of splits: pixels, or None for a file that is no image."""
    for split, images in splits.items():
        (path / split).mkdir(parents=True)
        for i, image in enumerate(images):
            if image is None:
                (path / split / f"{i}.png").write_bytes(b"none")
            else:
                Image.fromarray(image).save(path / split / f"{i}.png")
    return path


PICTURES = [noise(8, 8, seed=i) for i in range(24)]


@pytest.mark.parametrize(
    "splits",
    [
        dict(val=PICTURES, test=PICTURES),
        dict(train=PICTURES, val=[None]),
        dict(train=PICTURES, test=PICTURES),
        dict(train=PICTURES),
    ],
    ids=lambda splits: "_".join(splits),
)
def test_the_next_command_names_splits_that_hold_images(splits, tmp_path, capsys):
    source, data_dir = folder(tmp_path / "my images", **splits), tmp_path / "data sets"
    argv = ["folder", f"--source={source}", "--name=mine", f"--data_dir={data_dir}"]
    assert prepare.main([*argv, "--workers=1"]) == 0
    config = next_config(capsys)
    data, evaluation = config.data, config.evals.reconstruct
    trained, measured = (
        open_source(data.source, split, data.data_dir) for split in (data.split, evaluation.split)
    )
    assert len(trained) and len(measured) and data.data_dir == str(data_dir)
    assert not set(trained.ranges) & set(measured.ranges)


def test_statistics_keep_four_digits_and_a_constant_band_has_a_deviation(tmp_path, capsys):
    source, rng = tmp_path / "with space", np.random.default_rng(0)
    source.mkdir()
    for i in range(3):
        bands = np.stack([rng.integers(0, 24, (8, 8)), np.full((8, 8), 7)], -1)
        np.save(source / f"{i}.npy", bands.astype(np.uint16))
    assert prepare.main(["folder", f"--source={source}", "--value_range=0,10000000"]) == 0
    data = next_config(capsys).data
    assert data.source == f"folder:{source}"
    assert 1e-7 < data.std[0] < 1e-6 and data.std[1] == 1.0
    assert data.mean[1] == pytest.approx(7e-7, rel=1e-3)


@pytest.mark.parametrize("values", ["0,inf", "nan,5", "-inf,0", "5,0", "1", "0,1,2"])
def test_a_range_that_is_none_is_refused_before_anything_is_read(values, tmp_path):
    with pytest.raises(UserError, match="--value_range=LOW,HIGH goes with"):
        prepare.main(["folder", f"--source={tmp_path / 'nowhere'}", f"--value_range={values}"])


def test_a_measurement_that_is_stopped_promises_nothing(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_measure_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(["folder", f"--source={tmp_path}", "--value_range=0,1"])
    assert "goes on where it stopped" not in capsys.readouterr().err
