"""Sources list what people expect, in an order that never changes, and refuse the rest in words."""

import importlib.util
import io
import itertools
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from mae_jax.data import arrayrecord, bundled, sources
from mae_jax.data.bad_images import BadImageLog
from mae_jax.data.sources import open_source
from mae_jax.errors import UserError


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path, "PNG")
    return path


def names(source) -> list[str]:
    return [source[i]["name"] for i in range(len(source))]


def labels(source) -> list[int]:
    return [source[i]["label"] for i in range(len(source))]


def encoded(features, **example) -> bytes:
    return features.serialize_example(features.encode_example(example))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("photos"))
    return {split: open_source("bundled:photos", split, folder) for split in ("train", "test")}


@pytest.fixture
def stored(tmp_path):
    """A small labelled tfds dataset, `pets`, in two shards."""
    features = arrayrecord.image_features(["cat", "dog"])
    folder = tmp_path / "pets" / arrayrecord.VERSION
    folder.mkdir(parents=True)
    size = 0
    for shard in range(2):
        files = [save(tmp_path / f"{i}.png", i) for i in range(shard * 3, shard * 3 + 3)]
        records = [
            encoded(features, image=x.read_bytes(), file_name=x.name, label=int(x.stem) % 2)
            for x in files
        ]
        path = arrayrecord.shard_path(folder, "pets", "train", shard, 2)
        size += arrayrecord.write_shard(path, records)[1]
    arrayrecord.write_metadata(folder, features, {"train": ([3, 3], size)}, "test")
    return tmp_path


# --- folders ---


def test_class_folders_give_labels(tmp_path):
    for name in ("dog/1.png", "cat/2.jpg", "cat/1.PNG"):
        save(tmp_path / name)
    source = open_source(f"folder:{tmp_path}", "train")
    assert names(source) == ["cat/1.PNG", "cat/2.jpg", "dog/1.png"]
    assert labels(source) == [0, 0, 1]
    assert (source.class_names, source.num_classes) == (["cat", "dog"], 2)
    assert source[0]["image"] == (tmp_path / "cat/1.PNG").read_bytes()


@pytest.mark.parametrize("other", ["top.png", "a/b/deep.png"])
def test_one_image_elsewhere_means_no_labels(tmp_path, other):
    for name in ("a/1.png", "b/1.png", other):
        save(tmp_path / name)
    source = open_source(f"folder:{tmp_path}", "train")
    assert labels(source) == [-1, -1, -1]
    assert source.num_classes is source.class_names is None


SPLIT_FOLDERS = [
    {"train": "train", "validation": "val"},
    {"train": "Train", "validation": "VALID", "test": "test"},
    {"train": "training", "test": "Testing"},
]


@pytest.mark.parametrize("folders", SPLIT_FOLDERS, ids=str)
@pytest.mark.parametrize("labelled", [True, False])
def test_folders_named_after_splits_are_splits(tmp_path, capsys, folders, labelled):
    for number, folder in enumerate(folders.values()):
        for name in ("cat", "dog")[: 2 - number % 2] if labelled else ("",):
            for i in range(3 + number):
                save(tmp_path / folder / name / f"{i}.png")
    for number, (split, folder) in enumerate(folders.items()):
        source = open_source(f"folder:{tmp_path}", split)
        assert {name.split("/")[0] for name in names(source)} == {folder}
        assert len(source) == (3 + number) * (2 - number % 2 if labelled else 1)
        assert source.class_names == (["cat", "dog"] if labelled else None)
        wanted = {int(name.split("/")[1] == "dog") if labelled else -1 for name in names(source)}
        assert set(labels(source)) == wanted
    parts = [open_source(f"folder:{tmp_path}", split) for split in folders]
    assert not any(sources.shared(one, other) for one, other in itertools.combinations(parts, 2))
    if "validation" in folders:
        assert names(open_source(f"folder:{tmp_path}", "val")) == names(parts[1])
    assert "are splits" in capsys.readouterr().out


def test_a_class_that_train_lacks_is_named(tmp_path, capsys):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/emu/1.png"):
        save(tmp_path / name)
    source = open_source(f"folder:{tmp_path}", "val")
    assert (source.class_names, labels(source)) == (["cat", "dog", "emu"], [0, 2])
    assert "validation has classes that train has no image of: emu" in capsys.readouterr().out


def test_classes_that_are_called_train_or_test_stay_classes(tmp_path):
    for name in ("train/1.png", "plane/1.png"):
        save(tmp_path / name)
    assert open_source(f"folder:{tmp_path}", "train").class_names == ["plane", "train"]


@pytest.mark.parametrize("other", ["extra/cat/1.png", "loose.png"])
def test_splits_beside_other_images_are_refused(tmp_path, other):
    for name in ("train/cat/1.png", "val/cat/1.png", other):
        save(tmp_path / name)
    with pytest.raises(ValueError, match="the splits train, val beside .*move those elsewhere"):
        open_source(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_reported_and_never_waited_for(tmp_path, make):
    save(tmp_path / "a.png")
    make(tmp_path / "b.png")
    source = open_source(f"folder:{tmp_path}", "train")
    reports = {source[i]["name"]: source[i].get("unreadable") for i in range(len(source))}
    reports.setdefault("b.png", "a folder")  # is looked into
    assert reports["a.png"] is None
    assert "a folder" in reports["b.png"]


def test_files_that_are_no_images_are_passed_over(tmp_path):
    for name in ("a.png", "without_extension", "wrong.jpeg"):
        save(tmp_path / name)
    save(tmp_path / ".hidden.png")
    save(tmp_path / ".thumbnails/a.png")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "README").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    listed = names(open_source(f"folder:{tmp_path}", "train"))
    assert listed == ["a.png", "without_extension", "wrong.jpeg"]


def test_broken_links_and_empty_files_are_listed_as_empty_images(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "c.png").touch()
    source = open_source(f"folder:{tmp_path}", "train")
    assert [bool(source[i]["image"]) for i in range(3)] == [True, False, False]
    assert source[1]["unreadable"] == "No such file or directory"


def test_a_link_to_itself_is_passed_over(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "self").symlink_to("self")
    assert len(open_source(f"folder:{tmp_path}", "train")) == 1


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "elsewhere/1.png")
    save(tmp_path / "here/2.png")
    (tmp_path / "here/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here/loop").symlink_to(tmp_path / "here")
    assert names(open_source(f"folder:{tmp_path / 'here'}", "train")) == ["2.png", "linked/1.png"]


def test_a_link_to_a_folder_beside_it_hides_neither(tmp_path):
    for name in ("cats/1.png", "dogs/1.png"):
        save(tmp_path / name)
    (tmp_path / "all_dogs").symlink_to(tmp_path / "dogs")
    source = open_source(f"folder:{tmp_path}", "train")
    assert source.class_names == ["all_dogs", "cats", "dogs"]


@pytest.mark.parametrize("name", ["folder:{}", "pets", "bundled:digits"])
def test_images_that_two_splits_share_are_counted(stored, name):
    def shared(one, other):
        opened = [open_source(name.format(stored), x, str(stored)) for x in (one, other)]
        return sources.shared(*opened)

    whole = len(open_source(name.format(stored), "train", str(stored)))
    assert shared("train", "train") == whole
    assert shared("train", "train[4:]") == whole - 4
    assert shared("train[:3]", "train[2:]") == 1
    assert shared("train[:3]", "train[3:]") == 0
    assert shared("train[:2]+train[4:]", "train[1:5]") == 2
    other = open_source("bundled:digits", "test", str(stored))
    assert sources.shared(open_source(name.format(stored), "train", str(stored)), other) == 0


@pytest.mark.parametrize("split", ["train[1shard:]", "train[:50%]+train[:1shard]"])
@pytest.mark.parametrize("name", ["folder:{}", "pets", "bundled:digits"])
def test_slices_that_count_in_shards_are_refused(stored, name, split):
    with pytest.raises(UserError, match=r"counts in shards: .* such as 'train\[:5000\]'"):
        open_source(name.format(stored), split, str(stored))


@pytest.mark.parametrize("bad, total", [(29, 100), (57, 100), (1, 3)])
def test_the_share_of_unreadable_images_that_an_error_proposes_is_enough(bad, total):
    records = [
        {"image": b"" if i < bad else np.zeros((2, 2, 3), np.uint8), "label": -1, "name": f"{i}"}
        for i in range(total)
    ]
    source = sources.MemorySource(records, None)
    with pytest.raises(UserError, match=r"max_bad_fraction=[\d.]+$") as error:
        BadImageLog(source, 0.0).add(np.arange(bad))
    assert len(BadImageLog(source, float(str(error.value).rpartition("=")[2])).add(np.arange(bad)))


def test_the_slices_of_a_folder_that_the_readme_gives_a_probe_are_disjoint(tmp_path):
    for value in range(30):
        save(tmp_path / f"{value}.png", value)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    test = re.search(r"test=(train\[\S+?\])", readme)[1]
    found = re.search(r"data\.split='(\S+)' --config\.evals\.probe\.select_split='(\S+)'", readme)
    slices = [open_source(f"folder:{tmp_path}", split) for split in (test, *found.groups())]
    assert not any(sources.shared(a, b) for a, b in itertools.combinations(slices, 2))
    assert sum(map(len, slices)) == 30


def test_a_damaged_shard_is_named(stored):
    shard = arrayrecord.shard_path(stored / "pets" / "1.0.0", "pets", "train", 0, 2)
    content = bytearray(shard.read_bytes())
    content[200:260] = bytes(60)
    shard.write_bytes(content)
    source = open_source("pets", "train", str(stored))
    with pytest.raises(
        sources.Unreadable,
        match="of 'train' in .*pets/1.0.0 cannot be read.*: copy it again, or delete that folder",
    ):
        for index in range(len(source)):
            source[index]


def test_names_that_are_not_utf8_are_read_and_print(tmp_path):
    save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    record = open_source(f"folder:{tmp_path}", "train")[0]
    assert record["name"] == "caf\\xe9.png"
    assert record["name"].encode("utf-8")
    assert record["image"].startswith(b"\x89PNG")


def test_slices_of_a_folder_are_complements_and_show_every_class(tmp_path):
    for i in range(60):
        save(tmp_path / "abc"[i // 20] / f"{i}.png")
    whole, most, rest = (
        open_source(f"folder:{tmp_path}", split)
        for split in ("train", "train[:75%]", "train[75%:]")
    )
    assert len(whole) == 60
    assert (len(most), len(rest)) == (45, 15)
    assert sorted(names(most) + names(rest)) == sorted(names(whole))
    assert set(labels(rest)) == {0, 1, 2}
    assert names(most) == sorted(names(most))
    assert rest.class_names == whole.class_names


@pytest.mark.parametrize(
    "source, split, message",
    [
        ("folder:{}/gone", "train", "there is no folder"),
        ("folder:{}/empty", "train", "it is empty"),
        ("folder:{}/text", "train", "1 .txt"),
        ("folder:{}/images", "test", r"neither one of train \(2\)"),
        ("folder:{}/images", "train[2:]", r"train \(2\)"),
        ("folder:{}/images", "train[1:1]", "empty"),
        ("{}/images", "train", "did you mean folder:"),
        ("bundled:photo", "train", "is none of: .*, folder:PATH, bundled:photos"),
        ("imagnet2012", "train", "did you mean imagenet2012"),
        ("imagenet2012", "train", "mae-jax prepare imagenet2012 --data_dir=.* --manual_dir=DIR"),
        ("cifar10:9.9.9", "train", "only: 3.0.2"),
        ("bundled:digits", "validation", r"train \(1,437\), test \(360\)"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_words(tmp_path, source, split, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").touch()
    save(tmp_path / "images/1.png")
    save(tmp_path / "images/2.png")
    with pytest.raises(ValueError, match=message):
        open_source(source.format(tmp_path), split, str(tmp_path))


# --- tfds ---


def test_a_tfds_dataset_gives_the_encoded_bytes_that_were_stored(stored):
    source = open_source("pets", "train", str(stored))
    plain = tfds.builder_from_directory(stored / "pets" / "1.0.0").as_data_source("train")
    assert len(source) == len(plain) == 6
    for i in range(6):
        record = source[i]
        assert record["image"] == (stored / record["name"]).read_bytes()
        assert record["label"] == plain[i]["label"] == i % 2
    assert (source.class_names, source.num_classes) == (["cat", "dog"], 2)
    assert names(open_source("pets:1.0.0", "train[4:]", str(stored))) == ["4.png", "5.png"]


def test_sources_survive_pickling_and_serve_several_threads(stored):
    for name in ("pets", f"folder:{stored}", "bundled:digits"):
        source = open_source(name, "train", str(stored))
        again = pickle.loads(pickle.dumps(source))
        rows = [*range(6)] * 20
        with ThreadPoolExecutor(8) as pool:
            for i, record in zip(rows, pool.map(again.__getitem__, rows), strict=True):
                np.testing.assert_equal(record, source[i])


def test_a_missing_shard_is_found_before_it_is_read(stored):
    arrayrecord.shard_path(stored / "pets" / "1.0.0", "pets", "train", 1, 2).unlink()
    assert len(open_source("pets", "train[:3]", str(stored))) == 3
    with pytest.raises(ValueError, match="1 of 2 shards.*: copy it again, or delete that folder"):
        open_source("pets", "train", str(stored))


def test_a_dataset_without_images_is_refused(tmp_path):
    folder = tmp_path / "words" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    path = arrayrecord.shard_path(folder, "words", "train", 0, 1)
    size = arrayrecord.write_shard(path, [encoded(features, text="hello")])[1]
    arrayrecord.write_metadata(folder, features, {"train": ([1], size)}, "test")
    with pytest.raises(ValueError, match="no image under 'image'; it has text"):
        open_source("words", "train", str(tmp_path))


# --- bundled ---


def test_photos_hold_out_whole_scenes(photos):
    train, test = names(photos["train"]), names(photos["test"])
    assert (len(train), len(test)) == (1016, 24)
    assert len(set(train + test)) == 1040
    pictures = [Path(file).stem for files in bundled.PICTURES.values() for file in files]
    seen = {next(p for p in pictures if name.startswith(p)) for name in train}
    held_out = {next(p for p in pictures if name.startswith(p)) for name in test}
    assert held_out == set(bundled.HELD_OUT)
    assert seen == set(pictures) - held_out
    assert {"motorcycle_left", "motorcycle_right"} <= seen


def test_held_out_tiles_are_exact_and_do_not_overlap(photos):
    originals = {
        "chelsea": Path(skimage.__file__).parent / "data/chelsea.png",
        "china": Path(sklearn.__file__).parent / "datasets/images/china.jpg",
    }
    covered = {name: np.zeros(Image.open(path).size[::-1], int) for name, path in originals.items()}
    for i in range(len(photos["test"])):
        record = photos["test"][i]
        picture, y, x, side = Path(record["name"]).stem.split("_")
        top, left, side = (int(number[1:]) for number in (y, x, side))
        box = (slice(top, top + side), slice(left, left + side))
        tile = np.asarray(Image.open(io.BytesIO(record["image"])))
        np.testing.assert_array_equal(tile, np.asarray(Image.open(originals[picture]))[box])
        covered[picture][box] += 1
    assert all(count.max() == 1 for count in covered.values())


def test_photos_can_be_prepared_by_two_at_once(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(bundled.photos, [str(tmp_path)] * 2))
    assert len(open_source("bundled:photos", "test", str(tmp_path))) == 24
    assert [p.name for p in (tmp_path / bundled.PHOTOS).iterdir()] == [arrayrecord.VERSION]


def test_digits_are_split_by_class_and_scaled_to_bytes():
    train, test = (open_source("bundled:digits", split) for split in ("train", "test"))
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    assert not set(names(train)) & set(names(test))
    counts = np.bincount(labels(test))
    assert counts.min() >= 34 and counts.max() <= 38
    original, record = load_digits(), test[5]
    index = int(record["name"].removeprefix("digit_"))
    assert record["image"].dtype == np.uint8
    scaled = np.round(original.images[index] * 255 / 16)
    np.testing.assert_array_equal(record["image"], scaled[..., None])
    assert record["label"] == original.target[index]


def test_without_the_quickstart_packages_the_way_out_is_named(tmp_path, monkeypatch):
    find, missing = importlib.util.find_spec, ("skimage", "sklearn")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    bundled.digits.cache_clear()
    for source in ("bundled:photos", "bundled:digits"):
        with pytest.raises(ValueError, match="pip install .*scikit-learn"):
            open_source(source, "train", str(tmp_path))


def test_no_source_needs_tensorflow(stored):
    code = (
        "import sys; from mae_jax.data.sources import open_source;"
        f"open_source('pets', 'train', {str(stored)!r})[0]; print('tensorflow' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
