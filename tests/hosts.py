"""Real processes of `mae-jax train` as the hosts of one run, for the tests of several hosts."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
STEPS, PER_EPOCH = 44, 11  # enough that a run is still going when a signal reaches it
IMAGES = 1437

CONFIG = f'''
from configs.pretrain import get_config as recipe

def get_config(arg=None):
    config = recipe("batch_size=128,image_size=32")
    config.model.update(
        width=16, depth=1, heads=2, patch_size=(16, 16), decoder_width=16, decoder_depth=1,
        decoder_heads=2, dtype="float32", channels=1,
    )
    config.train_for, config.optim.warmup = "{STEPS} steps", "5 steps"
    config.data.update(source="folder:IMAGES", mean=(0.5,), std=(0.5,), threads=2, prefetch=1)
    config.evals = {{}}
    config.checkpoint.update(every="3 steps", keep=2, keep_every="")
    config.log_every = "1 steps"
    config.heartbeat_seconds = 10
    return config
'''

# `mae-jax train` that writes down which examples it was given, one line for each step.
RECORDING = """
import json, os, sys
sys.path.insert(0, os.getcwd())
from mae_jax import __main__
from mae_jax.tasks import pretrain

make_task, seen = pretrain.make_task, sys.argv.pop(1)

def recording(*args):
    task = make_task(*args)
    def batches(start, rows):
        for step, (batch, *rest) in enumerate(task.batches(start, rows), start):
            with open(seen, "a") as file:
                print(json.dumps([step, batch["index"].tolist()]), file=file)
            yield batch, *rest
    return task._replace(batches=batches)

pretrain.make_task = recording
sys.exit(__main__.main(["train", *sys.argv[1:]]))
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    own = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return own | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "VENV": sys.prefix,
    }


def images(folder: Path) -> Path:
    """A folder of small pictures, which opens at once: the bundled digits import scikit-learn."""
    made = folder / "images"
    if not made.exists():
        made.mkdir()
        rng = np.random.default_rng(0)
        for index in range(IMAGES):
            levels = rng.integers(0, 256, (8, 8)).astype(np.uint8)
            Image.fromarray(levels).save(made / f"{index}.png")
    return made


def flags(folder: Path, workdir: Path) -> list[str]:
    (folder / "tiny.py").write_text(CONFIG.replace("IMAGES", str(images(folder))))
    return [f"--config={folder / 'tiny.py'}", f"--workdir={workdir}"]


class Processes:
    """Processes that are killed when they take too long; `said[i]` grows line by line."""

    def __init__(self, commands: list[list[str]], devices: int, places: list[Path] | None = None):
        self.processes = [
            subprocess.Popen(
                command,
                cwd=place,
                env=environment(devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command, place in zip(commands, places or [ROOT] * len(commands), strict=True)
        ]
        self.said: list[list[str]] = [[] for _ in commands]
        self._readers = [
            threading.Thread(target=self._read, args=(i,), daemon=True)
            for i in range(len(commands))
        ]
        self._too_long = threading.Timer(300, self.kill)
        for thread in [*self._readers, self._too_long]:
            thread.start()

    def _read(self, index: int) -> None:
        self.said[index].extend(line.rstrip() for line in self.processes[index].stdout)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def until(self, condition) -> None:
        """Waits for a condition, or for the end of a process."""
        while all(process.poll() is None for process in self.processes) and not condition():
            time.sleep(0.01)

    def end(self) -> list[int]:
        """The exit statuses."""
        statuses = [process.wait() for process in self.processes]
        self._too_long.cancel()
        for reader in self._readers:
            reader.join(10)
        return statuses

    def text(self) -> str:
        return "\n".join(line for lines in self.said for line in lines)


def apart(
    folder: Path, workdir: Path, hosts: int, devices: int, own_flags=None, places=None, seen=""
) -> Processes:
    """Hosts without a launcher; with `seen`, host I writes its examples to the file {seen}-I."""
    port = free_port()
    (folder / "recording.py").write_text(RECORDING)
    commands = []
    for host in range(hosts):
        start = (
            [str(folder / "recording.py"), f"{seen}-{host}"] if seen else ["-m", "mae_jax", "train"]
        )
        joined = [f"--coordinator=localhost:{port}", f"--num_hosts={hosts}", f"--host={host}"]
        commands.append(
            [sys.executable, *start, *flags(folder, workdir), *(joined if hosts > 1 else ())]
            + (own_flags[host] if own_flags else [])
        )
    return Processes(commands, devices, places)


def launched(folder: Path, workdir: Path, hosts: int, devices: int) -> Processes:
    """Hosts under launch/local.sh."""
    command = ["env", f"PORT={free_port()}", "bash", "launch/local.sh", str(hosts)]
    return Processes([[*command, *flags(folder, workdir)]], devices)


def signal_host(workdir: Path, host: int, number: int) -> None:
    """To the process of one host of a launched run."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text().split("\0")
        except OSError:
            continue  # ended meanwhile
        if {"mae_jax", f"--workdir={workdir}", f"--host={host}"} <= set(words):
            os.kill(int(file.parent.name), signal.Signals(number))


def logged(workdir: Path) -> list[dict]:
    """The complete lines of metrics.jsonl that tell of updates."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if "train/loss" in entry]


def losses(workdir: Path) -> list[float]:
    """Of all steps, each logged once and in order."""
    entries = logged(workdir)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    return [entry["train/loss"] for entry in entries]


def examples(seen: str, hosts: int) -> dict[int, list[int]]:
    """Step -> the examples that all hosts together were given."""
    given: dict[int, list[int]] = {}
    for host in range(hosts):
        for line in Path(f"{seen}-{host}").read_text().splitlines():
            step, indices = json.loads(line)
            given.setdefault(step, []).extend(indices)
    return given
