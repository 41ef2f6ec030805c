"""`mae-jax COMMAND`, or `python -m mae_jax COMMAND`: find the command and run it.

A command is a module of mae_jax/commands with a function `main(argv: list[str]) -> int | None`; the
first line of its docstring describes it. Only the module of the command that was asked for is
imported, and none for the help.
"""

import ast
import importlib
import os
import signal
import sys
from pathlib import Path

from mae_jax import __version__, commands
from mae_jax.errors import nearest

USAGE = "usage: mae-jax COMMAND [FLAG ...]        (or: python -m mae_jax COMMAND [FLAG ...])"


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status, which is 2 for a mistake of the user."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "--version":
        print(f"mae-jax {__version__}")
        return 0
    described = descriptions()
    if name in ("-h", "--help", "help"):
        rows = [f"  {command:12}{text}" for command, text in described.items()]
        print("\n".join([USAGE, "", *rows, "", "mae-jax COMMAND --help shows its flags."]))
        return 0
    if name not in described:
        print(f"mae-jax: no command {name!r}{nearest(name, described)}", file=sys.stderr)
        return 2

    # As with `python -m`, modules of the current folder (configs, a fork's own) can be imported.
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        status = importlib.import_module(f"{commands.__name__}.{name}").main(rest) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has ended: mae-jax train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is printed still
        return 128 + signal.SIGPIPE
    except (ValueError, KeyboardInterrupt) as error:
        if (status := commands.explain(name, error)) is None:
            raise
        return status


def descriptions() -> dict[str, str]:
    """Return the commands and the first line of their docstrings, without importing them."""
    described = {}
    for folder in commands.__path__:
        for file in sorted(Path(folder).glob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
                described[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return described


if __name__ == "__main__":
    sys.exit(main())
