"""Real runs of the train command: killed, asked to stop, moved to other devices, and gone on."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hosts
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding

from mae_jax import checkpoint, distributed

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY, KILLS = 36, 3, 6

CONFIG = f'''
from mae_jax.configs.pretrain import get_config as recipe

def get_config(arg=None):
    config = recipe("batch_size=16,image_size=32")
    config.model.update(
        width=32, depth=2, heads=4, patch_size=(8, 8), decoder_width=16, decoder_depth=1,
        decoder_heads=4, dtype="float32", channels=1,
    )
    config.train_for, config.optim.warmup = "{STEPS} steps", "5 steps"
    config.data.update(source="folder:IMAGES", mean=(0.5,), std=(0.5,))
    config.evals = {{}}
    config.checkpoint.update(every="{SAVE_EVERY} steps", keep=2, keep_every="")
    config.log_every = "1 steps"
    return config
'''


class Run:
    """One process of `mae-jax train`; `said` grows line by line."""

    def __init__(self, folder: Path, workdir: Path, *flags: str, devices: int = 1):
        config = folder / "tiny.py"
        config.write_text(CONFIG.replace("IMAGES", str(hosts.images(folder))))
        environment = os.environ | {
            # Compiling takes most of the time: quickly, and once for all runs alike.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {hosts.QUICK}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mae_jax", "train"),
                *(f"--config={config}", f"--workdir={workdir}", *flags),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.workdir, self.said = workdir, []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._too_long = threading.Timer(240, self.process.kill)
        self._too_long.start()

    def _read(self) -> None:
        self.said.extend(line.rstrip() for line in self.process.stdout)

    def until(self, condition) -> None:
        """Waits for a condition, or for the end of the process."""
        while self.process.poll() is None and not condition():
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        """Waits until this process has trained, and the run has reported a step."""
        self.until(lambda: any("resumed at" in x or "from scratch" in x for x in self.said))
        before = len(logged(self.workdir))
        self.until(lambda: len(logged(self.workdir)) > before)
        self.until(lambda: logged(self.workdir)[-1]["step"] >= step)

    def end(self, how: int | None = None) -> int:
        """Sends a signal, if one is given; the exit status."""
        if how is not None:
            self.process.send_signal(how)
        status = self.process.wait()
        self._reader.join()
        self._too_long.cancel()
        return status


def logged(workdir: Path) -> list[dict]:
    """The complete lines of metrics.jsonl that tell of updates."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if "train/loss" in entry]


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Everything in the newest checkpoint."""
    path = checkpoint.find(workdir, "test")
    shapes = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
    here = SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    leaves = jax.tree_util.tree_flatten_with_path(checkpoint.restore(path, target))[0]
    return {jax.tree_util.keystr(name): np.asarray(value) for name, value in leaves}


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Bit-equal arrays; every step reported once, with the same numbers."""
    ours, theirs = arrays(workdir), arrays(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    assert ours[".step" if ".step" in ours else "['step']"] == STEPS

    def numbers(path):
        return [(x["step"], x["train/loss"], x["train/grad_norm"]) for x in logged(path)]

    assert [step for step, *_ in numbers(workdir)] == list(range(1, STEPS + 1))
    assert numbers(workdir) == numbers(expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(folder):
    run = Run(folder, folder / "uninterrupted")
    assert run.end() == 0, "\n".join(run.said)
    return run.workdir


def test_a_run_killed_six_times_ends_bit_equal_to_an_uninterrupted_one(folder, uninterrupted):
    """SIGKILL at seeded moments: after a random step, while saving, or while starting."""
    moments = random.Random(0)
    workdir = folder / "killed"

    def saving() -> bool:
        return any((workdir / "checkpoints").glob("*tmp*"))

    while_saving = 0
    for kill in range(KILLS):
        run = Run(folder, workdir)
        if kill % 3 == 2:
            time.sleep(moments.uniform(1, 4))
        else:
            run.until_step(moments.randint(kill, kill + 2) * STEPS // (KILLS + 4))
            if kill % 3 == 1:
                run.until(saving)
            time.sleep(moments.uniform(0, 0.1))
        assert run.end(signal.SIGKILL) == -signal.SIGKILL, "\n".join(run.said)
        while_saving += saving()
    assert while_saving >= 2

    run = Run(folder, workdir)
    assert run.end() == 0, "\n".join(run.said)
    assert any("resumed at step" in line for line in run.said)
    assert_same_run(workdir, uninterrupted)


def test_a_signal_saves_where_it_is_and_the_run_goes_on_from_there(folder, uninterrupted):
    workdir, saved = folder / "asked", 0
    signals = {signal.SIGTERM: distributed.PREEMPTED, signal.SIGINT: distributed.INTERRUPTED}
    for asked, status in signals.items():
        run = Run(folder, workdir)
        run.until_step(saved + 4)
        assert run.end(asked) == status, "\n".join(run.said)
        before, saved = saved, int(checkpoint.find(workdir, "test").name)
        assert saved == logged(workdir)[-1]["step"] >= before + 4
        assert before == 0 or any(f"resumed at step {before} from" in line for line in run.said)

    run = Run(folder, workdir)
    assert run.end() == 0, "\n".join(run.said)
    assert any(f"resumed at step {saved} from" in line for line in run.said)
    assert_same_run(workdir, uninterrupted)


def test_a_disk_that_takes_no_more_is_said_and_the_run_goes_on(folder, uninterrupted):
    workdir = folder / "full"
    cases = ((4, 0, "full: "), (8, 20_000, "checkpoint .* could not be written to .*: "))
    for step, most, what in cases:
        run = Run(folder, workdir)
        run.until_step(step)
        limit = most or (workdir / "metrics.jsonl").stat().st_size
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert run.end() == 1, "\n".join(run.said)
        last = next(x for x in run.said if x.startswith("mae-jax train: "))
        assert re.search(f"{what}File too large.*the same command goes on from", last), run.said
        assert not any("Traceback" in line for line in run.said), "\n".join(run.said)

    run = Run(folder, workdir)
    assert run.end() == 0, "\n".join(run.said)
    assert_same_run(workdir, uninterrupted)


def test_a_workdir_that_is_deleted_under_the_run_is_said(folder):
    run = Run(folder, folder / "deleted", "--config.train_for=100000 steps")  # it does not end
    run.until_step(3)
    (folder / "deleted").rename(folder / "elsewhere")
    assert run.end() == 1, "\n".join(run.said)
    assert any(f"{folder}/deleted is gone" in line for line in run.said), "\n".join(run.said)
    assert not any("Traceback" in line for line in run.said), "\n".join(run.said)


def test_a_second_run_in_a_workdir_is_refused_and_the_first_goes_on(folder):
    first = Run(folder, folder / "shared", "--config.train_for=100000 steps")  # it does not end
    first.until_step(3)
    second = Run(folder, folder / "shared", "--config.train_for=100000 steps")
    assert second.end() == 2
    refusal = f"another run is going on in {folder}/shared: wait until it ends or stop it"
    assert any(refusal in line for line in second.said), "\n".join(second.said)
    first.until_step(logged(folder / "shared")[-1]["step"] + 3)
    assert first.end(signal.SIGTERM) == distributed.PREEMPTED, "\n".join(first.said)


def test_a_second_ctrl_c_ends_the_process_at_once(folder):
    run = Run(folder, folder / "twice")
    run.until_step(3)
    run.process.send_signal(signal.SIGSTOP)  # so that both come before the next step
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGCONT)
    run.until(lambda: any("Ctrl-C again" in line for line in run.said))
    run.process.send_signal(signal.SIGINT)
    assert run.end() == distributed.INTERRUPTED
    assert not any("Traceback" in line for line in run.said), "\n".join(run.said)


def test_a_run_goes_on_on_other_numbers_of_devices(folder, uninterrupted):
    """8, then 1, then 4: the same images and masks, so the same losses but for rounding."""
    workdir = folder / "moved"
    for devices in (8, 1, 4):
        run = Run(folder, workdir, devices=devices)
        run.until_step(len(logged(workdir)) + 3)
        assert run.end(signal.SIGTERM) == distributed.PREEMPTED, "\n".join(run.said)
    assert any("device_count: 1 -> 4" in line for line in run.said)
    ours, theirs = ([x["train/loss"] for x in logged(path)] for path in (workdir, uninterrupted))
    assert len(ours) >= 9
    np.testing.assert_allclose(ours, theirs[: len(ours)], rtol=1e-3)
    assert len(set(theirs)) == STEPS  # a step out of place would show
    assert arrays(workdir).keys() == arrays(uninterrupted).keys()


def test_another_config_is_refused_before_anything_is_touched(folder, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    run = Run(folder, uninterrupted, "--config.optim.blr=1.0")
    assert run.end() == 2
    assert "optim.blr: 0.00015 -> 1.0" in "\n".join(run.said)
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before
