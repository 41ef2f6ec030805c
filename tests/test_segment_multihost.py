"""Two real processes segment together: every count is that of one alone."""

import json
import sys
import textwrap
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from hosts import Processes, free_port
from segments import CLASSES, LEVELS, small, write_folder, write_pairs
from tiny import mesh_of

from mae_jax import evals
from mae_jax.configs import segment, segment_frozen
from mae_jax.models.patchify import patchify

TOGETHER = """
    import json, os, sys
    root, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import jax
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    import test_segment_multihost as test
    from mae_jax.mesh import make_mesh
    print("FOUND", json.dumps(test.measured(make_mesh(), root)))
"""


def measured(mesh, root) -> dict:
    """What the three evaluators find, with features that are pixels and logits made of them."""

    def patch_features(params, extra, batch, block):
        return patchify(batch["image"].astype(jnp.float32), (8, 8))

    def segmentation(params, extra, batch):
        mean_BL = patch_features(params, extra, batch, 1).mean(-1)
        logits_BLY = -jnp.abs(mean_BL[..., None] - jnp.array(LEVELS))
        return logits_BLY.reshape(-1, 3, 4, len(CLASSES))

    predict = {"patch_features": patch_features, "segmentation": segmentation}
    state, numbers = SimpleNamespace(params={}, extra={}, step=0), {}
    for recipe in (segment, segment_frozen):
        config = small(recipe.get_config("test=test,variant=B/16"), root)
        if recipe is segment_frozen:
            config.evals.knn.ks = (1, 5)
        for cfg in config.evals.values():
            cfg.batch_size = 4
        for name, evaluator in evals.build(config, predict, mesh).items():
            report = evaluator.run(state)
            table = next(report.files[x] for x in report.files if x.endswith("json"))
            numbers[name] = [dict(report.scalars), json.loads(table({}))["per_class"]]
    return numbers


def test_segmentations_on_two_hosts_have_the_counts_of_one(tmp_path):
    root = write_folder(tmp_path / "data", train=14, test=5)
    for i, size in enumerate([(24, 96), (80, 40)]):  # these take several windows
        write_pairs(root / f"{i}", "test", 1, size=size, seed=i)
        for folder in ("images", "labels"):
            file = root / f"{i}/test/{folder}/test00.png"
            file.rename(root / f"test/{folder}/uneven{i}.png")
    code, port = textwrap.dedent(TOGETHER), str(free_port())
    command = [sys.executable, "-c", code, str(root), port]
    processes = Processes([[*command, "0"], [*command, "1"]], devices=2)
    alone = json.loads(json.dumps(measured(mesh_of(1, 1, 1), root)))
    assert processes.end() == [0, 0], processes.text()
    together = processes.found()
    assert set(alone) == {"segment", "knn", "logistic"}
    assert alone["segment"][0]["eval/images"] == 7 and alone["segment"][0]["eval/miou"] > 40
    for name in ("segment", "knn"):
        assert [host[name] for host in together] == [alone[name], alone[name]], name
    # Its classifier is trained on sums over all hosts, which may round otherwise: a patch, 64 of
    # 8,867 pixels, may get another class.
    assert together[0]["logistic"] == together[1]["logistic"]
    assert together[0]["logistic"][0] == pytest.approx(alone["logistic"][0], abs=1)
