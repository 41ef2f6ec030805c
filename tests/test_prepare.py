"""`mae-jax prepare` makes datasets that plain tfds opens, without TensorFlow, and loses no work."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.imagenet_v2 import imagenet_v2_dataset_builder

from mae_jax.commands import prepare
from mae_jax.data import imagenet, pack
from mae_jax.data.sources import open_source
from mae_jax.errors import UserError
from mae_jax.files import locked

RNG = np.random.default_rng(0)


def encoded(format="JPEG", mode="RGB", size=(40, 30), color=None, **options) -> bytes:
    image = Image.new("RGB", size, color) if color else noise(size)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def noise(size) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), np.uint8))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def run(what: str, **options) -> int:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return prepare.main([what, *flags])


def pack_folder(source: Path, data_dir: Path, name="mine", workers=1, **options) -> Path:
    """`mae-jax prepare folder`; returns the directory of the dataset."""
    options |= dict(source=source, name=name, data_dir=data_dir, workers=workers)
    assert run("folder", **options) == 0
    return data_dir / name / "1.0.0"


def by_name(name: str, data_dir: Path, split="train") -> dict[str, dict]:
    source = open_source(name, split, str(data_dir))
    return {source[i]["name"]: source[i] for i in range(len(source))}


@pytest.fixture
def images(tmp_path):
    """Twelve images in two classes."""
    folder = tmp_path / "images"
    for i in range(12):
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(size=(40 + i, 30)))
    return folder


def folder_of(tmp_path: Path, files: dict[str, bytes]) -> Path:
    folder = tmp_path / "images"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(pack, "IMAGES_PER_SHARD", 3)


# --- a folder ---


def test_a_folder_becomes_a_dataset_that_plain_tfds_opens(images, tmp_path, capsys):
    pack_folder(images, tmp_path)
    out = capsys.readouterr().out
    assert "mine: 12 images" in out
    assert f"--config.data.source=mine --config.data.data_dir={tmp_path}" in out
    records = by_name("mine", tmp_path)
    assert {name: r["image"] for name, r in records.items()} == {
        f"{'ab'[i % 2]}/{i}.jpg": (images / "ab"[i % 2] / f"{i}.jpg").read_bytes()
        for i in range(12)
    }
    plain = tfds.builder_from_directory(tmp_path / "mine" / "1.0.0")
    assert plain.info.features["label"].names == ["a", "b"]
    for example in plain.as_data_source("train"):
        np.testing.assert_array_equal(
            example["image"], pixels(records[example["file_name"].decode()]["image"])
        )


def test_the_splits_of_a_folder_and_their_labels_are_kept(images, tmp_path, capsys, small_shards):
    root = tmp_path / "splits"
    (root / "val").mkdir(parents=True)
    images.rename(root / "train")
    shutil.copytree(root / "train/a", root / "val/a")
    prepared = pack_folder(root, tmp_path)
    out = capsys.readouterr().out
    assert "splits: train 12, validation 6" in out
    assert "--config.evals.reconstruct.split=validation" in out
    for split, names in (("train", 12), ("validation", 6)):
        source = open_source("mine", split, str(tmp_path))
        assert (len(source), source.class_names) == (names, ["a", "b"])
        for i in range(len(source)):
            folder, label, _ = source[i]["name"].split("/")
            assert (folder, "ab"[source[i]["label"]]) == (split.removesuffix("idation"), label)
    whole = json.loads((prepared / "prepared.json").read_text())
    train = pack_folder(root / "train", tmp_path / "train_alone")
    assert whole["mean"] == json.loads((train / "prepared.json").read_text())["mean"]


def test_the_printed_mean_and_std_are_those_of_all_pixels(images, tmp_path):
    summary = json.loads((pack_folder(images, tmp_path) / "prepared.json").read_text())
    everything = np.concatenate(
        [pixels(path.read_bytes()).reshape(-1, 3) for path in images.rglob("*.jpg")]
    )
    np.testing.assert_allclose(summary["mean"], (everything / 255).mean(0), rtol=1e-9)
    np.testing.assert_allclose(summary["std"], (everything / 255).std(0), rtol=1e-9)


def test_resize_gives_the_short_side_by_pillows_bicubic(tmp_path):
    sizes = {"wide": (90, 60), "tall": (50, 200), "small": (10, 12)}
    files = {name: encoded("PNG", size=size) for name, size in sizes.items()}
    pack_folder(folder_of(tmp_path, files), tmp_path, resize=32)
    for name, size in (("wide", (48, 32)), ("tall", (32, 128)), ("small", (32, 38))):
        buffer = io.BytesIO()
        expected = Image.open(io.BytesIO(files[name])).resize(size, Image.BICUBIC)
        expected.save(buffer, "JPEG", quality=95)
        assert by_name("mine", tmp_path)[name]["image"] == buffer.getvalue()


def test_what_not_every_reader_shows_alike_is_stored_as_upright_rgb_jpeg(tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6  # "rotate 90 degrees clockwise to show"
    kept = {"rgb.jpg": encoded(), "grey.jpg": encoded(mode="L"), "rgb.png": encoded("PNG")}
    mended = {
        "rotated.jpg": encoded(exif=rotated),
        "cmyk.jpg": encoded(mode="CMYK"),
        "palette.png": encoded("PNG", mode="P"),
        "web.webp": encoded("WEBP"),
    }
    pack_folder(folder_of(tmp_path, kept | mended), tmp_path)
    records = by_name("mine", tmp_path)
    for name, data in kept.items():
        assert records[name]["image"] == data
    for name in mended:
        image = Image.open(io.BytesIO(records[name]["image"]))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert image.size == ((30, 40) if name == "rotated.jpg" else (40, 30))


def test_what_is_read_and_pillow_cannot_open_is_stored_as_jpeg(tmp_path):
    jpeg, array = encoded(), io.BytesIO()
    np.save(array, np.full((30, 40, 3), 90, np.uint8))
    damaged = jpeg[:2] + b"\xff\xe0\x00\x06JFIF" + jpeg[2:]  # a segment without a version
    for name, data in {"a.npy": array.getvalue(), "a.jpg": damaged}.items():
        folder = tmp_path / name[2:]
        folder.mkdir()
        (folder / name).write_bytes(data)
        pack_folder(folder, tmp_path, f"from_{name[2:]}")
        image = Image.open(io.BytesIO(by_name(f"from_{name[2:]}", tmp_path)[name]["image"]))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 30))


def test_images_that_cannot_be_read_are_left_out_counted_and_named(
    images, tmp_path, small_shards, capsys
):
    (images / "a" / "text.jpg").write_text("text")
    (images / "a" / "link.png").symlink_to(images / "gone.png")
    (images / "b" / "cut.jpg").write_bytes((images / "a" / "0.jpg").read_bytes()[:300])
    os.rename(images / "b" / "1.jpg", os.fsencode(images) + b"/b/caf\xe9.jpg")
    pack_folder(images, tmp_path)
    out = capsys.readouterr().out
    assert "3 could not be read" in out
    assert "a/text.jpg" in out and "b/cut.jpg" in out
    assert "a/link.png (No such file or directory)" in out
    records = by_name("mine", tmp_path)
    assert len(records) == 12
    assert "b/caf\\xe9.jpg" in records


def test_a_strip_that_is_too_long_for_jpeg_is_left_out_and_named(tmp_path, capsys):
    folder = folder_of(tmp_path, {"0.jpg": encoded()})
    Image.new("RGB", (600, 1)).save(folder / "long.png")
    Image.new("RGBA", (70_000, 1)).save(folder / "longer.png")
    Image.new("RGB", (70_000, 1)).save(folder / "stored.png")  # as it is, where it is not resized
    pack_folder(folder, tmp_path, "small", resize=256)
    assert sorted(by_name("small", tmp_path)) == ["0.jpg"]
    assert "long.png (600 x 1 pixels: too long a strip" in capsys.readouterr().out
    pack_folder(folder, tmp_path, "whole")
    assert sorted(by_name("whole", tmp_path)) == ["0.jpg", "long.png", "stored.png"]


def test_a_shard_of_bad_images_alone_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "IMAGES_PER_SHARD", 1)
    files = {f"{i}.jpg": encoded() if i % 2 else b"text" for i in range(6)}
    pack_folder(folder_of(tmp_path, files), tmp_path)
    assert sorted(by_name("mine", tmp_path)) == ["1.jpg", "3.jpg", "5.jpg"]


def test_statistics_are_of_all_images_where_none_to_train_on_can_be_read(tmp_path):
    files = {"train/0.jpg": b"text", "val/1.jpg": encoded()}
    summary = json.loads(
        (pack_folder(folder_of(tmp_path, files), tmp_path) / "prepared.json").read_text()
    )
    np.testing.assert_allclose(
        summary["std"], (pixels(files["val/1.jpg"]) / 255).std((0, 1)), rtol=1e-9
    )


@pytest.mark.parametrize("names", [(" ", "b"), ("a\nb", "c"), ("a ", "b")], ids=repr)
def test_class_names_that_no_dataset_can_keep_are_refused(names, tmp_path):
    folder = folder_of(tmp_path, {f"{name}/1.png": encoded("PNG") for name in names})
    with pytest.raises(UserError, match="which no dataset can keep: rename the folder"):
        pack_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_processes_write_what_one_writes(images, tmp_path, small_shards):
    for workers in (1, 2):
        pack_folder(images, tmp_path / f"{workers}", workers=workers)
    one, two = (open_source("mine", "train", str(tmp_path / w)) for w in ("1", "2"))
    assert [one[i] for i in range(12)] == [two[i] for i in range(12)]


def test_an_interrupted_preparation_keeps_its_finished_shards(
    images, tmp_path, small_shards, monkeypatch, capsys
):
    pack_folder(images, tmp_path / "whole")
    write, written = pack.write_shard, []

    def interrupted(shard):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(shard)
        written.append(shard.path)

    monkeypatch.setattr(pack, "write_shard", interrupted)
    options = dict(source=images, name="mine", workers=1, data_dir=tmp_path / "parts")
    assert run("folder", **options) == 130
    before = [path.stat().st_mtime_ns for path in written]
    (written[0].parent / f"{written[0].name}.part-1").touch()  # as SIGKILL leaves one behind
    with pytest.raises(ValueError, match="not prepared|no tfds dataset"):
        open_source("mine", "train", str(tmp_path / "parts"))
    monkeypatch.setattr(pack, "write_shard", write)
    assert run("folder", **options) == 0
    folder = tmp_path / "parts" / "mine" / "1.0.0"
    assert [(folder / path.name).stat().st_mtime_ns for path in written] == before
    whole, parts = (open_source("mine", "train", str(tmp_path / w)) for w in ("whole", "parts"))
    assert [whole[i] for i in range(12)] == [parts[i] for i in range(12)]
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "whole" / "mine" / "1.0.0"))


@pytest.fixture
def interrupted(images, tmp_path, small_shards, monkeypatch):
    """A preparation of `images` with resize=8 that was stopped after its first shard."""

    def stop(shard):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        write = pack.write_shard
        patch.setattr(pack, "write_shard", lambda shard: write(shard) or stop(shard))
        options = dict(source=images, name="mine", data_dir=tmp_path, resize=8, workers=1)
        assert run("folder", **options) == 130


def test_other_options_after_an_interruption_start_again(interrupted, images, tmp_path):
    pack_folder(images, tmp_path, resize=16)
    for record in by_name("mine", tmp_path).values():
        assert min(pixels(record["image"]).shape[:2]) == 16


def test_images_that_were_repaired_after_an_interruption_are_read_again(
    interrupted, images, tmp_path
):
    for path in images.rglob("*.jpg"):
        path.write_bytes(encoded(size=(80, 20)))
    pack_folder(images, tmp_path, resize=8)
    shapes = {pixels(record["image"]).shape for record in by_name("mine", tmp_path).values()}
    assert shapes == {(8, 32, 3)}


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_dataset_whose_images_were_repaired_is_not_taken_for_theirs(images, tmp_path, change):
    pack_folder(images, tmp_path)
    if change == "size":
        (images / "a" / "0.jpg").write_bytes(encoded(size=(50, 50)))
    else:
        os.utime(images / "a" / "0.jpg", ns=(0, 0))
    with pytest.raises(UserError, match="made before its images changed; .*delete that directory"):
        pack_folder(images, tmp_path)


def test_a_dataset_that_does_not_say_its_images_versions_stays_usable(images, tmp_path, capsys):
    """As those that were made before sizes and times were compared."""
    file = pack_folder(images, tmp_path) / "prepared.json"
    summary = json.loads(file.read_text())
    del summary["plan"]["versions"]
    file.write_text(json.dumps(summary))
    assert len(by_name("mine", tmp_path)) == 12
    (images / "a" / "0.jpg").write_bytes(encoded(size=(50, 50)))
    pack_folder(images, tmp_path)
    out = capsys.readouterr().out
    assert "if one was changed since, delete that directory and prepare it again" in out
    with pytest.raises(UserError, match="from other images or options"):
        pack_folder(images, tmp_path, resize=16)


def test_a_second_run_changes_nothing_and_other_images_are_refused(images, tmp_path):
    final = pack_folder(images, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in final.iterdir()}
    pack_folder(images, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in final.iterdir()} == before
    with pytest.raises(ValueError, match="already exists"):
        pack_folder(images, tmp_path, resize=16)


@pytest.mark.parametrize("data_dir, reason", [("file", "Not a directory"), ("/proc", "No such")])
def test_a_data_dir_that_cannot_be_written_is_refused(images, tmp_path, data_dir, reason):
    (tmp_path / "file").touch()
    message = f"--data_dir=.*{data_dir}: .* cannot be made .{reason}.*give a directory"
    with pytest.raises(UserError, match=message):
        pack_folder(images, tmp_path / data_dir)


def test_two_writers_of_one_dataset_are_refused(images, tmp_path):
    work = tmp_path / "mine" / "1.0.0.incomplete"
    work.mkdir(parents=True)
    with locked(work), pytest.raises(ValueError, match="another"):
        pack_folder(images, tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to prepare"),
        (["folder", "more"], "unexpected argument 'more'"),
        (["folder", "--name=x"], "--source=PATH and --name=NAME"),
        (["folder", "--source=/", "--name=My Images"], "small letters"),
        (["folder", "--source=/", "--name=imagenet2012"], "choose another name"),
        (["folder", "--source=/", "--name=x", "--resize=zero"], "resize"),
        (["folder", "--source=/", "--name=x", "--resize=0"], "resize"),
        (["folder", "--source=/", "--nam=x"], "name"),
        (["folder", "--source=/", "--name=x", "--manual-dir=x"], "--manual_dir means nothing"),
        (["imagenet2012", "--resize=256"], "--resize means nothing"),
        (["imagenet2012", "--data-dir=gs://bucket"], "local directory"),
        (["imagnet2012"], "did you mean imagenet2012"),
    ],
)
def test_impossible_command_lines_are_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare.main(arguments)


# --- ImageNet ---


TRAIN = {  # the forms that the real archive holds: tfds names a CMYK file and the one PNG
    "n01440764": {"n01440764_10026.JPEG": encoded(), "n01440764_10027.JPEG": encoded(mode="L")},
    "n01739381": {"n01739381_1309.JPEG": encoded(mode="CMYK", color=(200, 30, 60))},
    "n02105855": {"n02105855_2933.JPEG": encoded("PNG", color=(10, 120, 240))},
}
VALIDATION = {f"ILSVRC2012_val_{i:08d}.JPEG": encoded() for i in (3, 1, 2, 50_000)}


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    for wordnet_id, files in TRAIN.items():
        write_archive(tmp_path / f"{wordnet_id}.tar", files)
    train = {f"{name}.tar": (tmp_path / f"{name}.tar").read_bytes() for name in TRAIN}
    write_archive(folder / "ILSVRC2012_img_train.tar", train)
    write_archive(folder / "ILSVRC2012_img_val.tar", VALIDATION)
    return folder


def test_imagenet_is_prepared_for_plain_tfds_in_a_process_without_tensorflow(archives, tmp_path):
    code = (
        "import sys; from mae_jax.commands.prepare import main;"
        f"main(['imagenet2012', '--manual-dir={archives}', '--data-dir={tmp_path}']);"
        "assert 'tensorflow' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "imagenet2012: train 4, validation 4" in out.stdout

    builder = tfds.builder("imagenet2012", data_dir=tmp_path)
    labels = builder.info.features["label"]
    assert (str(builder.version), labels.num_classes) == ("5.1.0", 1000)
    train = by_name("imagenet2012", tmp_path)
    assert {name: labels.int2str(record["label"]) for name, record in train.items()} == {
        name: wordnet_id for wordnet_id, files in TRAIN.items() for name in files
    }
    for name, data in TRAIN["n01440764"].items():
        assert train[name]["image"] == data
    cmyk = Image.open(io.BytesIO(train["n01739381_1309.JPEG"]["image"]))
    assert (cmyk.format, cmyk.mode) == ("JPEG", "RGB")
    np.testing.assert_allclose(np.asarray(cmyk).mean((0, 1)), (200, 30, 60), atol=3)
    was_png = train["n02105855_2933.JPEG"]["image"]
    assert Image.open(io.BytesIO(was_png)).format == "JPEG"
    np.testing.assert_allclose(pixels(was_png).mean((0, 1)), (10, 120, 240), atol=3)

    # By position in tfds's own list, whichever validation images are there.
    known = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    for name, record in by_name("imagenet2012", tmp_path, "validation").items():
        assert labels.int2str(record["label"]) == known[int(name[-13:-5]) - 1]
        assert record["image"] == VALIDATION[name]


def test_a_damaged_archive_leaves_no_dataset_behind(archives, tmp_path):
    path = archives / "ILSVRC2012_img_val.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short"):
        run("imagenet2012", manual_dir=archives, data_dir=tmp_path)
    with pytest.raises(ValueError, match="not prepared"):
        open_source("imagenet2012", "validation", str(tmp_path))


@pytest.mark.parametrize(
    "manual, message",
    [("none", "no such directory"), ("", "register on https"), ("images", "holds none of ILSVRC")],
)
def test_missing_archives_are_named(images, tmp_path, manual, message):
    option = {"manual_dir": tmp_path / manual} if manual else {}
    with pytest.raises(ValueError, match=message):
        run("imagenet2012", data_dir=tmp_path, **option)


# --- other test sets of ImageNet ---

TOP = "imagenetv2-threshold0.7-format-val"
TEST_SETS = {  # name -> archive, what it holds
    "imagenet_v2/threshold-0.7": (
        "imagenetv2-threshold0.7.tar.gz",
        {f"{TOP}/{label}/{name}.jpeg": encoded() for label in (0, 10, 2) for name in "ab"},
    ),
    "imagenet_a": (
        "imagenet-a.tar",
        {
            "imagenet-a/README.txt": b"about",
            "imagenet-a/n01498041/0.000116_digital clock _ pole_0.865662.jpg": encoded(),
            "imagenet-a/n12267677/0.018_x _ y_0.9.jpg": encoded("PNG"),
        },
    ),
    "imagenet_r": (
        "imagenet-r.tar",
        {
            "imagenet-r/README.txt": b"about",
            "imagenet-r/n01443537/art_0.jpg": encoded(),
            "imagenet-r/n12267677/art_0.jpg": encoded("PNG"),
        },
    ),
    "imagenet_sketch": (
        "ImageNet-Sketch.zip",
        {f"sketch/{name}/sketch_{i}.JPEG": encoded() for i, name in enumerate(TRAIN)},
    ),
}


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as zip:
            for name, data in files.items():
                zip.writestr(name, data)
        return
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def examples_of_tfds(name: str, archive: Path, folder: Path, monkeypatch) -> dict[str, dict]:
    """Key -> example as tfds's own builder generates it from the unpacked archive."""
    builder = tfds.builder(name, data_dir=folder)
    module = sys.modules[type(builder).__module__]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zip:
            opened = [(entry, zip.open(entry)) for entry in zip.namelist()]
            examples = dict(builder._generate_examples(opened))
            return {key: {**x, "image": x["image"].read()} for key, x in examples.items()}
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        top = tar.getnames()[0].split("/")[0]
    gfile = SimpleNamespace(listdir=os.listdir, isdir=os.path.isdir)
    monkeypatch.setattr(module, "tf", SimpleNamespace(io=SimpleNamespace(gfile=gfile)))
    examples = dict(builder._generate_examples(str(folder / top)))
    return {key: {**x, "image": Path(x["image"]).read_bytes()} for key, x in examples.items()}


@pytest.mark.parametrize("name", TEST_SETS)
def test_a_test_set_is_prepared_as_tfds_would(name, tmp_path, monkeypatch, capsys):
    archive, files = TEST_SETS[name]
    write_archive(tmp_path / archive, files)
    assert run(name, manual_dir=tmp_path, data_dir=tmp_path) == 0
    out = capsys.readouterr().out
    assert f"--config=configs/robustness.py:init=WORKDIR --config.data.data_dir={tmp_path}" in out

    builder = tfds.builder(name, data_dir=tmp_path)
    assert not builder.info.splits.keys() ^ {"test"}
    raw = builder.as_data_source("test", decoders={"image": tfds.decode.SkipDecoding()})
    found = sorted((x["file_name"].decode(), x["label"], x["image"]) for x in raw)
    encode = builder.info.features["label"].encode_example
    theirs = examples_of_tfds(name, tmp_path / archive, tmp_path / "unpacked", monkeypatch)
    assert dict(imagenet.test_examples(builder, tmp_path / archive)) == theirs
    assert found == sorted(
        (x["file_name"], encode(x["label"]), x["image"]) for x in theirs.values()
    )


@pytest.mark.parametrize("name", imagenet.TEST_SETS)
def test_every_archive_has_the_name_that_tfds_publishes(name):
    config, builder = name.partition("/")[2], tfds.builder(name)
    url = imagenet.url_of(builder)
    assert url in builder.url_infos
    if config:
        assert url == imagenet_v2_dataset_builder._IMAGENET_V2_URLS[config]
        assert imagenet.TEST_SETS[name].top == imagenet_v2_dataset_builder._TAR_TOPDIR[config]


@pytest.mark.parametrize("name", TEST_SETS)
def test_a_damaged_test_set_leaves_nothing_behind(name, tmp_path):
    archive, files = TEST_SETS[name]
    write_archive(tmp_path / archive, files)
    data = (tmp_path / archive).read_bytes()
    (tmp_path / archive).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        run(name, manual_dir=tmp_path, data_dir=tmp_path)
    with pytest.raises(ValueError, match="not prepared"):
        open_source(name, "test", str(tmp_path))


@pytest.mark.parametrize(
    "files, message",
    [
        (None, "holds no imagenet-r.tar: get imagenet-r.tar from https.*or leave out --manual_dir"),
        ({"imagenet-a/n01443537/x.jpg": b""}, "imagenet-r.tar holds 'imagenet-a/n01443537/x.jpg'"),
        ({"imagenet-r/goldfish/x.jpg": b""}, "'imagenet-r/goldfish/x.jpg'; .* 1000 classes n01440"),
        ({"imagenet-r/n01443537/more/x.jpg": b""}, "imagenet-r/CLASS/FILE is expected"),
        ({"imagenet-r/README.txt": b""}, "holds no image"),
    ],
    ids=str,
)
def test_an_archive_that_is_not_the_one_is_refused(files, message, tmp_path):
    if files:
        write_archive(tmp_path / "imagenet-r.tar", files)
    with pytest.raises(ValueError, match=message):
        run("imagenet_r", manual_dir=tmp_path, data_dir=tmp_path)


# --- other tfds datasets ---


def test_a_dataset_that_tfds_prepares_with_tensorflow_only_says_so(archives, tmp_path):
    with pytest.raises(ValueError, match="tfds build imagenet2012_corrupted"):
        run("imagenet2012_corrupted", manual_dir=archives, data_dir=tmp_path)


def as_tfrecord(folder: Path) -> None:
    """Turn a prepared dataset into what TensorFlow would have written, but for its checksums."""
    for path in folder.glob("*.array_record-*"):
        source = tfds.builder_from_directory(folder).as_data_source(
            "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        frames = b""
        for record in source:
            frames += len(record).to_bytes(8, "little") + b"crc." + record + b"crc."
        path.unlink()
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(frames)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_the_command_that_a_tfrecord_dataset_names_converts_it(images, tmp_path):
    final = pack_folder(images, tmp_path)
    before = by_name("mine", tmp_path)
    as_tfrecord(final)
    with pytest.raises(ValueError, match="mae-jax prepare mine --data_dir=") as refused:
        open_source("mine", "train", str(tmp_path))
    command = str(refused.value).partition("mae-jax prepare ")[2].split()
    assert prepare.main(command) == 0
    assert by_name("mine", tmp_path) == before
    assert list(final.glob("*.tfrecord-*"))
    assert prepare.main(command) == 0  # nothing left to do


def test_a_tfrecord_dataset_cut_short_is_not_converted(images, tmp_path):
    final = pack_folder(images, tmp_path)
    as_tfrecord(final)
    (shard,) = final.glob("*.tfrecord-*")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="ends inside a record"):
        run("mine", data_dir=tmp_path)
    assert not list(final.glob("*array_record*"))
