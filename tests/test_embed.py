"""Features of one's own images: the model's, in order, the same after any interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_data_source
from PIL import Image
from pyarrow import parquet
from tensorflow_datasets.proto import tf_example_pb2

import mae_jax
from mae_jax.commands import embed
from mae_jax.data import crops, sources, transforms

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "tests/data/hf_vitmae_tiny"
MODEL, PARAMS = mae_jax.load(WEIGHTS)
SIZE = MODEL.spec.image_size


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten images in two classes, of which one is broken and one cut short."""
    rng = np.random.default_rng(0)
    for i in range(10):
        place = tmp_path / "images" / ("cat", "dog")[i // 5]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 36 + i, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    (tmp_path / "images/cat/3.png").write_text("no image")
    short = (tmp_path / "images/dog/7.png").read_bytes()[:200]
    (tmp_path / "images/dog/7.png").write_bytes(short)
    return tmp_path / "images"


BAD = ["cat/3.png", "dog/7.png"]


def run(out: Path, *arguments) -> dict[str, np.ndarray]:
    assert embed.main([str(WEIGHTS), *map(str, arguments), f"--out={out}"]) == 0
    return dict(np.load(out)) if out.suffix == ".npz" else {}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], name)


def pictures(folder: Path, names: list[str]) -> np.ndarray:
    read = (transforms.decode((folder / name).read_bytes()) for name in names)
    return np.stack([crops.center(picture, SIZE) for picture in read])


def test_a_row_for_each_image_in_order_and_nothing_for_bad_ones(folder, tmp_path, capsys):
    found = run(tmp_path / "a.npz", folder, "--batch_size=4")
    names = [f"{'cat' if i < 5 else 'dog'}/{i}.png" for i in range(10)]
    assert found["name"].tolist() == names
    np.testing.assert_array_equal(found["label"], [0] * 5 + [1] * 5)
    bad = np.isin(names, BAD)
    assert np.isnan(found["features"][bad]).all() and not np.isnan(found["features"][~bad]).any()
    np.testing.assert_array_equal(found["error"] != "", bad)
    good = [name for name in names if name not in BAD]
    tokens = MODEL.encode(PARAMS, pictures(folder, good))
    np.testing.assert_allclose(found["features"][~bad], tokens[:, 0], atol=1e-5)
    told = capsys.readouterr().out
    assert "2 could not be read" in told and all(name in told for name in BAD)
    assert list(json.loads((tmp_path / "a.npz.json").read_text())["bad"]) == BAD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.json", "images"]


@pytest.mark.parametrize(
    ("feature", "layer"),
    [("mean", None), ("patches", None), ("tokens", 1), ("cls", 2)],
)
def test_features_and_layers_are_those_of_the_model(feature, layer, folder, tmp_path):
    (folder / BAD[0]).unlink()
    (folder / BAD[1]).unlink()
    flag = [] if layer is None else [f"--layer={layer}"]
    found = run(tmp_path / "a.npz", folder, f"--feature={feature}", *flag)
    images = pictures(folder, found["name"].tolist())
    tokens = MODEL.encode(PARAMS, images)
    if layer is not None:
        tokens = MODEL.blocks(PARAMS, images)[0][layer]
    wanted = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "patches": tokens[:, 1:]}
    np.testing.assert_allclose(found["features"], wanted.get(feature, tokens), atol=1e-5)


def test_the_batch_size_changes_nothing(folder, tmp_path):
    batches = [run(tmp_path / f"{n}.npz", folder, f"--batch_size={n}") for n in (3, 8, 40)]
    for name, x in batches[0].items():
        for other in batches[1:]:
            if name == "features":
                np.testing.assert_allclose(other[name], x, atol=1e-6)
            else:
                np.testing.assert_array_equal(other[name], x)


def test_parquet_and_arrayrecord_hold_what_npz_holds(folder, tmp_path):
    for flags in ([], ["--feature=patches"]):
        for suffix in (".npz", ".parquet", ".array_record"):
            (tmp_path / f"a{suffix}").unlink(missing_ok=True)
            run(tmp_path / f"a{suffix}", folder, *flags)
        wanted = np.load(tmp_path / "a.npz")
        table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
        reader = array_record_data_source.ArrayRecordDataSource(str(tmp_path / "a.array_record"))
        assert len(reader) == len(table["name"]) == len(wanted["name"]) == 10
        for i, record in enumerate(reader.__getitems__(range(10))):
            columns = tf_example_pb2.Example.FromString(record).features.feature
            assert columns["name"].bytes_list.value[0].decode() == wanted["name"][i]
            assert columns["label"].int64_list.value[0] == wanted["label"][i]
            assert table["name"][i] == wanted["name"][i]
            assert table["label"][i] == wanted["label"][i]
            if wanted["error"][i]:
                assert table["features"][i] is None and "features" not in columns
                assert table["error"][i] == wanted["error"][i]
                assert columns["error"].bytes_list.value[0].decode() == wanted["error"][i]
                continue
            assert table["error"][i] is None and "error" not in columns
            features = wanted["features"][i]
            np.testing.assert_array_equal(np.array(table["features"][i], np.float32), features)
            flat = np.array(columns["features"].float_list.value, np.float32)
            np.testing.assert_array_equal(flat, features.reshape(-1))


def test_killed_it_goes_on_where_it_stopped_with_the_same_bytes(tmp_path, capsys):
    arguments = ["bundled:digits", "--batch_size=8", "--save_every=32"]
    out = tmp_path / "killed.npz"
    process = subprocess.Popen(
        [sys.executable, "-m", "mae_jax", "embed", WEIGHTS, *arguments, f"--out={out}"],
        cwd=ROOT,
        env=os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        stdout=subprocess.DEVNULL,
    )
    work = tmp_path / "killed.npz.part"
    while process.poll() is None and len(list(work.glob("*.npz"))) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    embed.main([str(WEIGHTS), *arguments, f"--out={out}"])
    assert "were done before: going on" in capsys.readouterr().out
    embed.main([str(WEIGHTS), *arguments, f"--out={tmp_path / 'whole.npz'}"])
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not work.exists()


def interrupt(out: Path, *arguments) -> None:
    """Runs until eight images are read, and one part is saved."""
    decode, count = transforms.decode, 0

    def fail(*arguments):
        nonlocal count
        count += 1
        if count > 8:
            raise MemoryError
        return decode(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "decode", fail)
        patch.setattr(embed, "THREADS", 1)
        with pytest.raises(MemoryError):
            run(out, *arguments)
    assert not out.exists()


def test_an_interruption_by_other_weights_or_options_starts_again(folder, tmp_path, capsys):
    out = tmp_path / "a.npz"
    interrupt(out, folder, "--batch_size=8", "--save_every=1")
    found = run(out, folder, "--batch_size=8", "--feature=mean")
    assert "changed since the interruption: starting again" in capsys.readouterr().out
    out.unlink()
    assert_same(run(out, folder, "--batch_size=8", "--feature=mean"), found)


def test_what_is_complete_is_not_done_again_and_what_is_other_is_kept(folder, tmp_path, capsys):
    out = tmp_path / "a.npz"
    run(out, folder)
    before = out.read_bytes()
    run(out, folder)
    assert "is complete: nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is there already"):
        run(out, folder, "--feature=mean")
    assert out.read_bytes() == before


def test_another_folder_with_the_same_names_is_another_plan(folder, tmp_path, monkeypatch):
    out, other = tmp_path / "a.npz", tmp_path / "other"
    shutil.copytree(folder, other)
    run(out, folder)
    with pytest.raises(ValueError, match="is there already"):
        run(out, other)
    (folder / "list.txt").write_text("cat/0.png\n")
    for place in (folder, other):
        monkeypatch.chdir(place)
        (place / "list.txt").write_text("cat/0.png\n")
        if place == folder:
            run(tmp_path / "b.npz", "list.txt")
    with pytest.raises(ValueError, match="is there already"):
        run(tmp_path / "b.npz", "list.txt")


def test_images_written_again_under_their_names_are_another_plan(folder, tmp_path, capsys):
    out = tmp_path / "a.npz"
    options = (folder, "--batch_size=4", "--save_every=1")
    interrupt(out, *options)
    shutil.copy(folder / "dog/9.png", folder / "cat/0.png")
    found = run(out, *options)
    assert "changed since the interruption: starting again" in capsys.readouterr().out
    np.testing.assert_allclose(found["features"][0], found["features"][9], atol=1e-5)
    # As long as it was, and as old to the second.
    before = os.stat(folder / "cat/0.png")
    os.utime(folder / "cat/0.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="is there already"):
        run(out, *options)


def test_shards_of_two_hosts_are_disjoint_and_complete(folder, tmp_path):
    whole = run(tmp_path / "a.npz", folder)
    for host in (1, 0):
        flags = [f"--out={tmp_path / 'a.npz'}", "--num_hosts=2", f"--host={host}"]
        embed.main([str(WEIGHTS), str(folder), *flags])
    shards = [np.load(tmp_path / f"a-{host:05d}-of-00002.npz") for host in range(2)]
    for name, x in whole.items():
        both = np.concatenate([shard[name] for shard in shards])
        if name == "features":
            np.testing.assert_allclose(both, x, atol=1e-6)
        else:
            np.testing.assert_array_equal(both, x)
    assert not set(shards[0]["name"]) & set(shards[1]["name"])


def test_files_and_lists_are_read_in_their_order(folder, tmp_path):
    (folder / "list.txt").write_text("dog/9.png\n\ncat/0.png\nnowhere.png\n")
    found = run(tmp_path / "a.npz", folder / "list.txt", folder / "cat/1.png")
    wanted = [str(folder / name) for name in ("dog/9.png", "cat/0.png", "nowhere.png", "cat/1.png")]
    assert found["name"].tolist() == wanted
    assert found["error"].tolist() == ["", "", "No such file or directory", ""]
    assert (found["label"] == -1).all()
    tokens = MODEL.encode(PARAMS, pictures(folder, ["dog/9.png", "cat/0.png", "cat/1.png"]))
    np.testing.assert_allclose(found["features"][[0, 1, 3]], tokens[:, 0], atol=1e-5)


def test_a_dataset_gives_names_and_labels(tmp_path):
    found = run(tmp_path / "a.npz", "bundled:digits", "--split=test[:20]")
    source = sources.open_source("bundled:digits", "test[:20]")
    assert found["name"].tolist() == source.names
    np.testing.assert_array_equal(found["label"], source.labels)
    assert found["features"].shape == (20, MODEL.spec.width)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["images", "--out=a.csv"], "ends in .npz or .parquet or .array_record"),
        (["images"], "IMAGES and --out=FILE are wanted"),
        (["images", "--out=nowhere/a.npz"], "there is no folder"),
        (["images", "--out=a.npz", "--layer=3"], "has layers 1 to 2"),
        (["images", "--out=a.npz", "--num_hosts=2"], "give both"),
        (["images", "--out=a.npz", "--num_hosts=11", "--host=0"], "divided among 11 hosts"),
        (["images", "images/cat/1.png", "--out=a.npz"], "not several of these"),
        (["images/cat/3.png", "--out=a.npz"], "none of the 1 images can be read"),
        (["images/cat/3.png"] * 2 + ["--out=a.npz"], "none of the 2 images can be read"),
        (["empty.txt", "--out=a.npz"], "no image is listed"),
        (["nowhere.jpg", "--out=a.npz"], "data source 'nowhere.jpg' is none of"),
    ],
)
def test_mistakes_leave_nothing_behind(arguments, words, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=words):
        embed.main([str(WEIGHTS), *arguments])
    assert sorted(os.listdir()) == ["empty.txt", "images"]
