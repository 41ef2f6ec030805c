"""Imports only go down, and nothing names the machine it was written on."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["mae_jax", "configs", "tests", "benchmarks"]

# A module imports from its own floor or from those below it.
FLOORS = [
    {"__main__", "commands"},
    {"tasks"},
    {"train", "report", "pretrained", "plan"},
    {"evals"},
    {
        *("data", "checkpoint", "orbax_manager", "integrity", "provenance", "distributed"),
        *("optim", "sharding", "metrics", "interop"),
    },
    {"models", "flops", "config", "errors", "files", "hlo", "traffic", "configs", "topologies"},
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
    """Path from the root and imports of every Python file in the folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(path.relative_to(ROOT).as_posix(), list(imports(path.read_text()))) for path in paths]


def part(dotted: str) -> str | None:
    """'mae_jax.data.pipeline' -> 'data': the part of the package that LAYERS speaks of."""
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
    upward = [
        f"{path}:{line} imports {name}"
        for path, found in python_files("mae_jax")
        for name, line, _ in found
        if part(name) in FLOOR and FLOOR[part(name)] < FLOOR.get(part(module_name(path)), 0)
    ]
    assert not upward


def test_no_command_imports_another():
    """What commands share stands in modules of mae_jax/commands without a function main."""
    paths = (ROOT / "mae_jax/commands").glob("*.py")
    commands = {f"mae_jax.commands.{path.stem}" for path in paths if defines_main(path)}
    assert "mae_jax.commands.train" in commands
    assert "mae_jax.commands.recipes" not in commands
    between = [
        f"{path}:{found.line} imports {found.name}"
        for path, all_found in python_files("mae_jax/commands")
        for found in all_found
        if commands & {found.name, found.name.rpartition(".")[0]}
    ]
    assert not between


def defines_main(path: Path) -> bool:
    nodes = ast.parse(path.read_text()).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in nodes)


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
    standard = {"collections", "dataclasses", "functools", "math", "typing"}
    ours = ("mae_jax.models", "mae_jax.errors")
    foreign = [
        f"{path}:{found.line} imports {found.name}"
        for path, all_found in python_files("mae_jax/models")
        for found in all_found
        if found.package not in allowed | standard and not found.name.startswith(ours)
    ]
    assert not foreign


def test_recipes_import_nothing_from_the_package_but_recipes():
    """By the name that an installed package has, too."""
    foreign = [
        f"{path}:{found.line} imports {found.name}"
        for path, all_found in python_files("configs")
        for found in all_found
        if found.package in ("mae_jax", "configs")
        if not found.name.startswith("mae_jax.configs.")
    ]
    assert not foreign


def test_tensorflow_is_never_imported():
    guilty = {"tensorflow", "tf_keras", "keras", "clu"}
    imports = [path for path, found in python_files(*FOLDERS) for x in found if x.package in guilty]
    assert imports == ["benchmarks/loader.py"]  # there tf.data is what ours is compared with


PEERS = ("mae_jax/interop/", "benchmarks/", "tests/with_torch/")  # may compare with PyTorch


def test_torch_is_imported_only_by_interop_and_benchmarks_inside_functions():
    misplaced = [
        f"{path}:{found.line}"
        for path, all_found in python_files(*FOLDERS)
        for found in all_found
        if found.package in {"torch", "torchvision", "timm", "transformers"}
        if not (found.in_function and path.startswith(PEERS))
    ]
    assert not misplaced


def test_flags_are_defined_only_by_commands():
    definitions = [
        f"{path}:{node.lineno}"
        for path, _ in python_files("mae_jax", "configs")
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("DEFINE_")
        if not path.startswith("mae_jax/commands/")
    ]
    assert not definitions


def text_files() -> Iterator[tuple[str, str]]:
    """Path from the root and text of every file of the project, tools' leavings excepted."""
    places = [*FOLDERS, "launch", ".ci"]
    paths = [path for place in places for path in (ROOT / place).rglob("*")]
    for path in [*paths, *ROOT.glob("*.*"), ROOT / "LICENSE"]:
        if path.is_file() and not {"__pycache__", ".git"} & set(path.parts):
            try:
                yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a picture or an array


def test_no_file_names_a_machine_or_a_package_index():
    patterns = [
        r"/(root|home|Users)/",
        r"pypi\.org",
        r"python[h]osted",
        r"--(extra-)?index-url[ =]",
    ]
    named = [
        f"{path}: {match.group()}"
        for path, text in text_files()
        for match in re.finditer("|".join(patterns), text)
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
    own = {"mae_jax", "configs", "tests"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    missing = [
        f"{path}:{found.line} imports {found.name}"
        for path, all_found in python_files("mae_jax", "configs", "tests")
        for found in all_found
        if found.package not in own | sys.stdlib_module_names and not path.startswith(PEERS)
        if not {canonical(name) for name in known_as.get(found.package, [])} & requirements()
    ]
    assert not missing


def test_lock_pins_every_requirement():
    lines = (ROOT / "launch/requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", pin) for pin in pins)
    extras = {"timm", "torch", "torchvision", "transformers", "libtpu", "gcsfs"}
    assert requirements() - extras <= {canonical(pin) for pin in pins}
