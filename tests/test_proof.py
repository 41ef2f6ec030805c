"""The published protocol: what its table says of runs that were stopped or not made."""

import json
import sys

import pytest

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


def test_an_error_of_a_run_ends_the_proof(tmp_path, capfd):
    with pytest.raises(SystemExit, match="pretrain ended with 2"):
        proof.train(tmp_path, "pretrain", f"data={tmp_path / 'nowhere'}", 60)
    assert "nowhere" in capfd.readouterr().err
