"""Two real processes evaluate together: the numbers and tables are those of one alone."""

import json
import socket
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from test_results import accuracy_config, logits_of_a_pixel
from test_train import mesh_of

from configs.linprobe import get_config
from mae_jax import evals
from mae_jax.evals import results

TOGETHER = """
    import json, os, sys
    workdir, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import jax
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    import test_evals_multihost as test
    from mae_jax import sharding
    print("FOUND", json.dumps(test.measured(sharding.make_mesh(), workdir)))
"""


def measured(mesh: Mesh, workdir) -> dict:
    """What every kind of evaluator of labelled images finds, with features that are pixels."""

    def features(params, extra, batch):
        rows_BHW = batch["image"][:, ::4, ::4, 0].astype(jnp.float32)
        return {"cls": rows_BHW.reshape(len(rows_BHW), -1)}

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
        fewshot=dict(bank, type="fewshot", shots=(2,), draws=2),
        probe=dict(common, type="probe", select_split="train[95%:]"),
    )
    state, found = SimpleNamespace(params={}, extra={}), {}
    for name, logits in (("all", logits_of_a_pixel), ("probe", two_heads)):
        chosen = config.copy_and_resolve_references()
        for kind in config.evals:
            if (kind == "probe") != (name == "probe"):
                del chosen.evals[kind]
        for kind, evaluator in evals.build(
            chosen, {"logits": logits, "features": features}, mesh
        ).items():
            found[kind] = evaluator.run(state)[0]
            if hasattr(evaluator, "results"):
                found[f"{kind} tables"] = results.report(evaluator.results)
                results.write(workdir, evaluator.results, {"hosts": jax.process_count()})
    return found


def close(ours, theirs) -> bool:
    """Equal, but for the rounding of numbers that are no counts."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(close(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return ours == (pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs)


def test_evaluations_on_two_hosts_give_the_numbers_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (tmp_path / "two").mkdir()
    code = textwrap.dedent(TOGETHER)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "two"), str(port), str(index)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    too_long = threading.Timer(300, lambda: [process.kill() for process in processes])
    too_long.start()
    try:
        alone = json.loads(json.dumps(measured(mesh_of(1, 1, 1), tmp_path)))
        said = [process.communicate()[0].splitlines()[-1] for process in processes]
    finally:
        too_long.cancel()
        for process in processes:
            process.kill()
    together = [json.loads(line.removeprefix("FOUND ")) for line in said]
    assert together[0] == together[1]
    assert alone["accuracy"]["eval/images"] == 90
    assert {"accuracy", "accuracy tables", "knn", "fewshot", "probe", "probe tables"} == set(alone)
    for kind, expected in alone.items():
        assert close(together[0][kind], expected), (kind, together[0][kind], expected)
    written = json.loads((tmp_path / "two" / "results.json").read_text())
    assert written["hosts"] == 2 and written["top1"] == alone["probe tables"]["top1"]
