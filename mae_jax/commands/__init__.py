"""The commands, a module each, and what they share; flags are defined nowhere else."""

import os
import sys

from mae_jax.errors import UserError


def explain(command: str, error: BaseException) -> int | None:
    """Print a mistake of the user and return the exit status; None for a bug, to be raised."""
    if isinstance(error, KeyboardInterrupt):
        return 130  # 128 + SIGINT, as shells report it
    if os.environ.get("MAE_JAX_TRACEBACK") or not isinstance(error, UserError):
        return None
    print(f"mae-jax {command}: {error}", file=sys.stderr)
    print("(MAE_JAX_TRACEBACK=1 shows where this was raised)", file=sys.stderr)
    return 2
