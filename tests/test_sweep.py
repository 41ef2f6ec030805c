"""`mae-jax sweep`: rows of a recipe, run in turn, resumed, measured and put into one table."""

import csv
import importlib
import json

import numpy as np
import pytest
from tiny import batch_of, compiled, mesh_of

from mae_jax import sharding, tasks, topologies
from mae_jax.commands import recipes, sweep
from mae_jax.config import steps
from mae_jax.configs.cifar10 import get_config as cifar10
from mae_jax.errors import UserError
from mae_jax.metrics import table
from mae_jax.models.spec import ModelSpec

ABLATIONS = recipes.names("ablations")
DIGITS = "--config=configs/ablations/masks.py:base=digits"
TINY = (
    "--config.model.width=16", "--config.model.depth=2", "--config.model.decoder_width=16",
    "--config.model.decoder_depth=1", "--config.train_for=2 steps", "--config.optim.warmup=1 steps",
    "--config.evals.logistic.layers=last", "--config.evals.logistic.bank_split=train[:200]",
    "--config.evals.knn.bank_split=train[:200]", "--config.evals.knn.split=test[:40]",
    "--config.evals.logistic.split=test[:40]", "--config.evals.reconstruct.images=16",
    "--config.evals.reconstruct.batch_size=16", "--config.batch_size=16",
)  # fmt: skip


def expanded(name, arg="base=digits"):
    config = importlib.import_module(f"mae_jax.configs.{name.replace('/', '.')}").get_config(arg)
    config.model.update(width=16, depth=1, decoder_width=16, decoder_depth=1, scan_unroll=1)
    config.batch_size = 16
    return sweep.expand(config)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_takes_two_steps(name):
    """All rows are built; the first and the last, which is farthest from the recipe, also train."""
    mesh = mesh_of(1, 1, 1)
    rows = [(row, *runs.values()) for row, runs in expanded(name).items()]
    for _, config in rows:
        tasks.build(config, mesh)
    for row, config in (rows[0], rows[-1]):
        _, state, step = compiled(config, mesh)
        for seed in (0, 1):
            batch = {"image": batch_of(config, seed)["image"]}
            state, metrics = step(state, sharding.put_batch(mesh, batch, config.batch_size))
            assert np.isfinite(metrics["loss"]), row


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_paper_has_numbers_of_rows_that_there_are(name):
    module = importlib.import_module(f"mae_jax.configs.{name.replace('/', '.')}")
    config = module.get_config("base=imagenet")
    assert set(config.sweep.paper) <= set(config.sweep.rows)
    for runs in sweep.expand(config).values():
        (run,) = runs.values()
        assert (run.model.width, run.train_for) == (1024, "800 epochs")
        assert "sweep" not in run


def run(tmp_path, *argv):
    return sweep.main([DIGITS, *TINY, f"--workdir={tmp_path / 'run'}", *argv])


def test_a_sweep_runs_rows_resumes_and_writes_one_table(tmp_path, capsys):
    assert run(tmp_path, "--only=grid_75") == 0
    root = tmp_path / "run"
    assert [x.name for x in root.iterdir() if x.is_dir()] == ["grid_75"]
    config = json.loads((root / "grid_75" / "config.json").read_text())
    assert config["masking"]["name"] == "grid"
    text = (root / "table.md").read_text()
    assert text in capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert rows["grid_75"].endswith("| 84.0 | 66.0 |")
    assert "not run" in rows["green"]
    with open(root / "table.csv") as file:
        numbers = {row["row"]: row for row in csv.DictReader(file)}
    assert set(numbers) == {"grid_75"}
    measured = table.measured(root / "grid_75")
    assert float(numbers["grid_75"]["logistic_cls"]) == measured["logistic_cls"]
    assert 0 < measured["knn20_cls"] <= measured["knn20_cls, best block of these images"] <= 100
    assert (root / "table.png").read_bytes().startswith(b"\x89PNG")

    # The same again makes only what is missing, and its table has all.
    assert run(tmp_path, "--only=random,grid_75") == 0
    lines = (root / "grid_75" / "logs" / "host_0.log").read_text()
    assert "nothing to do" in lines
    with open(root / "table.csv") as file:
        assert [row["row"] for row in csv.DictReader(file)] == ["random", "grid_75"]


def test_a_dry_run_shows_what_each_run_takes_and_writes_nothing(tmp_path, capsys):
    argv = ["--config=ablations/decoder", f"--workdir={tmp_path / 'run'}", "--dry-run"]
    assert sweep.main([*argv, "--only=depth_1,depth_8"]) == 0
    out = capsys.readouterr().out
    cells = {line.split()[1]: line.split()[3::2] for line in out.splitlines() if "depth_" in line}
    assert cells["depth_8"][0] == "329,239,296"  # as official
    assert int(cells["depth_1"][0].replace(",", "")) == 329_239_296 - 7 * 3_152_384
    assert float(cells["depth_1"][4]) < float(cells["depth_8"][4])
    assert "2 runs" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_a_run_of_any_length_warms_up_for_a_tenth_of_it(epochs):
    config = cifar10(f"small=true,epochs={epochs}")
    total, warmup = (steps(x, 256, 195) for x in (config.train_for, config.optim.warmup))
    assert warmup == pytest.approx(total / 10, abs=1)


def test_several_seeds_are_several_runs_of_a_row():
    rows = expanded("ablations/tokens", "base=digits,seeds=3")
    assert list(rows["without"]) == ["without-0", "without-1", "without-2"]
    assert [run.seed for run in rows["without"].values()] == [0, 1, 2]
    assert list(sweep.chosen(rows, ["without-1"])) == ["without-1"]
    assert list(sweep.chosen(rows, ["without"])) == list(rows["without"])
    runs = {"a": [{"logistic_cls": x} for x in (10.0, 12.0)], "b": [{}]}
    text = table.markdown(runs, {"a": (1.0, 2.0)})
    assert "| a | 11.0 ± 1.4 (2) | 1.0 | 2.0 |\n| b | not run | - | - |" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config=pretrain"], "no config.sweep: give one of .*configs/ablations/masks.py"),
        ([DIGITS, "--only=blue"], "--only=blue: there is no such row"),
        (["--config=ablations/maks"], "there are: .*ablations/masks"),
        ([f"{DIGITS},seeds=0"], "config.sweep.seeds=0"),
        (["--config=ablations/masks:base=mnist"], "base='mnist': give one of imagenet"),
        (["--config=ablations/masks", "--dry_run", "--topology=h1"], "there is no topology 'h1'"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        sweep.main(argv)
    assert not list(tmp_path.iterdir())


def test_a_row_that_changes_a_key_that_there_is_not_is_refused():
    config = importlib.import_module("mae_jax.configs.ablations.tokens").get_config("base=digits")
    config.sweep.rows.without = dict(model=dict(decoder_deth=3))
    with pytest.raises(UserError, match="row 'without': no such key 'model.decoder_deth'; nearest"):
        sweep.expand(config)


def test_a_row_takes_its_share_of_the_rate_that_is_given_and_no_flag_is_overruled(tmp_path):
    rows = expanded("ablations/optimizers", "base=digits,blr=3e-3")
    assert rows["lion"]["lion"].optim.blr == pytest.approx(1e-3)
    assert rows["adamw"]["adamw"].optim.blr == 3e-3
    recipe = "--config=configs/ablations/optimizers.py:base=digits"
    with pytest.raises(UserError, match=r"--config.optim.blr: row 'lion' sets it.*blr=RATE"):
        sweep.main([recipe, "--config.optim.blr=3e-3", f"--workdir={tmp_path}/x"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("optimizers", "--config.optim.clip_norm=0.5"), "optim.clip_norm: row 'clipped' sets it"),
        (("optimizers", "--config.optim.name=muon"), "optim.name: row 'muon' sets it"),
        (("masks:base=digits,data=x",), "data='x' is for base=cifar10 only"),
        (("masks:base=digits", "--mfu=0"), "--mfu=0.0 is a fraction"),
        (("masks:base=digits", "--mfu=-3"), "--mfu=-3.0 is a fraction"),
        (("masks:base=digits", "--profile=1:2"), "--profile is for one run"),
    ],
)
def test_what_a_sweep_would_ignore_or_cannot_count_is_refused(arguments, words):
    recipe, *flags = arguments
    with pytest.raises(UserError, match=words):
        sweep.main([f"--config=ablations/{recipe}", *flags, "--dry_run"])


@pytest.mark.parametrize("base", ["imagenet", "cifar10", "cifar10,small=false", "digits"])
def test_every_row_of_the_decoder_has_heads_that_divide_its_width(base):
    config = importlib.import_module("mae_jax.configs.ablations.decoder").get_config(f"base={base}")
    for runs in sweep.expand(config).values():
        for run in runs.values():
            ModelSpec.from_config(run.to_dict())


def test_a_chip_of_v3_is_two_devices():
    counts = {name: topologies.parse(name).devices for name in ("v3:8x8", "v5e:4x4", "h100:8")}
    assert counts == {"v3:8x8": 128, "v5e:4x4": 16, "h100:8": 8}
    assert topologies.parse("v3:2x2", 2).devices == 16
