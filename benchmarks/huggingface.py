"""The other side of the step benchmark: transformers' ViTMAEForPreTraining with fused AdamW.

It uses sdpa attention, and torch.compile with --compiled. Prints a line of JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

from benchmarks.ours import measure, options
from benchmarks.sides import serve, versions

SIZES = {
    "Ti": (192, 12, 3),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}  # width, depth, heads


def build(args: argparse.Namespace) -> tuple:
    """Return a function that makes a step and returns its loss, one that waits, and the device."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    size, _, patch = args.variant.partition("/")
    width, depth, heads = SIZES[size]
    config = ViTMAEConfig(
        image_size=args.image_size,
        patch_size=int(patch),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        decoder_num_hidden_layers=args.decoder_depth,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    model = ViTMAEForPreTraining(config).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=device)
    forward = torch.compile(model) if args.compiled else model

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = forward(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    return step, wait, device


def facts(loss, device: str) -> dict:
    """Return what is said of every measurement, beside its seconds."""
    import torch

    cuda = device == "cuda"
    memory = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {}
    return memory | {
        "loss": float(loss),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": versions("torch", "transformers"),
    }


def racer(args: argparse.Namespace) -> Callable[[int], dict]:
    """Compile the step; return a function that times a block of steps, for `sides.serve`."""
    import torch

    step, wait, device = build(args)
    for _ in range(3):
        step()
    wait()

    def block(steps: int) -> dict:
        for _ in range(2):
            step()
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            loss = step()
        wait()
        seconds = (time.perf_counter() - began) / steps
        result = {"seconds": [seconds]} | facts(loss, device)
        torch.cuda.empty_cache()  # for the others
        return result

    return block


def run(args: argparse.Namespace) -> dict:
    """Return what the step takes."""
    started = time.perf_counter()
    step, wait, device = build(args)
    loss = None

    def remembered():
        nonlocal loss
        loss = step()

    measured = measure(remembered, wait, args.steps, started)
    return measured | facts(loss, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--race", default="", help="a name, for benchmarks/gpu.py")
    args = parser.parse_args()
    if args.race:
        serve({args.race: partial(racer, args)})
    else:
        print(json.dumps(run(args)))
