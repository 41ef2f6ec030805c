"""The command line finds commands without importing them, and reports errors as users need them."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mae_jax import __main__ as cli
from mae_jax import __version__, commands


@pytest.fixture
def add_command(tmp_path, monkeypatch):
    """Adds a command to the package, for the length of a test."""

    def add(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"mae_jax.commands.{name}", raising=False)

    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    return add


FILES = Path(commands.__file__).parent.glob("*.py")
COMMANDS = {path.stem for path in FILES if "\ndef main(" in path.read_text()}


def test_help_lists_every_command_with_one_line(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert set(listed) == COMMANDS and "cli" not in listed
    assert all(listed.values())


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["trian"]])
def test_help_and_mistyped_commands_import_nothing_but_the_standard_library(argv):
    code = (
        "import sys; before = set(sys.modules);"
        "from mae_jax.__main__ import main; main(sys.argv[1:]);"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "['mae_jax']"


@pytest.mark.parametrize(
    ("argv", "words"),
    [([], "usage: mae-jax COMMAND"), (["--version"], f"mae-jax {__version__}\n")],
)
def test_no_command_prints_the_help_and_version_that_of_the_package(argv, words, capsys):
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith(words)


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "mae-jax: no command 'trian'; nearest: train\n"
    assert cli.main(["zzz"]) == 2
    assert "train" in capsys.readouterr().err


def test_command_gets_its_arguments_and_sets_the_exit_status(add_command, capsys):
    add_command("echo", "def main(argv):\n    print(argv)\n    return 7")
    assert cli.main(["echo", "--config=a b", "x"]) == 7
    assert capsys.readouterr().out == "['--config=a b', 'x']\n"
    add_command("silent", "def main(argv):\n    pass")
    assert cli.main(["silent"]) == 0


CHECK = """
from mae_jax.errors import UserError

def main(argv):
    raise UserError("size=0: at least 1")
"""


def test_failed_check_is_one_clear_message_and_a_traceback_on_request(
    add_command, monkeypatch, capsys
):
    monkeypatch.delenv("MAE_JAX_TRACEBACK", raising=False)
    add_command("check", CHECK)
    assert cli.main(["check"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mae-jax check: size=0: at least 1\n")
    assert "Traceback" not in error
    monkeypatch.setenv("MAE_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="at least 1"):
        cli.main(["check"])


@pytest.mark.parametrize(
    "bug",
    [
        "int('x')",  # raised by Python
        "import numpy; numpy.zeros(3).reshape(2, 2)",  # by a library
        "import jax; jax.jit(lambda x: jax.numpy.broadcast_to(x, (2,)))(jax.numpy.ones(3))",
    ],
)
def test_bug_keeps_its_traceback(add_command, monkeypatch, bug):
    monkeypatch.delenv("MAE_JAX_TRACEBACK", raising=False)
    add_command("bug", f"def main(argv):\n    {bug}")
    with pytest.raises(ValueError):
        cli.main(["bug"])


def test_interrupt_is_quiet(add_command, capsys):
    add_command("stopped", "def main(argv):\n    raise KeyboardInterrupt")
    assert cli.main(["stopped"]) == 130
    assert capsys.readouterr().err == ""


def test_commands_find_modules_of_the_current_folder(add_command, tmp_path, monkeypatch):
    (tmp_path / "my_fork.py").write_text("status = 5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    add_command("fork", "def main(argv):\n    import my_fork\n    return my_fork.status")
    assert cli.main(["fork"]) == 5


@pytest.mark.parametrize("command", ["train", "visualize", "prepare"])
def test_a_closed_pipe_ends_a_command_without_a_word(command):
    process = subprocess.Popen(
        [sys.executable, "-m", "mae_jax", command, "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 128 + signal.SIGPIPE)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/run", "s3:// is not supported: give a local folder"),
        ("foo://bucket/run", "foo:// is not supported"),
        ("file:///data/run", "write the path itself, /data/run"),
        ("gs://bucket/run", "pip install gcsfs"),
        ("gs:/bucket/run", "a slash is missing: gs://bucket/run"),
        ("~/run", f"write {os.path.expanduser('~/run')}"),
    ],
)
@pytest.mark.parametrize("flag", ["--workdir", "--config.init_from", "--config.resume"])
def test_a_place_that_cannot_be_written_is_named_as_it_was_given(
    flag, url, words, capsys, monkeypatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: (x != "gcsfs" and found(x)) or None)
    assert cli.main(["train", "--config=configs/quickstart.py", f"{flag}={url}"]) == 2
    error = capsys.readouterr().err
    assert f"{flag}={url}" in error
    assert words in error


@pytest.mark.parametrize(
    "arguments",
    [["visualize", "W", "I", "--out=gs://b/x"], ["convert", "W", "gs://b/x", "--to=hf"]],
    ids=lambda x: x[0],
)
def test_local_output_is_asked_for(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "gs://b/x: only local files" in capsys.readouterr().err
