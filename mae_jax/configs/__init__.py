"""The recipes: the folder configs of a checkout, or the files here in an installed package."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "configs")]
