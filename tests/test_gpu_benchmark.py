"""The benchmark for GPUs runs to its end on a machine without one, and says what was left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hosts
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_benchmark_for_gpus_runs_in_tiny_without_a_gpu_and_without_a_peer(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(16):
        pixels = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    environment = os.environ | {
        "GPU_PYTHON": sys.executable,
        "TORCH_PYTHON": "",
        "XLA_FLAGS": hosts.QUICK,
        "BENCHMARK_OUT": str(tmp_path / "out"),
    }
    command = ["bash", "benchmarks/gpu.sh", "--tiny", f"--images=folder:{tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out/gpu.md").read_text()
    for words in ("times as long with mask tokens", "Without PyTorch", "of which waiting"):
        assert words in table
    programs = json.loads((tmp_path / "out/gpu.json").read_text())["results"]
    assert len(programs) == 2
    assert all(np.isfinite(x["loss"]) for rounds in programs.values() for x in rounds)
    assert list((tmp_path / "out/gpu_run/profile").rglob("*.xplane.pb"))
