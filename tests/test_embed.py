"""Features of one's own images: the model's, in order, the same after any interruption."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

import mae_jax
from mae_jax.commands import embed, feature_file
from mae_jax.data import crops, sources
from mae_jax.data.decode import decode
from mae_jax.errors import UserError

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights/cifar10-s"
MODEL, PARAMS = mae_jax.load(WEIGHTS)
SIZE = MODEL.spec.image_size


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten images in two classes, of which one is broken and one cut short."""
    rng = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "images" / ("cat", "dog")[i // 5] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36 + i, 3), np.uint8)).save(path)
    (tmp_path / "images/cat/3.png").write_text("no image")
    short = (tmp_path / "images/dog/7.png").read_bytes()[:200]
    (tmp_path / "images/dog/7.png").write_bytes(short)
    return tmp_path / "images"


BAD = ["cat/3.png", "dog/7.png"]


def run(out: Path, *arguments) -> dict[str, np.ndarray]:
    """Embed, and return the columns of a .npy."""
    assert embed.main([str(WEIGHTS), *map(str, arguments), f"--out={out}"]) == 0
    return columns(out) if out.suffix == ".npy" and out.exists() else {}


def columns(out: Path) -> dict[str, np.ndarray]:
    with open(f"{out}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = {name: np.array([row[name] for row in rows]) for name in ("name", "label", "error")}
    return texts | {"features": np.load(out)}


def assert_same(a: dict, b: dict, atol: float = 0) -> None:
    np.testing.assert_allclose(a.pop("features"), b["features"], rtol=0, atol=atol)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


def pictures(folder: Path, names: list[str]) -> np.ndarray:
    read = (decode((folder / name).read_bytes()) for name in names)
    return np.stack([crops.center(picture, SIZE) for picture in read])


def test_a_row_for_each_image_in_order_and_nothing_for_bad_ones(folder, tmp_path, capsys):
    found = run(tmp_path / "a.npy", folder, "--batch_size=4")
    names = [f"{'cat' if i < 5 else 'dog'}/{i}.png" for i in range(10)]
    assert found["name"].tolist() == names
    assert found["label"].tolist() == ["0"] * 5 + ["1"] * 5
    bad = np.isin(names, BAD)
    assert np.isnan(found["features"][bad]).all() and not np.isnan(found["features"][~bad]).any()
    np.testing.assert_array_equal(found["error"] != "", bad)
    good = [name for name in names if name not in BAD]
    tokens = MODEL.encode(PARAMS, pictures(folder, good))
    np.testing.assert_allclose(found["features"][~bad], tokens[:, 0], atol=1e-5)
    printed = capsys.readouterr().out
    assert "2 could not be read" in printed and all(name in printed for name in BAD)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a.npy", "a.npy.csv", "a.npy.json", "images"]


@pytest.mark.parametrize(
    ("feature", "layer"),
    [("mean", None), ("patches", None), ("tokens", 1), ("cls", 2)],
)
def test_features_and_layers_are_those_of_the_model(feature, layer, folder, tmp_path):
    for name in BAD:
        (folder / name).unlink()
    flag = [] if layer is None else [f"--layer={layer}"]
    found = run(tmp_path / "a.npy", folder, f"--feature={feature}", *flag)
    images = pictures(folder, found["name"].tolist())
    tokens = MODEL.encode(PARAMS, images)
    if layer is not None:
        tokens = MODEL.blocks(PARAMS, images)[0][layer]
    wanted = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "patches": tokens[:, 1:]}
    np.testing.assert_allclose(found["features"], wanted.get(feature, tokens), atol=1e-5)


def test_the_batch_size_changes_nothing(folder, tmp_path):
    first, *others = (run(tmp_path / f"{n}.npy", folder, f"--batch_size={n}") for n in (3, 8, 40))
    for other in others:
        assert_same(other, first, atol=1e-6)


@pytest.mark.parametrize("feature", ["cls", "patches"])
def test_parquet_holds_what_npy_and_csv_hold(feature, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, "GROUP_BYTES", 1)  # a group for each row
    wanted = run(tmp_path / "a.npy", folder, f"--feature={feature}")
    run(tmp_path / "b.parquet", folder, f"--feature={feature}")
    table = parquet.read_table(tmp_path / "b.parquet").to_pydict()
    assert table["name"] == wanted["name"].tolist()
    assert table["label"] == wanted["label"].astype(int).tolist()
    assert table["error"] == [error or None for error in wanted["error"].tolist()]
    for row, features in zip(table["features"], wanted["features"], strict=True):
        if row is None:
            assert np.isnan(features).all()
        else:
            np.testing.assert_array_equal(np.array(row, np.float32), features)
    assert sum(row is None for row in table["features"]) == 2
    assert {path.name for path in tmp_path.glob("b*")} == {"b.parquet", "b.parquet.json"}


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_killed_it_goes_on_where_it_stopped_with_the_same_bytes(suffix, tmp_path, capsys):
    arguments = ["bundled:digits", "--batch_size=8"]
    out, whole = tmp_path / f"killed{suffix}", tmp_path / f"whole{suffix}"
    process = subprocess.Popen(
        [sys.executable, "-m", "mae_jax", "embed", WEIGHTS, *arguments, f"--out={out}"],
        cwd=ROOT,
        env=os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        stdout=subprocess.DEVNULL,
    )
    rows = Path(f"{out}.csv")
    while process.poll() is None and not (rows.exists() and rows.stat().st_size > 2000):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    run(out, *arguments)
    assert "were done before: going on" in capsys.readouterr().out
    run(whole, *arguments)
    for name in ("", ".csv") if suffix == ".npy" else ("",):
        assert Path(f"{out}{name}").read_bytes() == Path(f"{whole}{name}").read_bytes()
    assert not Path(f"{out}.part").exists()


def interrupt(out: Path, *arguments) -> None:
    """Embed all images, and stop before the output is made of them."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feature_file, "finish", Mock(side_effect=KeyboardInterrupt))
        run(out, *arguments)
    assert not out.exists() and len(np.load(f"{out}.part")) == 10


def test_names_may_hold_anything_also_after_an_interruption(folder, tmp_path):
    for old, new in (("cat/0", "cat/a\r"), ("cat/1", 'cat/b",\n'), ("cat/2", "cat/\r\nc")):
        (folder / f"{old}.png").rename(folder / f"{new}.png")
    out = tmp_path / "a.npy"
    interrupt(out, folder, "--batch_size=4")
    found, whole = (run(out, folder, "--batch_size=4"), run(tmp_path / "b.npy", folder))
    assert {"cat/a\r.png", 'cat/b",\n.png', "cat/\r\nc.png"} < set(found["name"])
    assert_same(found, whole, atol=1e-6)
    assert feature_file.read(out)["name"].tolist() == whole["name"].tolist()


@pytest.mark.parametrize("cut", [8, 1, 0])
def test_rows_cut_short_by_a_crash_are_written_again(cut, folder, tmp_path, capsys):
    out = tmp_path / "a.npy"
    interrupt(out, folder, "--batch_size=8")
    features, text = np.load(f"{out}.part", mmap_mode="r+"), Path(f"{out}.csv").read_bytes()
    features[8:] = 0
    features.flush()
    Path(f"{out}.csv").write_bytes(text[: len(text) - cut])
    found = run(out, folder, "--batch_size=8")
    assert "8 of 10 images were done before: going on" in capsys.readouterr().out
    assert_same(found, run(tmp_path / "b.npy", folder, "--batch_size=8"))


def with_an_option(folder):
    return [folder, "--feature=mean"]


def with_an_image_replaced(folder):
    shutil.copy(folder / "dog/9.png", folder / "cat/0.png")
    return [folder]


def with_an_image_newer(folder):
    """Of the same length, and as old to the second."""
    status = os.stat(folder / "cat/0.png")
    os.utime(folder / "cat/0.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    return [folder]


def with_a_copy(folder):
    return [shutil.copytree(folder, folder.parent / "other")]


CHANGES = [with_an_option, with_an_image_replaced, with_an_image_newer, with_a_copy]


@pytest.mark.parametrize("change", CHANGES)
def test_an_interruption_of_other_inputs_starts_again(change, folder, tmp_path, capsys):
    out = tmp_path / "a.npy"
    interrupt(out, folder)
    arguments = change(folder)
    found = run(out, *arguments)
    assert "changed since the interruption: starting again" in capsys.readouterr().out
    assert_same(run(tmp_path / "b.npy", *arguments), found)


def test_what_is_complete_is_not_done_again_and_kept_from_other_inputs(folder, tmp_path, capsys):
    out = tmp_path / "a.npy"
    run(out, folder)
    before = out.read_bytes()
    run(out, folder)
    assert "is complete: nothing to do" in capsys.readouterr().out
    for change in CHANGES:
        with pytest.raises(ValueError, match="is there already"):
            run(out, *change(folder))
    assert out.read_bytes() == before


def test_a_second_command_for_the_same_file_is_refused(folder, tmp_path):
    out = tmp_path / "a.npy"
    with feature_file.only_writer(out), pytest.raises(UserError, match="another .* is writing"):
        run(out, folder)
    run(out, folder)
    assert sorted(x.name for x in tmp_path.glob("a.npy*")) == ["a.npy", "a.npy.csv", "a.npy.json"]


def test_a_list_of_windows_editor_is_read(folder, tmp_path):
    (folder / "list.txt").write_bytes("\ufeffdog/9.png\r\n\r\ncat/0.png\r\n".encode())
    found = run(tmp_path / "a.npy", folder / "list.txt")
    names = [os.path.relpath(name, folder) for name in found["name"]]
    assert names == ["dog/9.png", "cat/0.png"]


def test_a_list_of_another_folder_is_another_input(folder, tmp_path, monkeypatch):
    other = shutil.copytree(folder, tmp_path / "other")
    for root in (folder, other):
        (root / "list.txt").write_text("cat/0.png\n")
    monkeypatch.chdir(folder)
    run(tmp_path / "b.npy", "list.txt")
    monkeypatch.chdir(other)
    with pytest.raises(ValueError, match="is there already"):
        run(tmp_path / "b.npy", "list.txt")


def test_files_and_lists_are_read_in_their_order(folder, tmp_path):
    (folder / "list.txt").write_text("dog/9.png\n\ncat/0.png\nnowhere.png\n")
    found = run(tmp_path / "a.npy", folder / "list.txt", folder / "cat/1.png")
    wanted = [str(folder / name) for name in ("dog/9.png", "cat/0.png", "nowhere.png", "cat/1.png")]
    assert found["name"].tolist() == wanted
    assert found["error"].tolist() == ["", "", "No such file or directory", ""]
    assert (found["label"] == "").all()
    tokens = MODEL.encode(PARAMS, pictures(folder, ["dog/9.png", "cat/0.png", "cat/1.png"]))
    np.testing.assert_allclose(found["features"][[0, 1, 3]], tokens[:, 0], atol=1e-5)


def test_a_dataset_gives_names_and_labels(tmp_path):
    found = run(tmp_path / "a.npy", "bundled:digits", "--split=test[:20]")
    records = list(sources.open_source("bundled:digits", "test[:20]"))
    assert found["name"].tolist() == [record["name"] for record in records]
    assert found["label"].astype(int).tolist() == [record["label"] for record in records]
    assert found["features"].shape == (20, MODEL.spec.encoder.width)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["images", "--out=a.csv"], "ends in .npy or .parquet"),
        (["images", "--out=a.npz"], ".npy replaces .npz"),
        (["images"], "IMAGES and --out=FILE are wanted"),
        (["images", "--out=nowhere/a.npy"], "there is no folder"),
        (["images", "--out=a.npy", "--layer=7"], "has layers 1 to 6"),
        (["images", "images/cat/1.png", "--out=a.npy"], "not several of these"),
        (["images/cat/3.png", "--out=a.npy"], "none of the 1 images can be read"),
        (["images/cat/3.png"] * 2 + ["--out=a.npy"], "none of the 2 images can be read"),
        (["empty.txt", "--out=a.npy"], "no image is listed"),
        (["nowhere.jpg", "--out=a.npy"], "data source 'nowhere.jpg' is none of"),
    ],
)
def test_mistakes_leave_nothing_behind(arguments, words, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=words):
        embed.main([str(WEIGHTS), *arguments])
    assert sorted(os.listdir()) == ["empty.txt", "images"]
