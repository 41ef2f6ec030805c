"""The published protocol: what its table says of runs that were stopped or not made."""

import json
import os
import subprocess
import sys

import hosts
import numpy as np
import pytest
from PIL import Image

from benchmarks import proof


def test_the_table_has_what_was_reached_last(tmp_path):
    lines = [{"step": 1, "train/loss": 0.2}, {"step": 100, "train/loss": 0.05}]
    (tmp_path / "pretrain").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "pretrain" / "metrics.jsonl").write_text(text)
    (tmp_path / "tuned").mkdir()
    found = [{"step": 100, "eval/top1": 40.0}, {"step": 180, "train/loss": 1.5}]
    (tmp_path / "tuned" / "metrics.jsonl").write_text("\n".join(map(json.dumps, found)))
    loss, *others = proof.table(tmp_path).splitlines()[2:]
    assert "| .0401 | 0.05 | 100 of 14,550 |" in loss
    assert all(line.count("|") == 5 for line in others)
    assert others[-2] == "| fine-tuned, % | 82.2 | 40 | 100 of 19,500 |"  # where it was measured
    assert others[-1] == "| from scratch, % | 73.0 |  |  |"


def test_a_folder_without_the_images_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proof.py", str(tmp_path / "runs"), str(tmp_path)])
    with pytest.raises(SystemExit):
        proof.main()
    assert "holds no train/CLASS/*.jpg" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_paths_are_those_of_the_folder_that_the_user_is_in(tmp_path):
    (tmp_path / "images").mkdir()
    script = hosts.ROOT / "benchmarks/proof.sh"
    run = subprocess.run(
        ["bash", script, "images"],
        cwd=tmp_path,
        env=os.environ | {"GPU_PYTHON": sys.executable, "WORKDIR": "runs"},
        capture_output=True,
        text=True,
    )
    assert f"{tmp_path / 'images'} holds no train/CLASS/*.jpg" in run.stderr


def test_an_error_of_a_run_ends_the_proof(tmp_path, capfd):
    with pytest.raises(SystemExit, match="pretrain ended with 2"):
        proof.train(tmp_path, "pretrain", f"data={tmp_path / 'nowhere'}", 60)
    assert "nowhere" in capfd.readouterr().err


def test_an_unknown_flag_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proof.py", str(tmp_path), str(tmp_path), "--shar=1"])
    with pytest.raises(SystemExit):
        proof.main()
    assert "--shar=1 is unknown" in capsys.readouterr().err


def test_both_calls_fill_the_table(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in range(10):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    monkeypatch.setenv("XLA_FLAGS", hosts.QUICK)  # one device, and its time is compiling
    call = ["proof.py", str(tmp_path / "runs"), str(tmp_path / "data")]
    # Half of the images, and what is given after it: two steps.
    flags = ["--small", "--share=0.5", "--config.batch_size=32"]
    flags += ["--config.train_for=2 steps", "--config.optim.warmup=1 steps"]
    for part in ([], ["tune", "--config.data.split=train"]):
        monkeypatch.setattr(sys, "argv", [*call, *part, *flags])
        proof.main()
    rows = (tmp_path / "runs" / "proof.md").read_text().splitlines()[2:]
    assert [row.split("|")[4].strip() for row in rows] == [
        "2 of 14,550", "2 of 14,550", "2 of 14,550", "2 of 19,500", "2 of 19,500"
    ]  # fmt: skip
    for row in rows:
        assert float(row.split("|")[3]) >= 0
