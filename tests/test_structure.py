"""Imports only go down, and nothing names the machine it was written on."""

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

from mae_jax import commands
from mae_jax.__main__ import descriptions

ROOT = Path(__file__).parents[1]
FOLDERS = ["mae_jax", "configs", "examples", "tests", "benchmarks"]

# A module imports from its own floor or from those below it.
FLOORS = [
    {"__main__", "commands", "api"},
    {"tasks", "plan", "gpu_estimate"},
    {"train", "report", "schedule", "profiling", "pretrained"},
    {"evals"},
    {
        *("data", "checkpoint", "orbax_manager", "integrity", "provenance", "distributed"),
        *("optim", "optimizers", "layer_decay", "mesh", "sharding", "metrics", "interop"),
    },
    {
        "models",
        "flops",
        "config",
        "limits",
        "clock",
        "errors",
        "files",
        "hlo",
        "traffic",
        "configs",
        "topologies",
    },
]
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}


class Import(NamedTuple):
    """One imported module: 'a.b.c' where 'from a.b import c' may name a module or a function."""

    name: str
    line: int
    in_function: bool

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def imports(source: str) -> Iterator[Import]:
    """Every import of a Python source, wherever it stands.

    Raises:
      ValueError: a relative import; this project writes them out.
    """

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, in_function)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    raise ValueError(f"line {child.lineno}: relative import")
                for alias in child.names:
                    yield Import(f"{child.module}.{alias.name}", child.lineno, in_function)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, in_function or function)

    return walk(ast.parse(source), False)


def python_files(*folders: str) -> list[tuple[str, list[Import]]]:
    """Return path from the root and imports of every Python file in the folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(path.relative_to(ROOT).as_posix(), imports_of(path)) for path in paths]


@functools.cache
def imports_of(path: Path) -> list[Import]:
    """Return the imports of a Python file."""
    return list(imports(path.read_text()))


def misplaced(wrong: Callable[[str, Import], bool], *folders: str) -> list[str]:
    """Return where the folders import what `wrong` (of a path and an import) forbids."""
    return [
        f"{path}:{found.line} imports {found.name}"
        for path, all_found in python_files(*folders)
        for found in all_found
        if wrong(path, found)
    ]


def part(dotted: str) -> str | None:
    """'mae_jax.data.pipeline' -> 'data': the part of the package that FLOORS speaks of."""
    names = dotted.split(".")
    return names[1] if names[0] == "mae_jax" and len(names) > 1 else None


def module_name(path: str) -> str:
    """'mae_jax/data/__init__.py' -> 'mae_jax.data'."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\nfrom c import d, e\ndef f():\n  import g\nif 1:\n  class H:\n    import i"
    assert list(imports(source)) == [
        Import("a.b", 1, False),
        Import("c.d", 2, False),
        Import("c.e", 2, False),
        Import("g", 4, True),
        Import("i", 7, False),
    ]
    with pytest.raises(ValueError, match="line 1: relative import"):
        list(imports("from . import x"))


def test_every_part_has_a_floor():
    parts = {part(module_name(path)) for path, _ in python_files("mae_jax")} - {None}
    assert parts <= set(FLOOR), "a new part of mae_jax: give it a place in FLOORS"


def test_imports_only_go_down():
    def upward(path, found):
        floor = FLOOR.get(part(module_name(path)), 0)
        return FLOOR.get(part(found.name), floor) < floor

    assert not misplaced(upward, "mae_jax")


def test_no_modules_import_each_other_in_a_circle():
    files = {module_name(path): found for path, found in python_files("mae_jax")}
    graph = {
        module: {
            target
            for name, _, in_function in found
            if not in_function
            for target in (name, name.rpartition(".")[0])
            if target in files and target != module
        }
        for module, found in files.items()
    }
    while leaves := {module for module, targets in graph.items() if not targets & set(graph)}:
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    assert not graph


def test_models_import_only_jax_flax_einops_numpy_errors_and_themselves():
    allowed = {"jax", "flax", "einops", "numpy"}
    allowed |= {"collections", "dataclasses", "functools", "math", "typing"}
    ours = ("mae_jax.models", "mae_jax.errors")

    def foreign(_, found):
        return found.package not in allowed and not found.name.startswith(ours)

    assert not misplaced(foreign, "mae_jax/models")


def test_recipes_import_nothing_from_the_package_but_recipes():
    """By the name that an installed package has, too."""

    def foreign(_, found):
        ours = found.package in ("mae_jax", "configs")
        return ours and not found.name.startswith("mae_jax.configs.")

    assert not misplaced(foreign, "configs")


def test_tensorflow_is_imported_only_where_tf_data_is_what_ours_is_compared_with():
    guilty = {"tensorflow", "tf_keras", "keras", "clu"}
    wrong = misplaced(lambda _, found: found.package in guilty, *FOLDERS)
    assert [where.partition(":")[0] for where in wrong] == ["benchmarks/loader.py"]


PEERS = ("mae_jax/interop/", "benchmarks/", "tests/with_torch/")  # may compare with PyTorch


def test_torch_is_imported_only_by_interop_and_benchmarks_inside_functions():
    peers = {"torch", "torchvision", "timm", "transformers"}

    def wrong(path, found):
        allowed = found.in_function and path.startswith(PEERS)
        return found.package in peers and not allowed

    assert not misplaced(wrong, *FOLDERS)


def test_flags_are_defined_only_by_commands():
    paths = [path for path, _ in python_files("mae_jax", "configs")]
    defining = [path for path in paths if ".DEFINE_" in (ROOT / path).read_text()]
    assert all(path.startswith("mae_jax/commands/") for path in defining)


def test_no_command_imports_another():
    names = {f"{commands.__name__}.{name}" for name in descriptions()}
    assert {"mae_jax.commands.sweep", "mae_jax.commands.train"} <= names

    def wrong(_, found):
        return found.name in names or found.name.rpartition(".")[0] in names

    assert not misplaced(wrong, "mae_jax/commands")


def text_files() -> Iterator[tuple[str, str]]:
    """Path from the root and text of every file of the project, tools' leavings excepted."""
    places = [*FOLDERS, "launch", ".ci"]
    paths = [path for place in places for path in (ROOT / place).rglob("*")]
    for path in [*paths, *ROOT.glob("*.*"), ROOT / "LICENSE"]:
        if path.is_file() and not {"__pycache__", ".git", "out"} & set(path.parts):
            try:
                yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a picture or an array


def test_no_file_names_a_machine_or_a_package_index():
    patterns = r"/(root|home|Users)/|pypi\.org|python[h]osted|--(extra-)?index-url[ =]"
    named = [
        (path, match.group()) for path, text in text_files() if (match := re.search(patterns, text))
    ]
    assert not named


def canonical(name: str) -> str:
    """A distribution's name in its one normal spelling, without version and extras."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=~\[ ]", name)[0]).lower()


def requirements() -> set[str]:
    """The names of all that setup.py asks for, extras included."""
    return {
        canonical(node.value)
        for argument in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(argument, ast.keyword)
        if argument.arg in {"install_requires", "extras_require"}
        for values in ast.walk(argument.value)
        if isinstance(values, ast.List)
        for node in values.elts
    }


def test_every_imported_package_is_required():
    known_as = packages_distributions()  # import name -> what pip calls it
    own = {*FOLDERS} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    own |= sys.stdlib_module_names
    required = requirements()

    def missing(path, found):
        names = {canonical(name) for name in known_as.get(found.package, [])}
        return found.package not in own and not path.startswith(PEERS) and not names & required

    assert not misplaced(missing, "mae_jax", "configs", "tests")


def test_lock_pins_every_requirement():
    lines = (ROOT / "launch/requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", pin) for pin in pins)
    extras = {"timm", "torch", "torchvision", "transformers", "libtpu", "gcsfs"}
    assert requirements() - extras <= {canonical(pin) for pin in pins}
