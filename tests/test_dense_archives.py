"""`mae-jax prepare ade20k` and `voc` unpack archives of the real layout into pairs."""

import io
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from mae_jax.commands import prepare
from mae_jax.data import segmentation
from mae_jax.data.dense_archives import VOC_CLASSES
from mae_jax.data.label_maps import IGNORED
from mae_jax.errors import UserError

SIZE = (20, 30)
ADE = "ADEChallengeData2016"
VOC = "VOCdevkit/VOC2012"


def encoded(array, palette=None, **options) -> bytes:
    picture = Image.fromarray(array)
    if palette is not None:
        picture.putpalette(palette)
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


def jpeg() -> bytes:
    return encoded(np.full((*SIZE, 3), 90, np.uint8), format="JPEG")


def ade_files() -> dict[str, bytes]:
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(
        f"{i}\t0.1\t9\t9\t1\tclass number {i}, thing\n" for i in range(1, 151)
    )
    contents = {f"{ADE}/objectInfo150.txt": table.encode(), f"{ADE}/sceneCategories.txt": b"x"}
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(1, count + 1):
            name = f"ADE_{short}_{i:08d}"
            numbers = (np.arange(600).reshape(SIZE) % 151).astype(np.uint8)
            contents[f"{ADE}/images/{split}/{name}.jpg"] = jpeg()
            contents[f"{ADE}/annotations/{split}/{name}.png"] = encoded(numbers, format="PNG")
    return contents


def voc_files() -> dict[str, bytes]:
    numbers = np.tile(np.array([*range(21), 255], np.uint8), 30)[:600].reshape(SIZE)
    contents = {
        f"{VOC}/ImageSets/Segmentation/train.txt": b"2007_000032\n2007_000039\n",
        f"{VOC}/ImageSets/Segmentation/val.txt": b"2007_000033\n",
        f"{VOC}/ImageSets/Segmentation/trainval.txt": b"2007_000032\n",
        f"{VOC}/JPEGImages/2008_000001.jpg": jpeg(),  # without a map
    }
    palette = np.random.default_rng(0).integers(0, 256, 768).tolist()
    for stem in ("2007_000032", "2007_000033", "2007_000039"):
        contents[f"{VOC}/JPEGImages/{stem}.jpg"] = jpeg()
        contents[f"{VOC}/SegmentationClass/{stem}.png"] = encoded(numbers, palette, format="PNG")
        contents[f"{VOC}/SegmentationObject/{stem}.png"] = encoded(numbers, palette, format="PNG")
    return contents


def write_zip(path, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.mkdir(ADE)
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def write_tar(path, contents, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_ade20k_becomes_pairs_of_150_classes_in_which_0_is_none(tmp_path, capsys):
    path = write_zip(tmp_path / "ade.zip", ade_files())
    assert prepare.main(["ade20k", f"--zip={path}", f"--out={tmp_path / 'ade'}"]) == 0
    text = capsys.readouterr().out
    assert "train 3 pairs, validation 2 pairs" in text and "shift=true" in text
    data = dict(classes=0, ignore=255, shift=True, palette="")
    source = segmentation.open_pairs(data, f"segfolder:{tmp_path / 'ade'}", "train")
    assert len(source) == 3 and source.num_classes == 150
    assert source.class_names[:2] == ["class number 1, thing", "class number 2, thing"]
    wanted = np.arange(600).reshape(SIZE) % 151
    pair = segmentation.read(source, 0, 3, np.uint8)
    np.testing.assert_array_equal(pair.map, np.where(wanted == 0, IGNORED, wanted - 1))
    assert len(segmentation.open_pairs(data, f"segfolder:{tmp_path / 'ade'}", "validation")) == 2


def test_voc_takes_the_images_of_its_lists_and_the_numbers_of_its_palette_pictures(tmp_path):
    path = write_tar(tmp_path / "voc.tar", voc_files())
    assert prepare.main(["voc", f"--tar={path}", f"--out={tmp_path / 'voc'}"]) == 0
    data = dict(classes=0, ignore=255, shift=False, palette="")
    source = segmentation.open_pairs(data, f"segfolder:{tmp_path / 'voc'}", "train")
    assert [source[i]["name"][-15:-4] for i in range(2)] == ["2007_000032", "2007_000039"]
    assert source.class_names == list(VOC_CLASSES) and source.num_classes == 21
    found = segmentation.read(source, 0, 3, np.uint8).map
    assert sorted(np.unique(found)) == [*range(21), IGNORED]
    assert len(segmentation.open_pairs(data, f"segfolder:{tmp_path / 'voc'}", "val")) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop(f"{ADE}/objectInfo150.txt"), "no objectInfo150.txt.*another archive"),
        (
            lambda x: x.pop(f"{ADE}/annotations/training/ADE_train_00000002.png"),
            "1 images or label maps of train have no counterpart, such as ADE_train_00000002",
        ),
    ],
)
def test_an_archive_with_less_in_it_is_refused_and_leaves_nothing(tmp_path, change, message):
    contents = ade_files()
    change(contents)
    path = write_zip(tmp_path / "ade.zip", contents)
    with pytest.raises(UserError, match=message):
        prepare.main(["ade20k", f"--zip={path}", f"--out={tmp_path / 'ade'}"])
    assert [x.name for x in tmp_path.iterdir()] == ["ade.zip"]


def test_what_cannot_be_unpacked_is_refused_in_a_sentence(tmp_path):
    path = write_tar(tmp_path / "voc.tar", voc_files())
    (tmp_path / "there").mkdir()
    (tmp_path / "cut.zip").write_bytes(
        write_zip(tmp_path / "w.zip", ade_files()).read_bytes()[:900]
    )
    lists = write_tar(tmp_path / "l.tar", {k: v for k, v in voc_files().items() if "JPEG" not in k})
    for arguments, message in (
        (["voc", f"--tar={path}"], "--tar=FILE and --out=DIR are both needed"),
        (["voc", f"--zip={path}", f"--out={tmp_path / 'x'}"], "--zip means nothing"),
        (["voc", f"--tar={path}", f"--out={tmp_path / 'there'}"], "already exists"),
        (["ade20k", f"--zip={tmp_path / 'cut.zip'}", f"--out={tmp_path / 'x'}"], "cannot be read"),
        (["ade20k", f"--zip={path}", f"--out={tmp_path / 'x'}"], "no objectInfo150.txt"),
        (["ade20k", f"--zip={tmp_path / 'none'}", f"--out={tmp_path / 'x'}"], "cannot be read"),
        (["voc", f"--tar={lists}", f"--out={tmp_path / 'x'}"], "no JPEGImages/2007_000032.jpg"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.main(arguments)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["deflate", "lzma", "tar.xz"])
def test_a_damaged_archive_of_pairs_is_refused_whatever_its_compression(kind, tmp_path):
    path, out = tmp_path / "archive", tmp_path / "out"
    if kind == "tar.xz":
        write_tar(path, voc_files(), "w:xz")
        command = ["voc", f"--tar={path}", f"--out={out}"]
    else:
        compression = {"deflate": zipfile.ZIP_DEFLATED, "lzma": zipfile.ZIP_LZMA}[kind]
        write_zip(path, ade_files(), compression)
        command = ["ade20k", f"--zip={path}", f"--out={out}"]
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), len(content) // 100):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            prepare.main(command)
            shutil.rmtree(out)
        except UserError as error:
            assert "archive" in str(error)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("out", ["file/pairs", "/proc/pairs"])
def test_a_folder_that_cannot_be_written_is_not_called_a_bad_archive(out, tmp_path):
    (tmp_path / "file").touch()
    path = write_zip(tmp_path / "ade.zip", ade_files())
    with pytest.raises(UserError, match="--out=.*pairs cannot be written .*: choose a folder"):
        prepare.main(["ade20k", f"--zip={path}", f"--out={tmp_path / out}"])
