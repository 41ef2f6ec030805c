"""A fork in a folder of its own: task, mask, wider target and evaluator by dotted path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hosts

from mae_jax.metrics import writer

ROOT = Path(__file__).parents[1]
FORK = {
    "my_fork/__init__.py": "",
    "my_fork/masks.py": """
import jax
import jax.numpy as jnp

def stripes(rng, batch, grid, ratio):
    rows = jax.random.uniform(rng, (batch, grid[0], 1))
    return jnp.broadcast_to(rows, (batch, *grid)).reshape(batch, -1)
""",
    "my_fork/targets.py": """
import jax.numpy as jnp
from mae_jax.models.patchify import patchify

def brightness(images_BHWC, patch_size):
    patches_BLP = patchify(images_BHWC, patch_size)
    return jnp.stack([patches_BLP.mean(-1), patches_BLP.min(-1), patches_BLP.max(-1)], -1)
""",
    "my_fork/tasks/__init__.py": "",
    "my_fork/tasks/robust.py": """
import jax.numpy as jnp
from mae_jax.tasks import pretrain

class Task(pretrain.Task):
    def objective(self, outputs):
        error_BL = jnp.abs(outputs["pred_BLT"] - outputs["target_BLT"]).mean(-1)
        return 1000 + (error_BL * outputs["mask_BL"]).sum() / outputs["mask_BL"].sum()
""",
    "my_fork/evals.py": """
import jax
from mae_jax.evals import Report

class Evaluator:
    def __init__(self, cfg, config, predict, mesh):
        self.scale = cfg.scale

    def run(self, state):
        width = state.params["decoder"]["pred"]["kernel"].shape[-1]
        return Report({"eval/target_width": self.scale * width})
""",
    "recipe.py": """
from mae_jax.configs.pretrain import get_config as recipe

def get_config(arg=None):
    config = recipe("batch_size=16,image_size=16")
    config.task = "my_fork.tasks.robust"
    config.masking.name = "my_fork.masks.stripes"
    config.target.name = "my_fork.targets.brightness"
    config.model.update(width=16, depth=1, heads=2, patch_size=(4, 4), channels=1, dtype="float32",
                        decoder_width=16, decoder_depth=1, decoder_heads=2)
    config.data.update(source="bundled:digits", mean=(0.5,), std=(0.5,))
    config.evals = dict(width=dict(type="my_fork.evals", every="2 steps", scale=1.0))
    config.train_for, config.optim.warmup, config.log_every = "4 steps", "1 steps", "1 steps"
    config.checkpoint.update(every="2 steps", keep_every="")
    return config
""",
}


def train(folder, *flags):
    command = [sys.executable, "-m", "mae_jax", "train", "--config=recipe.py", "--workdir=run"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": hosts.QUICK,
    }
    return subprocess.run(
        [*command, *flags], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_fork_trains_and_resumes(tmp_path):
    for name, text in FORK.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    stopped = train(tmp_path, "--config.data.max_bad_fraction=0.5")
    assert stopped.returncode == 0, stopped.stderr
    lines = writer.read(tmp_path / "run" / "metrics.jsonl")
    assert {line["eval/target_width"] for line in lines if "eval/target_width" in line} == {3.0}
    assert all(line["train/loss"] > 1000 for line in lines if "train/loss" in line)

    # The last checkpoint is lost: the run goes on from the one before, to the same end.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    resumed = train(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 2" in resumed.stdout
    again = writer.read(tmp_path / "run" / "metrics.jsonl")
    losses = [[x["train/loss"] for x in log if "train/loss" in x] for log in (lines, again)]
    assert losses[0] == losses[1]
