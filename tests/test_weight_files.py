"""Weight files of other programs are read wherever the weights lie; harmful ones do no harm."""

import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from official import write_pth

from mae_jax.errors import UserError
from mae_jax.interop import names, write
from mae_jax.interop.open import open_weights
from mae_jax.models.spec import ModelSpec, ViTSpec

ROOT = Path(__file__).parents[1]
HEADS = {"heads": 2, "decoder_heads": 2}
SPEC = ModelSpec(
    (16, 16), (4, 4), 3, encoder=ViTSpec(8, 1, 2, 16), decoder=ViTSpec(8, 1, 2, 16),
    target="pixels",
)  # fmt: skip


def tiny_state() -> dict[str, np.ndarray]:
    """Return the official state dict of a very small model."""
    rng, state = np.random.default_rng(0), {}
    for entry in names.entries(SPEC, "official"):
        rows = np.split(rng.normal(size=entry.shape).astype(np.float32), len(entry.names))
        state |= dict(zip(entry.names, rows, strict=True))
    return state


STATE = tiny_state()


def archive(path: Path, stream: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", stream)
    return path


def rewritten(path: Path, old: bytes, new: bytes) -> Path:
    """Replace bytes of the pickle in a .pth file."""
    with zipfile.ZipFile(path) as file:
        parts = {info.filename: file.read(info) for info in file.infolist()}
    assert old in parts["archive/data.pkl"]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content.replace(old, new) if name.endswith("pkl") else content)
    return path


def same(weights) -> bool:
    theirs = names.to_theirs(weights.params, weights.spec, "official")
    return all(np.array_equal(theirs[name], x) for name, x in STATE.items())


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.backbone.", "_orig_mod.module.vit_"])
def test_what_precedes_all_names_is_left_out(tmp_path, prefix):
    path = write_pth(tmp_path / "a.ckpt", {prefix + name: x for name, x in STATE.items()})
    assert same(open_weights(path, **HEADS))


def test_tensors_beside_the_model_are_named_and_left_out_on_demand(tmp_path):
    state = {f"model.{name}": x for name, x in STATE.items()} | {"criterion.scale": np.ones(1)}
    path = write_pth(tmp_path / "a.ckpt", state)
    with pytest.raises(UserError, match="1 tensors that .* no place for: criterion.scale"):
        open_weights(path, **HEADS)
    assert same(open_weights(path, allow_unused=True, **HEADS))


def test_weights_under_another_key_are_found_by_it(tmp_path):
    path = write_pth(tmp_path / "a", STATE)
    rewritten(path, b"X\x05\0\0\0model", b"X\x07\0\0\0teacher")
    with pytest.raises(UserError, match="another key: give one of teacher as the key"):
        open_weights(path, **HEADS)
    with pytest.raises(UserError, match="no dictionary under the key 'techer'; nearest: teacher"):
        open_weights(path, key="techer", **HEADS)
    assert same(open_weights(path, key="teacher", **HEADS))


def test_parameters_and_objects_of_trainers_are_read(tmp_path):
    path = write_pth(tmp_path / "a.ckpt", STATE)
    tensor, rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n(",
    )
    end = b"ccollections\nOrderedDict\n)RtR"
    rewritten(path, end, end + b"\x88ccollections\nOrderedDict\n)RtR")
    rewritten(path, tensor, rebuilt + tensor)
    hyper = (
        b"X\x05\0\0\0hyperclightning.fabric.utilities.data\nAttributeDict\n)\x81}X\1\0\0\0aK\1sbs"
    )
    rewritten(path, b"us.", b"us" + hyper + b".")
    assert same(open_weights(path, **HEADS))


def nested(depth: int) -> bytes:
    """A tuple in a tuple, and so on: to hash it, or to print it, recurses."""
    return b")" + b"\x85" * depth


HARMFUL = {
    "a deep key": b"\x80\x02}" + nested(500_000) + b"K\1s.",
    "a deep key of an OrderedDict": b"\x80\x02ccollections\nOrderedDict\n](]("
    + nested(500_000) + b"K\1ee\x85R.",
    "a key that doubles": b"\x80\x02}K\1" + b"q\0h\0\x86" * 60 + b"K\1s.",
    "a set": b"\x80\x04\x8f(K\1\x90.",
    "a print that doubles": b"\x80\x02}X\4\0\0\0argscargparse\nNamespace\n)\x81}X\1\0\0\0a"
    + b"]" + b"q\0h\0h\0\x86" * 60 + b"sbs.",
    "an id that doubles": b"\x80\x02" + b"K\1" + b"q\0h\0\x86" * 60 + b"Q.",
    "a hundred million lists": b"\x80\x02(" + b"]" * (40 * 2**20) + b"l.",
    "a memo far away": b"\x80\x02}r\xff\xff\xff\xff.",
    "a number of a million digits": b"\x80\x02}K\1I" + b"9" * 1_000_000 + b"\ns.",
    "an unknown instruction": b"\x80\x02}\xf0.",
    "a class in an old way": b"(ios\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02.",
    "a tensor of many axes": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\1K\0("
    + b"\x8a\x08" + struct.pack("<q", 2**61) + b"2" * 100_000 + b"tq\0h\0\x89}tR.",
    "a path of tuples": b"\x80\x02cpathlib\nPosixPath\nK\1" + b"q\0h\0\x86" * 60 + b"\x85R.",
    "no dictionary": b"\x80\x02K\1.",
}  # fmt: skip


def test_harmful_pickles_are_refused_at_once_in_a_sentence(tmp_path):
    paths = [archive(tmp_path / f"{i}.pth", stream) for i, stream in enumerate(HARMFUL.values())]
    code = (
        "import resource, signal, sys; from mae_jax.interop.open import open_weights\n"
        "from mae_jax.errors import UserError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))\n"
        "for path in sys.argv[1:]:\n"
        "    signal.alarm(60)\n"
        "    try: open_weights(path)\n"
        "    except UserError as error: print('REFUSED', error, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    for name, path, line in zip(HARMFUL, paths, [*lines, *[""] * len(paths)], strict=False):
        assert line.startswith(f"REFUSED {path}"), (name, done.returncode, done.stderr[-2000:])
        assert len(line) < 1000
    assert done.returncode == 0


@pytest.mark.parametrize("member", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_where_a_file_should_be_is_named(tmp_path, member, make):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vit_mae"}')
    (folder / member).unlink(missing_ok=True)
    make(folder / member)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        open_weights(folder, **HEADS)


@pytest.mark.parametrize(
    "content", ["[1, 2]", "3", '"x"', "[" * 100_000, '{"image_size": {"a": 1}}']
)
def test_a_config_that_is_no_dictionary_of_numbers_is_refused(tmp_path, content):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        open_weights(folder, **HEADS)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_pipe_or_device_is_no_weight_file(tmp_path, make):
    make(tmp_path / "a.pth")
    with pytest.raises(UserError, match="a pipe, a device or a folder"):
        open_weights(tmp_path / "a.pth")


def test_a_directory_of_an_archive_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    size = 32 * 2**20
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 9, 9, size, 0, 0)
    path.write_bytes(b"PK\3\4" + bytes(size) + end)
    with pytest.raises(UserError, match="its directory is longer than 16 MiB"):
        open_weights(path)


@pytest.mark.parametrize("form", ["pth", "safetensors", "hf"])
def test_two_thousand_mutations_are_opened_or_refused(tmp_path, form):
    source = write_pth(tmp_path / "a.pth", STATE)
    if form != "pth":
        weights = open_weights(source, **HEADS)
        save, name = (write.hf, "hf") if form == "hf" else (write.official, "a.safetensors")
        source = tmp_path / name
        save(source, weights.spec, weights.params)
    command = [sys.executable, str(ROOT / "tests/fuzz_weights.py"), source, "2000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    outcomes = json.loads(done.stdout.replace("'", '"'))
    assert outcomes["refused"] > 500
    assert sum(outcomes.values()) == 2000
