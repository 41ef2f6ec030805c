"""One side of several benchmarks: our pre-training step. Prints a line of JSON.

    python benchmarks/ours.py [--variant=B/16] [--batch=16] [--dtype=float32] [--image_size=224] ...

The step is that of `mae-jax train`; its batch stays on the device.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def measure(step: Callable, wait: Callable, steps: int, started: float) -> dict:
    """Return the seconds of single steps after the first two, and those until the first ended.

    Args:
      wait: returns once the last step has ended.
      started: when the process began, by `time.perf_counter`.
    """
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


def make_config(args: argparse.Namespace) -> Any:
    """Return the config of a pre-training as the options say."""
    from mae_jax.configs import crossmae, pretrain

    sizes = f"variant={args.variant},batch_size={args.batch},image_size={args.image_size}"
    if args.share:
        config = crossmae.get_config(f"{sizes},share={args.share}")
    else:
        config = pretrain.get_config(sizes)
    config.data.source = "bundled:photos"  # not read
    config.model.decoder_depth = args.decoder_depth
    config.model.dtype, config.model.residual_dtype = args.dtype, args.residual
    config.model.scan_unroll = args.unroll or config.model.depth
    config.model.attention = args.attention
    config.model.remat = args.remat
    config.mesh.fsdp = args.devices
    config.masking.tokens_in_encoder = args.tokens_in_encoder
    return config


def compiled(args: argparse.Namespace, replicas: int = 1) -> tuple:
    """Return task, shapes of the state with shardings, compiled step, and () -> state and batch.

    Args:
      replicas: simulated devices that each hold the whole state.
    """
    import jax
    import numpy as np

    from mae_jax import sharding, tasks, train
    from mae_jax.mesh import make_mesh

    if (devices := args.devices * replicas) > 1:
        jax.config.update("jax_num_cpu_devices", devices)
        if jax.default_backend() != "cpu":
            raise SystemExit("several devices: for CPUs only")
    config = make_config(args)
    mesh = make_mesh(**config.mesh)
    task = tasks.build(config, mesh)
    tx, _ = task.optimizer(1000, 100)
    shapes, init = train.lay_out(task, tx, config.seed, mesh)
    step = train.compile_step(task, tx, mesh, shapes, batch_size=args.batch, seed=config.seed)
    shape = (args.batch, args.image_size, args.image_size, 3)

    def start() -> tuple:
        images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        return init(), sharding.put_batch(mesh, {"image": images}, args.batch)

    return task, shapes, step, start


def build(args: argparse.Namespace, replicas: int = 1) -> tuple:
    """Return task, shapes of the state with shardings, first state, compiled step, and a batch."""
    task, shapes, step, start = compiled(args, replicas)
    state, batch = start()
    return task, shapes, state, step, batch


def racer(args: argparse.Namespace) -> Callable[[int], dict]:
    """Compile a program; return a function that times a block of its steps, for `sides.serve`."""
    import jax

    from benchmarks.sides import versions
    from mae_jax import flops

    task, _, step_fn, start = compiled(args)
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind)
    work = task.flops_multiplier * task.flops_per_example * args.batch

    def block(steps: int) -> dict:
        state, batch = start()  # gone afterwards: the programs together do not fit
        for _ in range(3):
            state, metrics = step_fn(state, batch)
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = step_fn(state, batch)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - began) / steps
        return {
            "seconds": [seconds],
            "loss": float(metrics["loss"]),
            "mfu": work / seconds / peak if peak else None,
            "temporary_gib": step_fn.memory_analysis().temp_size_in_bytes / 2**30,
            "device": device.device_kind,
            "versions": versions("jax", "flax", "optax"),
        }

    return block


def race(programs: dict[str, list[str]]) -> None:
    """Compile programs, each given by its options, and time them when they are asked for."""
    from benchmarks import sides

    parser = argparse.ArgumentParser()
    options(parser)
    sides.serve({name: partial(racer, parser.parse_args(x)) for name, x in programs.items()})


def run(args: argparse.Namespace) -> dict:
    """Return what the step takes."""
    started = time.perf_counter()
    import jax

    from benchmarks.sides import versions
    from mae_jax import flops

    task, _, state, step_fn, batch = build(args)
    metrics: dict = {}

    def step() -> None:
        nonlocal state, metrics
        state, metrics = step_fn(state, batch)

    measured = measure(step, lambda: jax.block_until_ready((state, metrics)), args.steps, started)
    device = jax.devices()[0]
    if device.platform != "cpu":
        measured["peak_gib"] = device.memory_stats()["peak_bytes_in_use"] / 2**30
    return measured | {
        "loss": float(metrics["loss"]),
        "device": device.device_kind,
        "flops": task.flops_multiplier * task.flops_per_example * args.batch,
        "peak_flops": flops.peak_flops(device.device_kind),
        "versions": versions("jax", "flax", "optax"),
    }


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the step's sides."""
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--decoder_depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=5, help="timed in each round")
    parser.add_argument("--unroll", type=int, default=0, help="config.model.scan_unroll; 0: all")
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "cudnn"])
    parser.add_argument("--residual", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--devices", type=int, default=1, help="to make of a CPU, with FSDP")
    parser.add_argument("--tokens_in_encoder", action="store_true")
    parser.add_argument("--share", type=float, default=0.0, help="CrossMAE's; 0: MAE")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser)
    parser.add_argument("--race", type=json.loads, help="programs, for benchmarks/gpu.py")
    args = parser.parse_args()
    if args.race:
        race(args.race)
    else:
        print(json.dumps(run(args)))
