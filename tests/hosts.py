"""Start real processes of `mae-jax train` as the hosts of one run."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import compiler
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
STEPS, PER_EPOCH = 44, 11  # enough that a run is still going when a signal reaches it
IMAGES = 1437
SAVE_ONCE = f"--config.checkpoint.every={STEPS} steps"  # of runs that nothing interrupts
# For processes whose time would go into compiling.
QUICK = (
    f"--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true {compiler.FLAG}"
)

CONFIG = f'''
from mae_jax.configs.pretrain import get_config as recipe

def get_config(arg=None):
    config = recipe("batch_size=128,image_size=32")
    config.model.update(
        width=16, depth=1, heads=2, patch_size=(16, 16), decoder_width=16, decoder_depth=1,
        decoder_heads=2, dtype="float32", channels=1,
    )
    config.train_for, config.optim.warmup = "{STEPS} steps", "5 steps"
    config.data.update(source="folder:IMAGES", mean=(0.5,), std=(0.5,))
    config.evals = {{}}
    config.checkpoint.update(every="3 steps", keep=2, keep_every="")
    config.log_every = "1 steps"
    config.hosts.heartbeat_seconds = 10
    return config
'''

# `mae-jax train` that writes the indices of its examples into a file, one line for each step.
RECORDING = """
    import json, os, sys
    sys.path.insert(0, os.getcwd())
    from mae_jax import __main__
    from mae_jax.tasks.examples import TrainImages

    batches, seen = TrainImages.batches, sys.argv.pop(1)

    def recording(self, start, rows):
        for step, (batch, *rest) in enumerate(batches(self, start, rows), start):
            with open(seen, "a") as file:
                print(json.dumps([step, batch["index"].tolist()]), file=file)
            yield batch, *rest

    TrainImages.batches = recording
    sys.exit(__main__.main(["train", *sys.argv[1:]]))
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "VENV": sys.prefix,
    }


def images(folder: Path, count: int = IMAGES, size: int = 8) -> Path:
    """Make FOLDER/images, which opens at once: the bundled digits import scikit-learn."""
    made = folder / "images"
    if not made.exists():
        made.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for index in range(count):
            levels = rng.integers(0, 256, (size, size)).astype(np.uint8)
            Image.fromarray(levels).save(made / f"{index}.png")
    return made


def checkouts(*folders: Path) -> list[Path]:
    """Make folders that hold links to the code, for hosts that run in folders of their own."""
    for folder in folders:
        folder.mkdir(parents=True)
        for name in ("mae_jax", "configs"):
            (folder / name).symlink_to(ROOT / name)
    return [*folders]


def flags(folder: Path, workdir: Path) -> list[str]:
    (folder / "tiny.py").write_text(CONFIG.replace("IMAGES", str(images(folder))))
    return [f"--config={folder / 'tiny.py'}", f"--workdir={workdir}"]


class Processes:
    """Processes that are killed when they take too long; `output[i]` grows line by line."""

    def __init__(self, commands: list[list[str]], devices: int, folders: list[Path] | None = None):
        self.processes = [
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment(devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command, folder in zip(commands, folders or [ROOT] * len(commands), strict=True)
        ]
        self.output: list[list[str]] = [[] for _ in commands]
        self._readers = [
            threading.Thread(target=self._read, args=(i,), daemon=True)
            for i in range(len(commands))
        ]
        self._too_long = threading.Timer(300, self.kill)
        for thread in [*self._readers, self._too_long]:
            thread.start()

    def _read(self, index: int) -> None:
        self.output[index].extend(line.rstrip() for line in self.processes[index].stdout)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def until(self, condition) -> None:
        """Wait for a condition, or for the end of a process."""
        while all(process.poll() is None for process in self.processes) and not condition():
            time.sleep(0.01)

    def end(self) -> list[int]:
        """Wait for the processes; return their exit statuses."""
        statuses = [process.wait() for process in self.processes]
        self._too_long.cancel()
        for reader in self._readers:
            reader.join(10)
        return statuses

    def found(self) -> list:
        """Return what the processes printed after the word FOUND, as JSON."""
        lines = [line for lines in self.output for line in lines]
        found = [line.removeprefix("FOUND ") for line in lines if line.startswith("FOUND ")]
        return list(map(json.loads, found))

    def text(self) -> str:
        return "\n".join(line for lines in self.output for line in lines)


def apart(
    folder: Path, workdir: Path, hosts: int, devices: int, own_flags=None, folders=None, seen=""
) -> Processes:
    """Start hosts without a launcher.

    Args:
      own_flags: more flags, for each host.
      folders: current folder of each host.
      seen: if given, host I writes its examples to the file {seen}-I.
    """
    port = free_port()
    (folder / "recording.py").write_text(textwrap.dedent(RECORDING))
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
    return Processes(commands, devices, folders)


def launched(folder: Path, workdir: Path, hosts: int, devices: int, *more: str) -> Processes:
    """Start hosts under launch/local.sh."""
    command = ["env", f"PORT={free_port()}", "bash", "launch/local.sh", str(hosts)]
    return Processes([[*command, *flags(folder, workdir), *more]], devices)


def signal_host(workdir: Path, host: int, number: int) -> None:
    """Send a signal to the process of one host of a launched run."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text().split("\0")
        except OSError:
            continue  # ended meanwhile
        if {"mae_jax", f"--workdir={workdir}", f"--host={host}"} <= set(words):
            os.kill(int(file.parent.name), signal.Signals(number))


def logged(workdir: Path) -> list[dict]:
    """Return the complete lines of metrics.jsonl that report updates."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if "train/loss" in entry]


def losses(workdir: Path) -> list[float]:
    """Return the losses of all steps; each step must be logged once and in order."""
    entries = logged(workdir)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    return [entry["train/loss"] for entry in entries]


def examples(seen: str, hosts: int) -> dict[int, list[int]]:
    """Return step -> the examples that all hosts together were given."""
    given: dict[int, list[int]] = {}
    for host in range(hosts):
        for line in Path(f"{seen}-{host}").read_text().splitlines():
            step, indices = json.loads(line)
            given.setdefault(step, []).extend(indices)
    return given


def run_until_logged(folder: Path, workdir: Path, hosts: int, devices: int) -> Processes:
    """Start hosts under launch/local.sh, and wait until they have made three more updates."""
    run = launched(folder, workdir, hosts, devices)
    before = len(logged(workdir))
    run.until(lambda: len(logged(workdir)) > before + 2)
    return run


def assert_read_once(given: dict[int, list[int]]) -> None:
    """Check that each of two epochs gave every example at most once, in full batches."""
    for epoch in (range(PER_EPOCH), range(PER_EPOCH, 2 * PER_EPOCH)):
        read = [index for step in epoch for index in given[step]]
        assert len(set(read)) == len(read) == 128 * PER_EPOCH
