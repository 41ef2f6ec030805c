"""Two real processes evaluate together: the numbers and tables are those of one alone."""

import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hosts import Processes, free_port
from jax.sharding import Mesh
from test_results import accuracy_config, logits_of_a_pixel, write
from tiny import mesh_of

from mae_jax import evals
from mae_jax.configs.linprobe import get_config

TOGETHER = """
    import json, os, sys
    workdir, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import jax
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    import test_evals_multihost as test
    from mae_jax.mesh import make_mesh
    print("FOUND", json.dumps(test.measured(make_mesh(), workdir)))
"""


def measured(mesh: Mesh, workdir) -> dict:
    """What every kind of evaluator of labelled images finds, with features that are pixels."""

    def features(params, extra, batch):
        rows_BHW = batch["image"][:, ::4, ::4, 0].astype(jnp.float32)
        return {"cls": rows_BHW.reshape(len(rows_BHW), -1)}

    def block_features(*args):
        return {name: jnp.stack([x[:, :5], x[:, 5:10]]) for name, x in features(*args).items()}

    def two_heads(*args):
        return jnp.stack([logits_of_a_pixel(*args), -logits_of_a_pixel(*args)], 1)

    config = accuracy_config()
    config.optim = get_config("init=x").optim
    config.optim.sweep, config.data.split = (0.5,), "train[:80%]"
    common = dict(every="", source="", split="test[:90]", batch_size=16)
    bank = dict(common, bank_split="train[:150]", feature="cls")
    config.evals = dict(
        accuracy=dict(common, type="accuracy"),
        knn=dict(bank, type="knn", ks=(1, 5), temperature=0.07),
        logistic=dict(bank, type="logistic", layers="all"),
        fewshot=dict(bank, type="fewshot", shots=(2,), draws=2),
        probe=dict(common, type="probe", select_split="train[95%:]"),
    )
    state, numbers = SimpleNamespace(params={}, extra={}), {}
    heads = {"probe": two_heads}
    for kind, cfg in config.evals.items():
        chosen = config.copy_and_resolve_references()
        chosen.evals = {kind: cfg}
        predict = {
            "logits": heads.get(kind, logits_of_a_pixel),
            "features": features,
            "block_features": block_features,
        }
        report = evals.build(chosen, predict, mesh)[kind].run(state)
        numbers[kind] = dict(report.scalars)
        if report.files:
            numbers[f"{kind} tables"] = json.loads(report.files["results.json"]({}))
            if jax.process_index() == 0:
                write(Path(workdir), report, hosts=jax.process_count())
    return numbers


def close(ours, theirs) -> bool:
    """Equal, but for the rounding of numbers that are no counts."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(close(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return ours == (pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs)


def test_evaluations_on_two_hosts_give_the_numbers_of_one(tmp_path):
    (tmp_path / "two").mkdir()
    code, port = textwrap.dedent(TOGETHER), str(free_port())
    command = [sys.executable, "-c", code, str(tmp_path / "two"), port]
    processes = Processes([[*command, "0"], [*command, "1"]], devices=2)
    alone = json.loads(json.dumps(measured(mesh_of(1, 1, 1), tmp_path)))
    assert processes.end() == [0, 0], processes.text()
    together = processes.found()
    assert together[0] == together[1]
    assert alone["accuracy"]["eval/images"] == 90
    assert set(alone) == {
        "accuracy", "accuracy tables", "knn", "logistic", "fewshot", "probe", "probe tables"
    }  # fmt: skip
    assert len(alone["logistic"]) == 5
    for kind, expected in alone.items():
        assert close(together[0][kind], expected), (kind, together[0][kind], expected)
    written = json.loads((tmp_path / "two" / "results.json").read_text())
    assert written["hosts"] == 2 and written["top1"] == alone["probe tables"]["top1"]
