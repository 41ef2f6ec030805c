"""The notebooks run from top to bottom on bundled data, in a kernel of this Python."""

import os
import sys
from pathlib import Path

import compiler
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
# They compile in half of the time, and train as fast.
FLAGS = f"--xla_backend_optimization_level=1 {compiler.FLAG}"
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def load(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def run(name: str, last: str, folder: Path, monkeypatch, shorter=()) -> str:
    """Run a notebook and one more cell in `folder`, and return what that cell printed.

    Args:
      shorter: pairs (what the notebook says, what is run in its place).
    """
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))  # no kernels of the user's own
    notebook = load(name)
    for said, instead in shorter:
        (cell,) = (cell for cell in notebook.cells if said in cell.source)
        cell.source = cell.source.replace(said, instead)
    notebook.cells += [
        nbformat.v4.new_code_cell(f"import sys; assert sys.executable == {sys.executable!r}"),
        nbformat.v4.new_code_cell(last),
    ]
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client.execute(
        env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    )
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert pictures
    return notebook.cells[-1].outputs[0].text


def test_reconstruct(tmp_path, monkeypatch):
    last = "print(out.mask_BL.mean(), model.spec.encoder.depth)"
    assert run("reconstruct", last, tmp_path, monkeypatch).split() == ["0.75", "6"]


def test_finetune(tmp_path, monkeypatch):
    shorter = (("train_for=300 steps", "train_for=200 steps"), ("=24 epochs", "=20 epochs"))
    found = run("finetune", "print(accuracy)", tmp_path, monkeypatch, shorter)
    assert float(found) > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_has_no_outputs_and_installs_in_one_cell(name):
    cells = [cell for cell in load(name).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    installing = [i for i, cell in enumerate(cells) if "pip install" in cell.source]
    assert installing == [0] and 'find_spec("mae_jax") is None' in cells[0].source
