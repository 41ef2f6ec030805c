"""Errors of the user, told apart from bugs of ours."""

import difflib
from collections.abc import Iterable
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake of the user: one sentence with the value, the limit and the way out.

    The command line prints it and exits with status 2. Every other exception is a bug, and shows
    its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return '; nearest: ...' for the end of an error message, or all names if none is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f"; nearest: {', '.join(close)}" if close else f"; there are: {', '.join(sorted(known))}"


def refuse(key: str, value: Any, way_out: str) -> NoReturn:
    """Raise a UserError about config.KEY."""
    raise UserError(f"config.{key}={value!r}: {way_out}")
