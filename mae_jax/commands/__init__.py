"""What the command line offers: one module per command; flags live here only."""

import linecache
import os
import sys
import traceback


def explain(command: str, error: BaseException) -> int | None:
    """Prints what the user got wrong; the exit status, or None for what needs its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return 130  # 128 + SIGINT, as shells report it
    if os.environ.get("MAE_JAX_TRACEBACK") or not _raised_here(error):
        return None
    print(f"mae-jax {command}: {error}", file=sys.stderr)
    print("(MAE_JAX_TRACEBACK=1 shows where this was raised)", file=sys.stderr)
    return 2


def _raised_here(error: BaseException) -> bool:
    """Whether a `raise` of this package made the error: a check, in words for the user.

    One that came out of Python, JAX or another library is a bug, and a bug needs its traceback.
    """
    if not isinstance(error, ValueError):
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    statement = linecache.getline(frame.f_code.co_filename, line).strip()
    return package == "mae_jax" and statement.startswith("raise ")
