"""The loop: what a run leaves behind, when it stops, and what it refuses."""

import contextlib
import itertools
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import finetune_config, probe_config, run, tiny_config

from mae_jax import checkpoint, distributed, optim, report, tasks, train
from mae_jax.commands import train as command
from mae_jax.data import eval_pipeline
from mae_jax.mesh import make_mesh
from mae_jax.metrics import summary, writer
from mae_jax.schedule import Schedule
from mae_jax.tasks import examples, pretrain

ONE = (1, 1, 1)  # device: less to compile


def whole_images(images_BHWC, patch_size):
    """A target without patches."""
    return images_BHWC


class LastIsMarked(examples.TrainImages):
    """Batches that say whether they are the fourth."""

    @property
    def inputs(self):
        return {**super().inputs, "last": jax.ShapeDtypeStruct((), bool)}

    def batches(self, start_step, rows):
        for step, (batch, *rest) in enumerate(super().batches(start_step, rows)):
            yield batch | {"last": np.full(len(batch["image"]), step == 3)}, *rest


class FailsAtStepThree(pretrain.Task):
    """A loss that is not a number in the fourth update."""

    @classmethod
    def from_config(cls, config, mesh=None):
        task = super().from_config(config, mesh)
        return replace(task, examples=LastIsMarked(**vars(task.examples)))

    def loss(self, params, extra, batch, rng, train):
        value, rest = super().loss(params, extra, batch, rng, train)
        return value * jax.numpy.where(batch["last"].any(), np.nan, 1.0), rest


class ExplodesLater(FailsAtStepThree):
    """A gradient that is infinite in the fourth update."""

    def loss(self, params, extra, batch, rng, train):
        value, rest = pretrain.Task.loss(self, params, extra, batch, rng, train)
        size = sum((p * p).sum() for p in jax.tree.leaves(params["encoder"]["stack"]))
        return value + jax.numpy.where(batch["last"].any(), np.inf, 0.0) * size, rest


class Broken(examples.TrainImages):
    """Batches that end with an error."""

    def batches(self, start_step, rows):
        yield from itertools.islice(super().batches(start_step, rows), 3)
        raise MemoryError


class BreaksOff(pretrain.Task):
    """A task whose images end."""

    @classmethod
    def from_config(cls, config, mesh=None):
        task = super().from_config(config, mesh)
        return replace(task, examples=Broken(**vars(task.examples)))


@pytest.fixture
def config():
    config = tiny_config(log_every="2 steps")
    config.train_for = "5 steps"
    config.evals.reconstruct.update(every="", split="test[:16]", images=16, batch_size=16)
    config.checkpoint.update(every="2 steps", keep_every="")
    return config


def test_a_run_leaves_config_metrics_pictures_and_checkpoints(tmp_path, config, capsys):
    state = run(config, tmp_path, ONE)
    assert int(state.step) == 5
    assert {p.name for p in tmp_path.iterdir()} >= {
        "config.json", "env.json", "checkpoints", "metrics.jsonl", "tensorboard", "images", "logs",
    }  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["mask_ratio"] == 0.75
    lines = writer.read(tmp_path / "metrics.jsonl")
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

    run(config, tmp_path, ONE)
    assert "finished: 5 of 5 steps" in capsys.readouterr().out
    assert writer.read(tmp_path / "metrics.jsonl") == lines


def test_an_evaluation_names_a_checkpoint_if_its_state_is_saved(tmp_path, config, monkeypatch):
    named, evaluation = {}, report.Reporter.evaluation

    def recording(self, step, evaluator, state, saved_as):
        named[step] = saved_as and Path(saved_as).relative_to(tmp_path)
        evaluation(self, step, evaluator, state, saved_as)

    monkeypatch.setattr(report.Reporter, "evaluation", recording)
    config.evals.reconstruct.every = "1 steps"
    run(config, tmp_path, ONE)
    saved = {step: Path(f"checkpoints/{step}") for step in (2, 4, 5)}
    assert named == dict.fromkeys((0, 1, 3)) | saved


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, config):
    config.task = "test_fit.ExplodesLater"
    with pytest.raises(
        train.NonFiniteError, match=r"step \d: loss .*gradient norm .*checkpoint is"
    ):
        run(config, tmp_path, ONE)
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved in ([], [2])


def test_a_missing_checkpoint_interval_or_mask_is_refused_before_anything_is_written(
    tmp_path, config
):
    config.checkpoint.keep_every = "3 steps"
    with pytest.raises(ValueError, match="not a multiple of every='2 steps'"):
        run(config, tmp_path / "a")
    config.checkpoint.keep_every = ""
    config.batch_size = 12
    with pytest.raises(ValueError, match="choose a multiple such as 16"):
        run(config, tmp_path / "a")
    config.batch_size = 4000
    with pytest.raises(ValueError, match="fewer than one batch"):
        run(config, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_ratio": 0.999}, "mask_ratio=0.999 keeps 0 of 16 patches"),
        ({"model.image_size": (33, 32)}, "33 pixels high is not a whole number of patches of 8"),
        ({"model.heads": 5}, "width=32 is not divisible by heads=5"),
        ({"masking.name": "rnadom"}, "'rnadom' is unknown; nearest: random"),
        ({"masking.name": "no.such.mask"}, "cannot import 'no.such'"),
        ({"target.name": "pixls"}, "nearest: pixels|norm_pixels"),
        ({"masking.name": "grid", "mask_ratio": 0.5}, "2 x 2"),
        ({"data.mean": (0.5, 0.5)}, "mean has 2 numbers for images of 1 channel"),
        ({"data.source": "folder:/nowhere"}, "nowhere"),
        ({"data.crop": "centre"}, "nearest: center"),
        ({"data.crop": "mae_jax.data.decode.decode"}, "is no function .picture"),
        ({"target.name": "test_fit.whole_images"}, r"returned shape \(2, 32, 32, 1\) for 2 images"),
        ({"target.name": "jax.numpy.cos"}, "is no function .images_BHWC, patch_size"),
        ({"masking.name": "keep_lowest"}, "is no function .rng, batch, grid, ratio"),
        ({"model.attention": "flash"}, "config.model.attention='flash'; "),
        ({"model.dtype": "bf16"}, "model.dtype='bf16'; nearest: bfloat16"),
    ],
    ids=str,
)
def test_an_impossible_value_is_refused_in_words(changes, words):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=words):
        tasks.build(config)


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        (tiny_config, {"optim.cooldown": 0.5}, "optim.cooldown=0.5 is for schedule=wsd"),
        (tiny_config, {"optim.name": "lion", "optim.eps": 1e-3}, "optim.eps=0.001 is not for Lion"),
        (
            tiny_config,
            {"model.decoder_share": 0.5},
            "model.decoder_share=0.5: task 'pretrain' does",
        ),
        (finetune_config, {"data.repeat": 4}, "data.repeat=4: task 'classify' does not read it"),
        (probe_config, {"data.repeat": 4}, "data.repeat=4: task 'probe' does not read it"),
        (probe_config, {"optim.eps": 1e-3}, "optim.eps=0.001: task 'probe' does not read it"),
    ],
)
def test_an_optional_key_that_would_do_nothing_or_harm_is_refused(recipe, changes, words):
    config = recipe()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=f"config.{words}"):
        tasks.build(config).optimizer(10, 10)


def test_sizes_given_as_one_number_and_unknown_tasks_are_refused(tmp_path):
    config = tiny_config()
    config.unlock()
    config.model.image_size = (32,)
    with pytest.raises(ValueError, match="written as .height, width."):
        tasks.build(config)
    with pytest.raises(ValueError, match="'pretrian' is unknown; nearest: pretrain"):
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
    config.task = "test_fit.FailsAtStepThree"
    with pytest.raises(train.NonFiniteError, match="step 4: loss nan.*checkpoint is step 2"):
        run(config, tmp_path, ONE)
    assert (tmp_path / "checkpoints/2/digests.json").exists()


def test_an_error_does_not_cost_the_save_before_it(tmp_path, config, slow_saves):
    config.task = "test_fit.BreaksOff"
    with pytest.raises(MemoryError):
        run(config, tmp_path, ONE)
    assert (tmp_path / "checkpoints/2/digests.json").exists()


def test_asked_to_stop_before_the_first_update_again_and_again(tmp_path, config, monkeypatch):
    always = contextlib.nullcontext(lambda: True)
    monkeypatch.setattr(distributed, "listening", lambda: always)
    for _ in range(2):
        with pytest.raises(distributed.Preempted, match="asked to stop at step 0 of 5"):
            run(config, tmp_path, ONE)


def test_a_stop_between_evaluators_leaves_the_others_to_the_next_start(
    tmp_path, config, monkeypatch
):
    config.train_for = "0 steps"
    first = dict(config.evals.reconstruct, every="", images=8, batch_size=8)
    config.evals = dict(first=first, second=dict(first, prefix="eval_second"))
    asked = itertools.count()
    once = contextlib.nullcontext(lambda: next(asked) == 1)
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "listening", lambda: once)
        with pytest.raises(distributed.Preempted, match="start again to measure what is missing"):
            run(config, tmp_path, ONE)
    assert [*writer.read(tmp_path / "metrics.jsonl")[0]][1] == "eval/loss"
    run(config, tmp_path, ONE)
    lines = writer.read(tmp_path / "metrics.jsonl")
    assert [[*line][1] for line in lines] == ["eval/loss", "eval_second/loss"]
    run(config, tmp_path, ONE)  # finished: everything is measured again
    assert [[*line][1] for line in writer.read(tmp_path / "metrics.jsonl")] == [
        "eval/loss", "eval_second/loss"
    ]  # fmt: skip


def test_a_stop_during_an_evaluation_saves_first_and_evaluates_after_the_resume(
    tmp_path, config, monkeypatch
):
    config.evals.reconstruct.update(every="2 steps", images=20, batch_size=8)
    read, asked = eval_pipeline.eval_batches, []

    def ask_to_stop(*args, **kwargs):
        for number, batch in enumerate(read(*args, **kwargs)):
            yield batch
            if number == 0 and (tmp_path / "asking").exists():
                asked.append(os.kill(os.getpid(), signal.SIGTERM))

    def evaluated():
        metrics = tmp_path / "a/metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [x["step"] for x in map(json.loads, lines) if "eval/loss" in x]

    monkeypatch.setattr(eval_pipeline, "eval_batches", ask_to_stop)
    config.train_for = "2 steps"
    (tmp_path / "asking").touch()
    with pytest.raises(distributed.Preempted, match="asked to stop at step 0 of 2: it is saved"):
        run(config, tmp_path / "a", ONE)
    assert (len(asked), evaluated()) == (1, [])
    (tmp_path / "asking").unlink()
    run(config, tmp_path / "a", ONE)
    assert evaluated() == [0, 2]
    (tmp_path / "asking").touch()
    run(config, tmp_path / "a", ONE)  # nothing is left to measure
    assert (len(asked), evaluated()) == (1, [0, 2])


def test_a_run_that_is_over_is_not_resumed_in_another_workdir(tmp_path, config):
    run(config, tmp_path / "a", ONE)
    config.resume = str(tmp_path / "a")
    with pytest.raises(ValueError, match="is 5 steps: nothing is left to do; give a longer one"):
        run(config, tmp_path / "b", ONE)
    assert not (tmp_path / "b/config.json").exists()
    config.train_for = "6 steps"
    run(config, tmp_path / "b", ONE)
    assert int(run(config, tmp_path / "b", ONE).step) == 6  # the same command once more


def test_intervals_in_epochs_and_in_steps_are_compared_in_steps(tmp_path, config):
    config.train_for = "1 steps"  # of 89 in an epoch
    config.checkpoint.update(every="89 steps", keep_every="2 epochs")
    assert int(run(config, tmp_path, ONE).step) == 1


@pytest.mark.parametrize(("steps", "rising"), [(10, True), (50, False)])
def test_a_warmup_longer_than_the_run_is_said(tmp_path, capsys, steps, rising):
    config = tiny_config()
    config.optim.warmup, config.train_for = "40 steps", f"{steps} steps"
    task, mesh = tasks.build(config), make_mesh(**config.mesh)
    schedule = Schedule.from_config(config, 5)
    step = SimpleNamespace(memory_analysis=lambda: None)
    rate = task.optimizer(steps, 5)[1]
    reporter = report.Reporter(
        tmp_path, mesh, task, schedule, start=0, batch_size=16, started="from scratch",
        learning_rate=rate, check=print, heartbeat=print,
    )  # fmt: skip
    reporter.start_up(step, {}, 1)
    line = capsys.readouterr().out.splitlines()[-2]
    peak = optim.peak_lr(config.optim.blr, config.batch_size)
    highest = peak * 9 / 40 if rising else peak
    assert float(line.split()[3].rstrip(",")) == pytest.approx(highest, rel=2e-3)
    assert line.endswith("config.optim.warmup is not over when the run ends") == rising


def test_the_closing_hint_fits_the_run(tmp_path, config):
    run(config, tmp_path, ONE)
    after_digits, after_own = (summary.lines(str(tmp_path), own)[-1] for own in (False, True))
    assert "your own images" in after_digits
    assert "your own images" not in after_own and f"knn:init={tmp_path}" in after_own
