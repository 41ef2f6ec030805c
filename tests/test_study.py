"""A study in its shortest form: its runs learn, and are not made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compiler
import pytest

ROOT = Path(__file__).parents[1]
FLAGS = f"--xla_backend_optimization_level=1 {compiler.FLAG}"


def study(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    one_device = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    environment = os.environ | one_device
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def values(workdir: Path, key: str) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [metrics[key] for metrics in map(json.loads, lines) if key in metrics]


def test_a_short_study_learns_and_is_made_once(tmp_path):
    made = study("launch/study_short.py", tmp_path)
    assert made.returncode == 0, made.stderr
    losses = values(tmp_path / "pretrain", "train/loss")
    assert losses[-1] < 0.7 * losses[0]
    trained, untrained = (
        values(tmp_path / name, "eval/logistic_cls")[-1] for name in ("knn-mae", "knn-random")
    )
    assert trained > untrained
    again = study("launch/study_short.py", tmp_path)
    assert again.returncode == 0, again.stderr
    assert "3 runs, 3 of them done before" in again.stdout
    assert f"| MAE | {trained:.1f} |" in again.stdout


@pytest.mark.parametrize(
    ("name", "wanted"), [("cifar10", "train/CLASS/*.jpg"), ("camvid", "{train,test}/labels")]
)
def test_a_study_without_its_images_says_where_they_should_be(name, wanted, tmp_path):
    refused = study(f"launch/study_{name}.py", tmp_path / "study", tmp_path)
    assert refused.returncode == 2
    assert f"holds no {wanted}" in refused.stderr
    assert not (tmp_path / "study").exists()
