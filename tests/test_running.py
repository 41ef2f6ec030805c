"""Tests of how a command sets up JAX: the devices of a CPU, and where programs are kept."""

import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from mae_jax.commands import running
from mae_jax.data import workers


@pytest.mark.parametrize(
    "workdir, cache",
    [
        ("gs://bucket/runs/one", "gs://bucket/runs/compilation_cache"),
        ("gs://bucket/one/", "gs://bucket/compilation_cache"),
        ("/data/one", "/users/me/.cache/mae_jax/compiled"),
    ],
)
def test_what_was_compiled_is_kept_for_the_user_or_beside_the_bucket(workdir, cache, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert running.compilation_cache(workdir) == cache
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    if "://" not in workdir:
        assert running.compilation_cache(workdir) == "/cache/mae_jax/compiled"


@pytest.mark.parametrize(
    "cores, batch_size, grad_accum, data, devices",
    [
        (1, 256, 1, -1, 1),
        (2, 256, 1, -1, 2),
        (64, 256, 1, -1, 4),  # each holds the whole state
        (4, 96, 1, -1, 3),  # of at least 32 images
        (4, 256, 4, -1, 2),
        (2, 65, 1, -1, 1),  # a whole batch cannot be divided
        (4, 16, 1, -1, 1),
        (4, 0, 0, -1, 1),  # refused elsewhere
        (4, 256, 1, 1, 1),  # as asked for
    ],
)
def test_a_cpu_is_divided_into_devices(cores, batch_size, grad_accum, data, devices, monkeypatch):
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    run = ConfigDict(
        dict(batch_size=batch_size, grad_accum=grad_accum, mesh=dict(data=data, fsdp=0, tensor=1))
    )
    assert running.cpu_devices([run]) == devices
    other = run.copy_and_resolve_references()
    other.batch_size = 64
    assert running.cpu_devices([run, other]) <= devices


def test_a_run_on_a_cpu_has_a_device_for_each_core(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    script = (
        "import jax\n"
        "from mae_jax.commands import recipes, running\n"
        "config, values, _ = recipes.parse(['--config=folder'], running.define, 'train')\n"
        "running.connect([config], values, 'workdir')\n"
        "print(jax.device_count(), running.cpu_devices([config]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    count, chosen = done.stdout.split()
    assert count == chosen
