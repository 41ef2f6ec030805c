"""The launch scripts refuse what they cannot work with, in words, and touch nothing then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"


def launch(script: str, cwd: Path, **environment: object) -> subprocess.CompletedProcess:
    env = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        ["bash", LAUNCH / script], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def fake_python(path: Path, commands: str) -> Path:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_old_python_is_named_with_the_way_out(script, tmp_path):
    old = fake_python(tmp_path / "old python", "echo 3.9; exit 1")
    run = launch(script, tmp_path, PYTHON=old, VENV=tmp_path / "venv")
    assert run.returncode == 1
    assert f"Python 3.11 or newer is needed, but {old} is 3.9." in run.stderr
    assert "Set PYTHON=" in run.stderr
    assert not (tmp_path / "venv").exists()


def test_python_without_venv_is_told_what_to_install(tmp_path):
    bare = fake_python(tmp_path / "python", "case $2 in *venv*) exit 1;; esac; echo 3.11")
    run = launch("quickstart.sh", tmp_path, PYTHON=bare, VENV=tmp_path / "venv")
    assert run.returncode == 1
    assert "apt install python3.11-venv" in run.stderr


def test_folder_of_somebody_else_is_never_emptied(tmp_path):
    theirs = tmp_path / "venv" / "bin" / "precious"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    run = launch("quickstart.sh", tmp_path, PYTHON=sys.executable, VENV="venv")
    assert run.returncode == 1
    assert f"{tmp_path}/venv was not made by launch/setup.sh" in run.stderr
    assert theirs.exists()
