"""Conversion: what comes out is what went in; what cannot be read is refused, whole."""

import argparse
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from official import golden_state, write_pth
from safetensors.numpy import load_file, save_file

from configs import finetune, pretrain, robustness
from mae_jax import checkpoint
from mae_jax.commands import convert
from mae_jax.interop import names, pth
from mae_jax.interop.open import open_weights
from mae_jax.tasks import classify
from mae_jax.tasks import pretrain as pretrain_task
from mae_jax.tasks.init_from import load_encoder

DATA = Path(__file__).parent / "data"
STATE, META = golden_state(DATA / "mae_tiny.npz")
ENCODER = {k: x for k, x in STATE.items() if "decoder" not in k and k != "mask_token"}
HEADS = {"heads": META["heads"], "decoder_heads": META["dec_heads"]}
FLAGS = [f"--{name}={value}" for name, value in HEADS.items()]


def official(path: Path, state=STATE) -> Path:
    return write_pth(path, state)


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(np.array_equal, a, b)
    )


@pytest.mark.parametrize("form", ["ours", "official", "hf"])
def test_round_trips_are_bit_equal(form, tmp_path, capsys):
    source = official(tmp_path / "a.pth")
    out, back = tmp_path / "out", tmp_path / "back.safetensors"
    assert convert.main([str(source), str(out), f"--to={form}", *FLAGS]) == 0
    assert convert.main([str(out), str(back), "--to=official", *FLAGS]) == 0
    there = load_file(back)
    assert there.keys() == STATE.keys()
    for name, x in STATE.items():
        if name.endswith("pos_embed"):  # computed anew: equal but for the last bit
            np.testing.assert_allclose(there[name], x, atol=1e-6)
        else:
            np.testing.assert_array_equal(there[name], x, name)
    assert f"matched: {len(STATE)} tensors" in capsys.readouterr().out


def test_an_encoder_goes_to_timm_and_hugging_face_and_back(tmp_path):
    source = official(tmp_path / "a.pth")
    wanted = open_weights(source, part="encoder", **HEADS).params
    for form in ("timm", "hf", "ours", "official"):
        out = tmp_path / form
        convert.main([str(source), str(out), f"--to={form}", "--part=encoder", *FLAGS])
        found = open_weights(out, heads=META["heads"])
        assert same(found.params, wanted), form
        if out.is_file():
            assert out.stat().st_mode == source.stat().st_mode  # not its owner's alone
        assert not found.spec.decoder


def test_hugging_face_names_of_transformers_5_are_the_same_weights(tmp_path):
    source = official(tmp_path / "a.pth")
    convert.main([str(source), str(tmp_path / "hf"), "--to=hf", *FLAGS])
    old = load_file(tmp_path / "hf/model.safetensors")
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
    (tmp_path / "new").mkdir()
    config = (tmp_path / "hf/config.json").read_text()
    (tmp_path / "new/config.json").write_text(config)
    save_file(new, tmp_path / "new/model.safetensors")
    assert same(open_weights(tmp_path / "new").params, open_weights(tmp_path / "hf").params)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_directories_in_every_form(name, shards, tmp_path):
    source = official(tmp_path / "a.pth")
    convert.main([str(source), str(tmp_path / "hf"), "--to=hf", *FLAGS])
    state = load_file(tmp_path / "hf/model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((tmp_path / "hf/config.json").read_text())
    stem, suffix = name.split(".")
    index = {}
    for i in range(shards):
        part = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else name
        own = {key: state[key] for key in list(state)[i::shards]}
        index |= dict.fromkeys(own, part)
        if name.endswith("safetensors"):
            save_file(own, other / part)
        else:
            write_pth(other / part, own, wrapped=False)
    if shards > 1:
        (other / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    found, wanted = open_weights(other), open_weights(tmp_path / "hf")
    assert found.spec == wanted.spec and same(found.params, wanted.params)
    if shards > 1:
        (other / part).unlink()
        with pytest.raises(ValueError, match="names files that are not there"):
            open_weights(other)


def test_training_starts_from_a_converted_file(tmp_path):
    """What `--to=ours` wrote is the start of fine-tuning and of pre-training."""
    rng = np.random.default_rng(0)
    state = {name: rng.normal(0, 0.05, x.shape).astype(np.float32) for name, x in STATE.items()}
    state |= {name: x for name, x in STATE.items() if name.endswith("pos_embed")}
    init = tmp_path / "init"
    convert.main([str(official(tmp_path / "a.pth", state)), str(init), "--to=ours", *FLAGS])
    wanted = open_weights(init).params
    saved = checkpoint.find(init, "init_from")

    config = finetune.get_config(f"source=bundled:digits,test=test,batch_size=8,init={init}")
    assert (config.model.width, config.model.depth) == (META["embed_dim"], META["depth"])
    config.mix.group = 8
    task = classify.Task.from_config(config)
    params, _ = task.init(jax.random.key(0))
    found = load_encoder(saved, params["encoder"], task.spec)
    assert not same(params["encoder"]["stack"], wanted["encoder"]["stack"])
    for name in ("patch_embed", "cls_token", "stack"):
        assert same(found[name], wanted["encoder"][name]), name

    config = pretrain.get_config("batch_size=8")
    made = json.loads((init / "config.json").read_text())["model"]
    config.model.update({name: tuple(x) if isinstance(x, list) else x for name, x in made.items()})
    config.data.source = "bundled:digits"
    params, _ = pretrain_task.Task.from_config(config).init(jax.random.key(0))
    assert same(checkpoint.restore(saved, params, checkpoint.PARAMS), wanted)


def test_positions_that_are_no_sine_cosine_table_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    tables = {
        name: rng.normal(size=STATE[name].shape).astype(np.float32)
        for name in ("pos_embed", "decoder_pos_embed")
    }
    source = official(tmp_path / "a.pth", STATE | tables)
    weights = open_weights(source, **HEADS)
    assert weights.spec.encoder.trained_positions and weights.spec.decoder.trained_positions
    assert sum("positions of the" in line for line in weights.report) == 2
    back = names.to_theirs(weights.params, weights.spec, "official")
    for name, table in tables.items():
        np.testing.assert_array_equal(back[name], table)


def test_the_head_of_a_linear_probe_is_folded(tmp_path):
    rng = np.random.default_rng(0)
    width = META["embed_dim"]
    probe = {
        "head.0.running_mean": rng.normal(size=width).astype(np.float32),
        "head.0.running_var": rng.uniform(0.5, 2, width).astype(np.float32),
        "head.0.num_batches_tracked": np.ones(1, np.int64),
        "head.1.weight": rng.normal(size=(5, width)).astype(np.float32),
        "head.1.bias": rng.normal(size=5).astype(np.float32),
    }
    weights = open_weights(official(tmp_path / "a.pth", ENCODER | probe), heads=META["heads"])
    assert (weights.spec.classes, weights.spec.pool) == (5, "cls")
    x = rng.normal(size=(3, width))
    normal = (x - probe["head.0.running_mean"]) / np.sqrt(probe["head.0.running_var"] + 1e-6)
    logits = normal @ probe["head.1.weight"].T + probe["head.1.bias"]
    head = weights.params["head"]
    np.testing.assert_allclose(x @ head["kernel"] + head["bias"], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("norm", "pool"), [("norm", "cls"), ("fc_norm", "avg")])
def test_robustness_is_measured_with_the_pooling_that_was_converted(norm, pool, tmp_path):
    state = {re.sub(r"^norm\.", f"{norm}.", k): x for k, x in ENCODER.items()}
    state["head.weight"] = np.ones((5, META["embed_dim"]), np.float32)
    state["head.bias"] = np.zeros(5, np.float32)
    source, out = official(tmp_path / "a.pth", state), tmp_path / "out"
    assert convert.main([str(source), str(out), "--to=ours", f"--heads={META['heads']}"]) == 0
    config = robustness.get_config(f"init={out}")
    assert (config.model.pool, open_weights(out).spec.pool) == (pool, pool)


def test_half_precision_is_read_as_float32_and_said(tmp_path):
    mixed = {k: x.astype(np.float16) if "mlp" in k else x for k, x in STATE.items()}
    weights = open_weights(official(tmp_path / "a.pth", mixed), **HEADS)
    assert {x.dtype for x in jax.tree.leaves(weights.params)} == {np.dtype("float32")}
    assert any("float16" in line for line in weights.report)


def test_fixed_positions_are_known_in_half_precision(tmp_path):
    half = {k: x.astype(np.float16) for k, x in STATE.items()}
    spec = open_weights(official(tmp_path / "a.pth", half), **HEADS).spec
    assert not (spec.encoder.trained_positions or spec.decoder.trained_positions)
    half["pos_embed"] = half["pos_embed"] + np.float16(0.01)
    spec = open_weights(official(tmp_path / "b.pth", half), **HEADS).spec
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
    source, out = official(tmp_path / "a.pth"), tmp_path / "hf"
    convert.main([str(source), str(out), "--to=hf", *FLAGS])
    wanted, path = open_weights(out), out / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if words is None:
        assert open_weights(out).spec == wanted.spec
    else:
        with pytest.raises(ValueError, match=words):
            open_weights(out)


def test_another_image_size_and_other_channels(tmp_path, capsys):
    rng = np.random.default_rng(0)
    table = {"pos_embed": rng.normal(size=STATE["pos_embed"].shape).astype(np.float32)}
    source = official(tmp_path / "a.pth", ENCODER | table)
    patch = META["patch"]
    sides = f"{patch * 2}x{patch * 7}"
    arguments = ["--channels=1", f"--image_size={sides}", *FLAGS]
    convert.main([str(source), str(tmp_path / "out"), "--to=ours", *arguments])
    assert "resized: encoder/pos_embed" in capsys.readouterr().out
    weights = open_weights(tmp_path / "out")
    assert (weights.spec.grid, weights.spec.channels) == ((2, 7), 1)
    assert weights.params["encoder"]["pos_embed"].shape == (1, 15, META["embed_dim"])
    before = open_weights(source, part="encoder", heads=META["heads"])
    levels = rng.uniform(size=(5, patch * patch, 1))

    def embedded(weights):  # of grey patches
        of_channels = (levels - weights.spec.mean) / weights.spec.std
        embed = weights.params["encoder"]["patch_embed"]
        return of_channels.reshape(len(levels), -1) @ embed["kernel"] + embed["bias"]

    np.testing.assert_allclose(embedded(weights), embedded(before), atol=1e-5)


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
    source = official(tmp_path / "a.pth")
    stream = zipfile.ZipFile(source).read("archive/data.pkl")
    namespace = b"X\x04\x00\x00\x00args" + pickle.dumps(arguments, 2)[2:-1]
    both = stream[:-1] + namespace + b"sX\x09\x00\x00\x00optimizer}s."
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        for info in zipfile.ZipFile(source).infolist():
            content = zipfile.ZipFile(source).read(info)
            archive.writestr(info.filename, both if info.filename.endswith("pkl") else content)
    weights = open_weights(tmp_path / "b.pth", **HEADS)
    assert (weights.spec.target, weights.spec.mean) == ("pixels", (0.485, 0.456, 0.406))
    assert "training checkpoint" in weights.report[0]


def damaged(path: Path, kind: str) -> Path:
    state = dict(STATE)
    if kind == "html":
        path.write_text("<!DOCTYPE html><title>403</title>")
    elif kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "old":
        path.write_bytes(pickle.dumps(state, 2))
    elif kind == "text":
        path.write_text("hello, this is no model")
    elif kind in ("cut", "flipped"):
        content = bytearray(official(path).read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if kind == "cut" else content)
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
            archive.writestr("archive/data/0", bytes(2**24))
    elif kind == "cut safetensors":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        changes = {
            "missing": {"blocks.1.attn.proj.weight": None},
            "gap": {"blocks.300000.norm1.weight": np.zeros(3, np.float32)},
            "extra": {"blocks.0.attn.rogue": np.zeros(3, np.float32)},
            "off by one": {"blocks.1.norm1.bias": np.zeros(META["embed_dim"] + 1, np.float32)},
            "integers": {"norm.weight": np.zeros(META["embed_dim"], np.int64)},
            "nan": {"norm.weight": np.full(META["embed_dim"], np.nan, np.float32)},
            "dinov2": {"patch_embed.proj.weight": None, "blocks.0.ls1.gamma": STATE["norm.weight"]},
            "resnet": dict.fromkeys(STATE) | {"layer1.0.conv1.weight": np.zeros((4, 4, 1, 1))},
            "unknown": dict.fromkeys(STATE) | {"foo.bar": np.zeros(3)},
        }
        state |= changes[kind]
        official(path, {k: x for k, x in state.items() if x is not None})
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("html", "is a web page"),
        ("lfs", "pointer of Git LFS"),
        ("empty", "is empty"),
        ("old", "bare pickle"),
        ("text", "neither a .pth file"),
        ("cut", "cut off or damaged"),
        ("flipped", "other bytes than were written"),
        ("bomb", "has compressed parts"),
        ("cut safetensors", "is damaged, or holds .*not fully covered"),
        ("missing", "partial load: blocks.1.attn.proj.weight"),
        ("gap", "blocks has 3 layers, and they are not numbered from 0"),
        ("extra", "no place for: blocks.0.attn.rogue"),
        ("off by one", r"blocks.1.norm1.bias has shape \(65,\) where \(64,\)"),
        ("integers", "norm.weight holds int64"),
        ("nan", "not finite"),
        ("dinov2", "looks like a ViT with layer scale, such as DINOv2"),
        ("resnet", "looks like ResNet"),
        ("unknown", "first tensors: foo.bar"),
    ],
)
def test_what_cannot_be_read_is_said_and_leaves_nothing_behind(kind, words, tmp_path):
    source = damaged(tmp_path / "model.pth", kind)
    with pytest.raises(ValueError, match=words):
        convert.main([str(source), str(tmp_path / "out"), "--to=hf", *FLAGS])
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_extra_tensors_are_left_out_where_that_is_said(tmp_path):
    weights = open_weights(damaged(tmp_path / "a.pth", "extra"), allow_unused=True, **HEADS)
    assert "unused: blocks.0.attn.rogue" in weights.report


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    source = official(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="timm has no decoder"):
        convert.main([str(source), str(tmp_path / "out"), "--to=timm", *FLAGS])
    with pytest.raises(ValueError, match="decoder predicts 3 channels"):
        convert.main([str(source), str(tmp_path / "out"), "--to=ours", "--channels=1", *FLAGS])
    official(tmp_path / "c.pth", golden_state(DATA / "vit_tiny_avg.npz")[0])
    with pytest.raises(ValueError, match="averages\n? *patches"):
        convert.main([str(tmp_path / "c.pth"), str(tmp_path / "out"), "--to=hf", *FLAGS])
    for form in ("official", "timm"):
        with pytest.raises(ValueError, match=r"Name the output out\.safetensors"):
            convert.main([str(source), str(tmp_path / "out.pth"), f"--to={form}", *FLAGS])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "c.pth"]


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


def test_an_output_that_is_there_is_not_overwritten(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file(STATE, source)
    with pytest.raises(ValueError, match="is there already"):
        convert.main([str(source), str(source), "--to=official", *FLAGS])
    assert load_file(source).keys() == STATE.keys()
