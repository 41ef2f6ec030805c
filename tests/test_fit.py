"""The loop: what a run leaves behind, when it stops, and what it refuses."""

import itertools
import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_train import tiny_config

from mae_jax import checkpoint, distributed, metrics, optim, sharding, train
from mae_jax.commands import train as command
from mae_jax.tasks import pretrain


def run(workdir, config, make=pretrain.make_task):
    mesh = sharding.make_mesh(**config.mesh)
    task = make(config, sharding.constrain_batch(mesh))
    return train.fit(config, workdir, task, mesh)


@pytest.fixture
def config():
    config = tiny_config(log_every="2 steps")
    config.train_for = "5 steps"
    config.evals.reconstruct.update(every="", split="test[:16]", images=16, batch_size=16)
    config.checkpoint.update(every="2 steps", keep_every="")
    return config


def test_a_run_leaves_config_metrics_pictures_and_checkpoints(tmp_path, config, capsys):
    state = run(tmp_path, config)
    assert int(state.step) == 5
    assert {p.name for p in tmp_path.iterdir()} >= {
        "config.json", "env.json", "checkpoints", "metrics.jsonl", "tensorboard", "images", "logs",
    }  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["mask_ratio"] == 0.75
    lines = metrics.read(tmp_path / "metrics.jsonl")
    losses = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 4, 5]
    assert losses[0].keys() >= {
        "train/loss", "train/lr", "train/grad_norm", "perf/images_per_sec_per_chip",
        "perf/data_wait_frac", "data/bad_images",
    }  # fmt: skip
    assert losses[0]["train/lr"] == 0  # warm-up starts at exactly 0
    assert [line["step"] for line in lines if "eval/loss" in line] == [5]
    assert len(list((tmp_path / "images").glob("*_0000005.png"))) == 1
    said = capsys.readouterr().out
    assert "parameters: " in said and "GFLOPs per image" in said and "peak lr" not in said

    run(tmp_path, config)
    assert "finished: 5 of 5 steps" in capsys.readouterr().out
    assert metrics.read(tmp_path / "metrics.jsonl") == lines


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, config):
    def explode_later(config, constrain):
        """A gradient that is infinite from the fourth update on, where the rate is no longer 0."""
        task = pretrain.make_task(config, constrain)

        def loss(params, extra, batch, rng, train):
            value, rest = task.loss(params, extra, batch, rng, train)
            size = sum((p * p).sum() for p in jax.tree.leaves(params["encoder"]["stack"]))
            return value + jax.numpy.where(size != first, 1.0, 0.0) * np.inf * size, rest

        first = sum((p * p).sum() for p in jax.tree.leaves(
            jax.jit(task.init)(train.stream(0, "init", 0))[0]["encoder"]["stack"]))  # fmt: skip
        return task._replace(loss=loss)

    with pytest.raises(
        train.NonFiniteError, match=r"step \d: loss .*gradient norm .*checkpoint is"
    ):
        run(tmp_path, config, explode_later)
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved in ([], [2])


def test_a_missing_checkpoint_interval_or_mask_is_refused_before_anything_is_written(
    tmp_path, config
):
    config.checkpoint.keep_every = "3 steps"
    with pytest.raises(ValueError, match="not a multiple of every='2 steps'"):
        run(tmp_path / "a", config)
    config.checkpoint.keep_every = ""
    config.batch_size = 12
    with pytest.raises(ValueError, match="choose a multiple such as 16"):
        run(tmp_path / "a", config)
    config.batch_size = 4000
    with pytest.raises(ValueError, match="fewer than one batch"):
        run(tmp_path / "a", config)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.mask_ratoi=0.9", 'Did you mean "mask_ratio"'),
        ("--config.model.patch_siz=8", 'Did you mean "patch_size"'),
        ("--config.evals.knn.every=5", "no such key in the config: 'knn'"),
        ("--config.mask_ratio=nan", "mask_ratio is not a number"),
        ("--config.mask_ratio=much", "could not convert string to float"),
        ("--config.seed=1.5", "invalid literal for int"),
        ("--nope=1", "nope"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_a_mistyped_option_is_refused_with_what_was_meant(override, words):
    with pytest.raises(ValueError, match=words):
        command.parse(["--config=configs/pretrain.py", override])


@pytest.mark.parametrize(
    ("argument", "words"),
    [("variant=Q/16", "B/16"), ("size=3", "variant"), ("epochs=many", "wants a int")],
)
def test_a_mistyped_argument_of_a_config_is_refused(argument, words):
    with pytest.raises(ValueError, match=words):
        command.parse([f"--config=configs/pretrain.py:{argument}"])


def test_configs_take_arguments_overrides_and_lie_anywhere(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from configs.pretrain import get_config as recipe\n\n\n"
        "def get_config(arg=None):\n    config = recipe(arg)\n    config.mask_ratio = 0.6\n"
        "    return config\n"
    )
    config, workdir = command.parse(
        [f"--config={mine}:variant=L/16,epochs=1600", "--config.model.image_size=(224,448)"]
    )
    assert (config.model.width, config.mask_ratio) == (1024, 0.6)
    assert config.train_for == "1600 epochs"
    assert config.model.image_size == (224, 448)
    assert workdir == "workdir/mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_ratio": 0.999}, "mask_ratio=0.999 keeps 0 of 16 patches"),
        ({"mask_ratio": 0.0}, "hides|hidden"),
        ({"model.image_size": (33, 32)}, "33 pixels high is not a whole number of patches of 8"),
        ({"model.heads": 5}, "width=32 is not divisible by heads=5"),
        ({"masking.name": "rnadom"}, "no function 'rnadom'; nearest: random"),
        ({"masking.name": "no.such.mask"}, "cannot import 'no.such'"),
        ({"target.name": "pixls"}, "nearest: pixels|norm_pixels"),
        ({"masking.name": "grid", "mask_ratio": 0.5}, "2 x 2"),
        ({"data.mean": (0.5, 0.5)}, "config.data.mean has 2 numbers for images of 1 channel"),
        ({"data.source": "folder:/nowhere"}, "nowhere"),
        ({"data.crop": "centre"}, "nearest: center"),
        ({"data.crop": "mae_jax.data.transforms.decode"}, "is no function .picture"),
        ({"target.name": "jax.numpy.mean"}, r"returned shape \(\) for patches of shape"),
        ({"masking.name": "keep_lowest"}, "is no function .rng, batch, grid, ratio"),
        ({"model.attention": "flash"}, "config.model.attention='flash'; "),
        ({"model.dtype": "bf16"}, "model.dtype='bf16': give one of float32, bfloat16"),
        ({"model.heads": 0}, "model.heads=0 must be at least 1"),
        ({"model.depth": 0}, "model.depth=0 must be at least 1"),
        ({"model.mlp_ratio": 0.0}, "leaves nothing inside"),
        ({"optim.blr": -1.0}, "optim.blr=-1.0 must be at least 0"),
        ({"optim.b1": 1.5}, "optim.b1=1.5 must be"),
    ],
    ids=str,
)
def test_an_impossible_value_is_refused_in_words(changes, words):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=words):
        pretrain.make_task(config)


def test_sizes_given_as_one_number_and_unknown_tasks_are_refused(tmp_path):
    config = tiny_config()
    config.unlock()
    config.model.image_size = (32,)
    with pytest.raises(ValueError, match="written as .height, width."):
        pretrain.make_task(config)
    with pytest.raises(ValueError, match="cannot import 'mae_jax.tasks.pretrian'"):
        command.main(
            ["--config=configs/quickstart.py", "--config.task=pretrian", f"--workdir={tmp_path}/x"]
        )


@pytest.fixture
def slow_saves(monkeypatch):
    write = checkpoint.Checkpointer._write_digests

    def slowly(self):
        time.sleep(2)
        write(self)

    monkeypatch.setattr(checkpoint.Checkpointer, "_write_digests", slowly)


def test_a_loss_that_is_not_finite_does_not_cost_the_save_before_it(tmp_path, config, slow_saves):
    def explode(config, constrain):
        task = pretrain.make_task(config, constrain)

        def batches(start, rows):
            for step, (batch, *rest) in enumerate(task.batches(start, rows)):
                yield batch | {"last": np.full(len(batch["image"]), step == 3)}, *rest

        def loss(params, extra, batch, rng, train):
            value, rest = task.loss(params, extra, batch, rng, train)
            return value * jax.numpy.where(batch["last"].any(), np.nan, 1.0), rest

        inputs = task.inputs | {"last": jax.ShapeDtypeStruct((), bool)}
        return task._replace(batches=batches, loss=loss, inputs=inputs)

    with pytest.raises(train.NonFiniteError, match="step 4: loss nan.*checkpoint is step 2"):
        run(tmp_path, config, explode)
    assert (tmp_path / "checkpoints/2/digests.json").exists()


def test_an_error_does_not_cost_the_save_before_it(tmp_path, config, slow_saves):
    def break_off(config, constrain):
        task = pretrain.make_task(config, constrain)

        def batches(start, rows):
            yield from itertools.islice(task.batches(start, rows), 3)
            raise MemoryError

        return task._replace(batches=batches)

    with pytest.raises(MemoryError):
        run(tmp_path, config, break_off)
    assert (tmp_path / "checkpoints/2/digests.json").exists()


def test_asked_to_stop_before_the_first_update_again_and_again(tmp_path, config, monkeypatch):
    monkeypatch.setattr(distributed, "preemption", lambda: lambda: True)
    for _ in range(2):
        with pytest.raises(distributed.Preempted, match="asked to stop at step 0 of 5"):
            run(tmp_path, config)


def test_a_run_that_is_over_is_not_resumed_in_another_workdir(tmp_path, config):
    run(tmp_path / "a", config)
    config.resume = str(tmp_path / "a")
    with pytest.raises(ValueError, match="is 5 steps: nothing is left to do; give a longer one"):
        run(tmp_path / "b", config)
    assert not (tmp_path / "b/config.json").exists()


def test_a_warmup_longer_than_the_run_is_said():
    config = tiny_config()
    config.optim.warmup = "40 steps"
    task, mesh = pretrain.make_task(config), sharding.make_mesh(**config.mesh)
    step = SimpleNamespace(memory_analysis=lambda: None)
    program = SimpleNamespace(step=step, state_shapes=SimpleNamespace(params={}))
    peak = optim.peak_lr(config.optim.blr, config.batch_size)
    short, long = (train.describe(task, program, config, mesh, n, 5)[-1] for n in (10, 40))
    assert f"it ends at {peak / 4:.3g}, since config.optim.warmup='40 steps' is longer" in short
    assert long == f"learning rate: peak {peak:.3g}"
