"""The recipes. In a checkout they are the files of ../configs; an installed package has them here."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "configs")]
