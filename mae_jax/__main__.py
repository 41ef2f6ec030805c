"""`mae-jax COMMAND`, the same as `python -m mae_jax COMMAND`: finds the command and runs it.

Only the module of the command that was asked for is imported; the help imports none. A command is
a module of mae_jax/commands with `main(argv: list[str]) -> int | None`; the first line of its
docstring is its description.
"""

import ast
import difflib
import importlib
import os
import pkgutil
import sys
from pathlib import Path

from mae_jax import __version__, commands

USAGE = "usage: mae-jax COMMAND [FLAG ...]        (or: python -m mae_jax COMMAND [FLAG ...])"


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status, or 2 for what the user got wrong."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "--version":
        print(f"mae-jax {__version__}")
        return 0
    known = descriptions()
    if name in ("-h", "--help", "help"):
        rows = [f"  {command:12}{text}" for command, text in known.items()]
        print("\n".join([USAGE, "", *rows, "", "mae-jax COMMAND --help shows its flags."]))
        return 0
    if name not in known:
        close = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        print(f"mae-jax: no command {name!r}; {hint}", file=sys.stderr)
        return 2

    # As with `python -m`, modules of the current folder (configs, a fork's own) can be imported.
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(f"{commands.__name__}.{name}").main(rest) or 0
    except (ValueError, KeyboardInterrupt) as error:
        if (status := commands.explain(name, error)) is None:
            raise
        return status


def descriptions() -> dict[str, str]:
    """Return the commands and the first line of each one's docstring, without importing them.

    Modules without a function `main` hold what commands share, and are no commands.
    """
    found = {}
    for module in pkgutil.iter_modules(commands.__path__):
        spec = module.module_finder.find_spec(module.name, None)
        if spec and spec.origin:
            source = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
            if any(
                isinstance(node, ast.FunctionDef) and node.name == "main" for node in source.body
            ):
                lines = (ast.get_docstring(source) or "").splitlines()
                found[module.name] = lines[0] if lines else ""
    return found


if __name__ == "__main__":
    sys.exit(main())
