"""The pre-training step: ours against Hugging Face's ViTMAEForPreTraining with fused AdamW.

    bash benchmarks/run.sh step [--variant=B/16] [--batch=16] [--dtype=float32] [--rounds=3]

The same model, batch, precision and device, forward, backward and update; images stay on the
device. The peer runs with sdpa attention, eager and compiled by torch.compile; the faster counts.
"""

import argparse
import json
import os
import resource
import sys
import time

from benchmarks import sides

HF = {  # width, depth, heads
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}


def measure(step, wait, steps: int, started: float) -> dict:
    """Times of single steps after the first two."""
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


def ours(args: argparse.Namespace) -> dict:
    started = time.perf_counter()
    import jax
    import numpy as np

    from configs.pretrain import get_config
    from mae_jax import flops, sharding, train
    from mae_jax.tasks import pretrain

    config = get_config(f"variant={args.variant},batch_size={args.batch}")
    config.data.source = "bundled:photos"  # not read
    config.model.dtype = args.dtype
    config.model.scan_unroll = args.unroll or config.model.depth
    if jax.default_backend() == "gpu":
        config.model.attention = args.attention
    mesh = sharding.make_mesh(**config.mesh)
    task = pretrain.make_task(config, sharding.constrain_batch(mesh))
    tx, _ = task.optimizer(1000, 100)
    program = train.compile_step(task, tx, config, mesh)
    state = program.init()
    images = np.random.default_rng(0).integers(0, 256, (args.batch, 224, 224, 3)).astype(np.uint8)
    batch = sharding.put_batch(mesh, {"image": images}, args.batch)
    values = None

    def step():
        nonlocal state, values
        state, values = program.step(state, batch)

    found = measure(step, lambda: jax.block_until_ready((state, values)), args.steps, started)
    device = jax.devices()[0]
    if device.platform == "gpu":
        found["peak_gib"] = device.memory_stats()["peak_bytes_in_use"] / 2**30
    peak = flops.peak_flops(device.device_kind)
    work = task.passes * task.flops_per_example * args.batch
    return found | {
        "loss": float(values["loss"]),
        "device": device.device_kind,
        "flops": work,
        "peak_flops": peak,
        "versions": sides.versions("jax", "flax", "optax", "mae-jax"),
    }


def hf(args: argparse.Namespace) -> dict:
    started = time.perf_counter()
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width, depth, heads = HF[args.variant[0]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        patch_size=int(args.variant.partition("/")[2]),
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    model = ViTMAEForPreTraining(config).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    run = torch.compile(model) if args.side == "hf-compiled" else model
    low = args.dtype == "bfloat16"
    loss = None

    def step():
        nonlocal loss
        with torch.autocast(device, torch.bfloat16, enabled=low):
            loss = run(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    found = measure(step, wait, args.steps, started)
    if device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return found | {
        "loss": float(loss),
        "device": name,
        "versions": sides.versions("torch", "transformers"),
    }


def compare(args: argparse.Namespace) -> None:
    common = [a for a in sys.argv[1:] if not a.startswith("--side")]
    torch = os.environ.get("TORCH_PYTHON", "")
    commands = {
        "ours": [sys.executable, __file__, "--side=ours", *common],
        "HF, eager": [torch, __file__, "--side=hf", *common],
        "HF, torch.compile": [torch, __file__, "--side=hf-compiled", *common],
    }
    results = sides.take_turns(commands, args.rounds)
    medians = {name: sides.median(found) for name, found in results.items()}
    best = min((m for name, m in medians.items() if m and name != "ours"), default=None)
    rows = []
    for name, found in results.items():
        seconds = medians[name]
        if seconds is None:
            rows.append([name, sides.errors(found), "", "", "", ""])
            continue
        mfu = ""
        if found[0].get("peak_flops"):
            mfu = f"{100 * found[0]['flops'] / seconds / found[0]['peak_flops']:.1f} %"
        rows.append(
            [
                name,
                f"{args.batch / seconds:.2f}",
                f"{best / seconds:.2f}" if best else "",
                f"{sides.median(found, 'first_step'):.0f} s",
                f"{sides.median(found, 'peak_gib'):.1f} GiB",
                mfu,
            ]
        )
    head = ["side", "images/s", "of HF's best", "first step after", "peak memory", "MFU"]
    every = " ".join(
        f"{k} {v}"
        for found in results.values()
        for k, v in found[0].get("versions", {}).items()
        if k != "python"
    )
    title = f"{args.variant}, batch {args.batch}, {args.dtype}: {every}\n\n"
    sides.report("step", title + sides.markdown(head, rows), {"results": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--unroll", type=int, default=0, help="of ours; 0 = all blocks")
    parser.add_argument("--attention", default="xla", choices=["xla", "cudnn"])
    parser.add_argument("--side", choices=["ours", "hf", "hf-compiled"])
    args = parser.parse_args()
    if args.side is None:
        compare(args)
    else:
        print(json.dumps((ours if args.side == "ours" else hf)(args)))


if __name__ == "__main__":
    main()
