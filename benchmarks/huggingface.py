"""The other side of the step benchmark: transformers' ViTMAEForPreTraining with fused AdamW.

It uses sdpa attention, and torch.compile with --compiled. Prints a line of JSON.
"""

import argparse
import json
import time

from benchmarks.ours import measure, options
from benchmarks.sides import versions

SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}  # width, depth, heads


def run(args: argparse.Namespace) -> dict:
    """Return what the step takes."""
    started = time.perf_counter()
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
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    model = ViTMAEForPreTraining(config).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=device)
    forward = torch.compile(model) if args.compiled else model
    loss = torch.tensor(0.0)

    def step():
        nonlocal loss
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = forward(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    measured = measure(step, wait, args.steps, started)
    if device == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return measured | {
        "loss": float(loss),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions("torch", "transformers"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser)
    parser.add_argument("--compiled", action="store_true")
    print(json.dumps(run(parser.parse_args())))
