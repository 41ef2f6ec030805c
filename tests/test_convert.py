"""Conversion: what comes out is what went in; what cannot be read is refused, whole."""

import argparse
import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import skimage
from official import DATA, HEADS, META, STATE, golden_state, write_pth
from safetensors.numpy import load_file, save_file
from tiny import assert_trees_equal, load_encoder_into

import mae_jax
from configs import finetune, pretrain, robustness
from mae_jax import checkpoint
from mae_jax.commands import convert
from mae_jax.interop import names, pth
from mae_jax.interop.open import open_weights
from mae_jax.models import masking
from mae_jax.tasks import pretrain as pretrain_task

PUBLISHED = Path(__file__).parents[1] / "weights/cifar10-s"
ENCODER = {k: x for k, x in STATE.items() if "decoder" not in k and k != "mask_token"}
FLAGS = [f"--{name}={value}" for name, value in HEADS.items()]


def run(source, out, to, *flags) -> Path:
    assert convert.main([str(source), str(out), f"--to={to}", *flags]) == 0
    return out


@pytest.mark.parametrize("form", ["ours", "official", "hf"])
def test_round_trips_are_bit_equal(form, tmp_path, capsys):
    out = run(write_pth(tmp_path / "a.pth"), tmp_path / "out", form, *FLAGS)
    there = load_file(run(out, tmp_path / "back.safetensors", "official", *FLAGS))
    assert there.keys() == STATE.keys()
    for name, x in STATE.items():
        if name.endswith("pos_embed"):  # computed anew: equal but for the last bit
            np.testing.assert_allclose(there[name], x, atol=1e-6)
        else:
            np.testing.assert_array_equal(there[name], x, name)
    assert f"matched: {len(STATE)} tensors" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["ours", "official", "hf"])
def test_the_published_weights_predict_the_same_in_every_format(form, tmp_path):
    """They are float16 in the repository, and photographs are what they have learned."""
    flags, statistics = [], {}
    if form == "official":  # such a file does not say these
        flags = ["--heads=4", "--decoder_heads=2"]
        statistics = dict(mean=(0.492, 0.483, 0.447), std=(0.245, 0.243, 0.261))
    out = run(PUBLISHED, tmp_path / "out", form)
    there = run(out, tmp_path / "back", "hf", *flags)
    crops = [skimage.data.astronaut()[y : y + 32, 200:232] for y in (60, 120, 180)]
    images, predicted = np.stack(crops), []
    for path in (PUBLISHED, there):
        model, params = mae_jax.load(path, **statistics)
        mask = masking.keep_lowest(np.random.default_rng(0).random((3, 64)), 16)
        out = jax.jit(model.predict)(params, images, mask)
        predicted.append(np.asarray(out.images_BHWC, np.float32))
    np.testing.assert_allclose(predicted[1], predicted[0], atol=0.05)


def test_an_encoder_goes_to_timm_and_hugging_face_and_back(tmp_path):
    source = write_pth(tmp_path / "a.pth")
    wanted = open_weights(source, part="encoder", **HEADS).params
    for form in ("timm", "hf", "ours", "official"):
        out = run(source, tmp_path / form, form, "--part=encoder", *FLAGS)
        found = open_weights(out, heads=META["heads"])
        assert_trees_equal(found.params, wanted)
        if out.is_file():
            assert out.stat().st_mode == source.stat().st_mode  # not its owner's alone
        assert not found.spec.decoder


def test_hugging_face_names_of_transformers_5_and_files_of_torch_are_the_same_weights(tmp_path):
    hf = run(write_pth(tmp_path / "a.pth"), tmp_path / "hf", "hf", *FLAGS)
    wanted, old = open_weights(hf), load_file(hf / "model.safetensors")
    new = {}
    for name, x in old.items():
        for theirs, legacy in (
            (".q_proj.", ".attention.query."),
            (".k_proj.", ".attention.key."),
            (".v_proj.", ".attention.value."),
            (".attention.o_proj.", ".attention.output.dense."),
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
            ("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),
            ("vit.layers.", "vit.encoder.layer."),
        ):
            name = name.replace(legacy, theirs)
        new[name] = x
    assert new.keys().isdisjoint(k for k in old if ".attention." in k)
    save_file(new, hf / "model.safetensors")
    assert_trees_equal(open_weights(hf).params, wanted.params)
    (hf / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor pytorch_model.bin"):
        open_weights(hf)
    write_pth(hf / "pytorch_model.bin", old, wrapped=False)
    assert open_weights(hf).spec == wanted.spec
    assert_trees_equal(open_weights(hf).params, wanted.params)


def test_training_starts_from_a_converted_file(tmp_path):
    """What `--to=ours` wrote is the start of fine-tuning and of pre-training."""
    rng = np.random.default_rng(0)
    state = {name: rng.normal(0, 0.05, x.shape).astype(np.float32) for name, x in STATE.items()}
    state |= {name: x for name, x in STATE.items() if name.endswith("pos_embed")}
    init = run(write_pth(tmp_path / "a.pth", state), tmp_path / "init", "ours", *FLAGS)
    wanted = open_weights(init).params
    saved = checkpoint.find(init, "init_from")

    config = finetune.get_config(f"source=bundled:digits,test=test,batch_size=8,init={init}")
    assert (config.model.width, config.model.depth) == (META["embed_dim"], META["depth"])
    config.mix.group = 8
    found = load_encoder_into(config, init)
    for name in ("patch_embed", "cls_token", "stack"):
        assert_trees_equal(found[name], wanted["encoder"][name])

    config = pretrain.get_config("batch_size=8")
    made = json.loads((init / "config.json").read_text())["model"]
    config.model.update({name: tuple(x) if isinstance(x, list) else x for name, x in made.items()})
    config.data.source = "bundled:digits"
    params, _ = pretrain_task.Task.from_config(config).init(jax.random.key(0))
    assert_trees_equal(checkpoint.restore(saved, params, checkpoint.PARAMS), wanted)


def test_positions_that_are_no_sine_cosine_table_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    tables = {
        name: rng.normal(size=STATE[name].shape).astype(np.float32)
        for name in ("pos_embed", "decoder_pos_embed")
    }
    source = write_pth(tmp_path / "a.pth", STATE | tables)
    weights = open_weights(source, **HEADS)
    assert weights.spec.encoder.trained_positions and weights.spec.decoder.trained_positions
    back = names.to_theirs(weights.params, weights.spec, "official")
    for name, table in tables.items():
        np.testing.assert_array_equal(back[name], table)


@pytest.mark.parametrize(("norm", "pool"), [("norm", "cls"), ("fc_norm", "avg")])
def test_robustness_is_measured_with_the_pooling_that_was_converted(norm, pool, tmp_path):
    state = {re.sub(r"^norm\.", f"{norm}.", k): x for k, x in ENCODER.items()}
    state["head.weight"] = np.ones((5, META["embed_dim"]), np.float32)
    state["head.bias"] = np.zeros(5, np.float32)
    out = run(write_pth(tmp_path / "a.pth", state), tmp_path / "out", "ours", *FLAGS)
    config = robustness.get_config(f"init={out}")
    assert (config.model.pool, open_weights(out).spec.pool) == (pool, pool)


def test_fixed_positions_are_known_in_half_precision(tmp_path):
    half = {k: x.astype(np.float16) for k, x in STATE.items()}
    spec, params, _ = open_weights(write_pth(tmp_path / "a.pth", half), **HEADS)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert not (spec.encoder.trained_positions or spec.decoder.trained_positions)
    half["pos_embed"] = half["pos_embed"] + np.float16(0.01)
    spec = open_weights(write_pth(tmp_path / "b.pth", half), **HEADS).spec
    assert spec.encoder.trained_positions and not spec.decoder.trained_positions


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config", {"hidden_act": "relu"}, "hidden_act is 'relu', and only gelu"),
        ("config", {"image_size": "32"}, "image_size is '32'"),
        ("config", {"image_size": [32, 32, 3]}, "image_size is .32, 32, 3."),
        ("config", {"mask_ratio": "x"}, "mask_ratio is 'x'"),
        ("preprocessor_config", {"image_mean": 0.5}, "mean is 0.5"),
        ("preprocessor_config", {"image_std": ["a"]}, "std is .'a'."),
        ("config", {"mask_ratio": None}, None),
        ("preprocessor_config", {"image_mean": None, "image_std": None}, None),
    ],
)
def test_what_a_hugging_face_config_says_is_checked(file, change, words, tmp_path):
    out = run(write_pth(tmp_path / "a.pth"), tmp_path / "hf", "hf", *FLAGS)
    wanted, path = open_weights(out), out / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if words is None:
        assert open_weights(out).spec == wanted.spec
    else:
        with pytest.raises(ValueError, match=words):
            open_weights(out)


@pytest.mark.parametrize("values", [(-255, 0), (1000, 2000), (0, 10_000)])
def test_a_range_of_values_comes_back_from_hugging_face_and_is_named_elsewhere(
    values, tmp_path, capsys
):
    colours = ["--mean=0.4,0.5,0.6", "--std=0.2,0.2,0.2", f"--value_range={values[0]},{values[1]}"]
    source = run(write_pth(tmp_path / "a.pth"), tmp_path / "ours", "ours", *FLAGS, *colours)
    wanted, params = mae_jax.load(source)
    model, back = mae_jax.load(run(source, tmp_path / "hf", "hf"))
    assert model.spec.value_range == pytest.approx(values)
    assert model.spec.mean == pytest.approx(wanted.spec.mean)
    rng, shape = np.random.default_rng(0), (2, META["img"], META["img"], 3)
    images, key = rng.uniform(*values, shape).astype(np.float32), jax.random.key(0)
    ours, theirs = wanted.reconstruct(params, images, key), model.reconstruct(back, images, key)
    np.testing.assert_allclose(ours.images_BHWC, theirs.images_BHWC, atol=0.05)
    capsys.readouterr()
    named = run(source, tmp_path / "b.safetensors", "official")
    said = re.search("to read it, give (.*)", capsys.readouterr().out)[1].split()
    assert open_weights(run(named, tmp_path / "again", "ours", *FLAGS, *said)).spec == wanted.spec


def test_a_trained_table_is_resized_to_another_image_size(tmp_path, capsys):
    table = {"pos_embed": np.ones_like(STATE["pos_embed"])}
    source = write_pth(tmp_path / "a.pth", ENCODER | table)
    sides = f"--image_size={META['patch'] * 2}x{META['patch'] * 7}"
    weights = open_weights(run(source, tmp_path / "out", "ours", sides, *FLAGS))
    assert "resized: encoder/pos_embed" in capsys.readouterr().out
    assert weights.spec.grid == (2, 7)
    assert weights.params["encoder"]["pos_embed"].shape == (1, 15, META["embed_dim"])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x}, lambda x: {"args": x}])
def test_a_malicious_pickle_runs_nothing(wrap, tmp_path):
    trace = tmp_path / "executed"
    payload = pickle.dumps(wrap(Malicious(trace)), 2)
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    with pytest.raises(ValueError, match="asks for (posix|nt).mkdir.*nothing in a file is run"):
        open_weights(tmp_path / "a.pth")
    assert not trace.exists()
    pickle.loads(payload)  # the contrast: the ordinary unpickler runs it
    assert trace.exists()


def test_objects_of_a_pickle_cannot_change_the_program(tmp_path):
    # BUILD with slots would set attributes of whatever class a name stands for.
    stream = b"\x80\x02cargparse\nNamespace\n(N}X\x05\x00\x00\x00helloI1\ns" + b"tb."
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", stream)
    pth.read(tmp_path / "a.pth")
    assert not hasattr(argparse.Namespace, "hello")


def test_a_training_checkpoint_tells_its_target(tmp_path):
    # As timm's and the official scripts write their arguments: with None, and with paths.
    arguments = argparse.Namespace(norm_pix_loss=False, mean=None, std=None, output=Path("a/b"))
    source = write_pth(tmp_path / "a.pth")
    stream = zipfile.ZipFile(source).read("archive/data.pkl")
    namespace = b"X\x04\x00\x00\x00args" + pickle.dumps(arguments, 2)[2:-1]
    both = stream[:-1] + namespace + b"sX\x09\x00\x00\x00optimizer}s."
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        for info in zipfile.ZipFile(source).infolist():
            content = zipfile.ZipFile(source).read(info)
            archive.writestr(info.filename, both if info.filename.endswith("pkl") else content)
    weights = open_weights(tmp_path / "b.pth", **HEADS)
    assert (weights.spec.target, weights.spec.mean) == ("pixels", (0.485, 0.456, 0.406))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def bomb(_: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(2**24))
    return file.getvalue()


WIDTH = META["embed_dim"]
EXTRA = {"blocks.0.attn.rogue": np.zeros(3, np.float32)}


# Bytes; what is done to the bytes of a whole file; or tensors that are changed in it.
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (b"<!DOCTYPE html><title>403</title>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (b"", "is empty"),
        (pickle.dumps(STATE, 2), "bare pickle"),
        (b"hello, this is no model", "neither a .pth file"),
        (lambda content: content[: len(content) // 2], "is damaged or is not a weight file"),
        (flipped, "other bytes than were written"),
        (bomb, "has compressed parts"),
        (lambda _: safetensors.numpy.save(STATE)[:-100], "is damaged, or .*not fully covered"),
        ({"blocks.1.attn.proj.weight": None}, "partial load: blocks.1.attn.proj.weight"),
        ({"blocks.300000.norm1.weight": np.zeros(3, np.float32)}, "blocks has 3 layers, and they"),
        (EXTRA, "no place for: blocks.0.attn.rogue"),
        (
            {"blocks.1.norm1.bias": np.zeros(WIDTH + 1, np.float32)},
            r"blocks.1.norm1.bias has shape \(65,\) where \(64,\)",
        ),
        ({"norm.weight": np.zeros(WIDTH, np.int64)}, "norm.weight holds int64"),
        ({"norm.weight": np.full(WIDTH, np.nan, np.float32)}, "not finite"),
        (dict.fromkeys(STATE) | {"foo.bar": np.zeros(3)}, "not a model of this family; .* foo.bar"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_read_is_said_and_leaves_nothing_behind(damage, words, tmp_path):
    source = tmp_path / "model.pth"
    if isinstance(damage, bytes):
        source.write_bytes(damage)
    elif callable(damage):
        source.write_bytes(damage(write_pth(source).read_bytes()))
    else:
        write_pth(source, {k: x for k, x in (STATE | damage).items() if x is not None})
    with pytest.raises(ValueError, match=words):
        run(source, tmp_path / "out", "hf", *FLAGS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_extra_tensors_are_left_out_where_that_is_said(tmp_path):
    weights = open_weights(write_pth(tmp_path / "a", STATE | EXTRA), allow_unused=True, **HEADS)
    assert "unused: blocks.0.attn.rogue" in weights.report


@pytest.mark.parametrize(
    ("state", "output", "to", "words"),
    [
        (STATE, "out", "timm", "timm has no decoder"),
        (golden_state(DATA / "vit_tiny_avg.npz")[0], "out", "hf", "averages patches"),
        (STATE, "out.pth", "official", r"Name the output out\.safetensors"),
        (STATE, "out.pth", "timm", r"Name the output out\.safetensors"),
        (STATE, "a.pth", "ours", "is there already"),
    ],
)
def test_what_cannot_be_written_is_refused(state, output, to, words, tmp_path):
    source = write_pth(tmp_path / "a.pth", state)
    before = source.read_bytes()
    with pytest.raises(ValueError, match=words):
        run(source, tmp_path / output, to, *FLAGS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "INPUT, OUTPUT and --to are wanted"),
        (["a", "b"], "INPUT, OUTPUT and --to are wanted"),
        (["a", "b", "--to=onnx"], "onnx"),
        (["a", "b", "--to=hf"], "there is no file or directory 'a'"),
        (["a", "b", "--to=hf", "--image_size=big"], "write SIDE or HEIGHTxWIDTH"),
        (["a", "b", "--to=hf", "--mean=1,x"], "write numbers with commas"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        convert.main(arguments)
    assert not list(tmp_path.iterdir())
