"""One side of several benchmarks: our pre-training step. Prints a line of JSON.

    python benchmarks/ours.py [--variant=B/16] [--batch=16] [--dtype=float32] [--image_size=224] ...

As `mae-jax train` runs it, on a batch that stays on the device.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable


def measure(step: Callable, wait: Callable, steps: int, started: float) -> dict:
    """Seconds of single steps after the first two, and of all until the first one ended."""
    step()
    wait()
    first = time.perf_counter() - started
    step()
    wait()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "first_step": first, "peak_gib": peak}


def make_config(args: argparse.Namespace):
    from configs.pretrain import get_config

    config = get_config(
        f"variant={args.variant},batch_size={args.batch},image_size={args.image_size}"
    )
    config.data.source = "bundled:photos"  # not read
    config.model.dtype = args.dtype
    config.model.scan_unroll = args.unroll or config.model.depth
    config.model.attention = args.attention
    config.model.remat = args.remat
    config.mesh.fsdp = args.devices
    config.masking.tokens_in_encoder = args.tokens_in_encoder
    return config


def simulate(devices: int) -> None:
    """Makes a CPU several devices."""
    import jax

    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
        if jax.default_backend() != "cpu":
            raise SystemExit("several devices: for CPUs only")


def run(args: argparse.Namespace) -> dict:
    started = time.perf_counter()
    import jax
    import numpy as np

    from benchmarks.sides import versions
    from mae_jax import flops, sharding, train
    from mae_jax.tasks import pretrain

    simulate(args.devices)
    config = make_config(args)
    mesh = sharding.make_mesh(**config.mesh)
    task = pretrain.make_task(config, sharding.constrain_batch(mesh))
    tx, _ = task.optimizer(1000, 100)
    program = train.compile_step(task, tx, config, mesh)
    state = program.init()
    shape = (args.batch, args.image_size, args.image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    batch = sharding.put_batch(mesh, {"image": images}, args.batch)
    values: dict = {}

    def step():
        nonlocal state, values
        state, values = program.step(state, batch)

    found = measure(step, lambda: jax.block_until_ready((state, values)), args.steps, started)
    device = jax.devices()[0]
    if device.platform != "cpu":
        found["peak_gib"] = device.memory_stats()["peak_bytes_in_use"] / 2**30
    return found | {
        "loss": float(values["loss"]),
        "device": device.device_kind,
        "flops": task.passes * task.flops_per_example * args.batch,
        "peak_flops": flops.peak_flops(device.device_kind),
        "versions": versions("jax", "flax", "optax"),
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=5, help="that are timed, in each round")
    parser.add_argument("--unroll", type=int, default=0, help="config.model.scan_unroll; 0: all")
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn"])
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--devices", type=int, default=1, help="of a CPU, with FSDP over them")
    parser.add_argument("--tokens_in_encoder", action="store_true")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser)
    print(json.dumps(run(parser.parse_args())))
