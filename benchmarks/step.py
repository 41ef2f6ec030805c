r"""The pre-training step: ours against Hugging Face's ViTMAEForPreTraining with fused AdamW.

    bash benchmarks/run.sh step [--variant=B/16,...] [--batches=16,...] [--dtype=float32] ...

Both sides have the same model, batch, precision and device; a step is forward, backward and update,
and images stay on the device. The peer runs eager, and compiled by torch.compile. On a CPU, ours
runs as one device, and as a device per core with FSDP. The best of each side over all batches
counts. Where one Python has JAX for the GPU, torch and transformers, run it without run.sh:

    TORCH_PYTHON=python3 PYTHONPATH=. python3 benchmarks/step.py --dtype=bfloat16 \
        --variant=B/16,L/16,H/14 --batches=64,128,256
"""

import argparse
import os
import sys

from benchmarks import ours, sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ours.options(parser)
    parser.add_argument("--batches", default="16", help="to try with every variant")
    parser.add_argument("--rounds", type=int, default=2)
    parser.set_defaults(steps=4)
    args = parser.parse_args()
    here_only = ("--rounds", "--variant", "--batch")
    given = [f"--steps={args.steps}", *(a for a in sys.argv[1:] if not a.startswith(here_only))]
    cores = f"--devices={len(os.sched_getaffinity(0))}"
    torch = os.environ.get("TORCH_PYTHON", "")
    kept, rows, verdicts, panels = {}, [], [], {}
    for variant in args.variant.split(","):
        rates: dict[str, float] = {}  # images per second of a side, at its best batch
        for batch in args.batches.split(","):
            what = [f"--variant={variant}", f"--batch={batch}", *given]
            results = sides.take_turns(
                {
                    "ours": sides.script("ours", *what),
                    "ours, a device per core": sides.script("ours", *what, cores),
                    "HF, eager": sides.script("huggingface", *what, python=torch),
                    "HF, torch.compile": sides.script(
                        "huggingface", "--compiled", *what, python=torch
                    ),
                },
                args.rounds,
            )
            kept |= {f"{variant}, batch {batch}, {side}": x for side, x in results.items()}
            flops, peak = (sides.median(results["ours"], key) for key in ("flops", "peak_flops"))
            at_peak = flops / peak if flops and peak else None
            for side, rounds in results.items():
                if seconds := sides.median(rounds):
                    rates[side] = max(rates.get(side, 0), int(batch) / seconds)
                rows.append(
                    [
                        *(variant, batch, side),
                        sides.ratio(int(batch), seconds) or sides.cell(rounds),
                        sides.cell(rounds, "{:.0f} s", "first_step"),
                        sides.cell(rounds, "{:.1f} GiB", "peak_gib"),
                        sides.ratio(at_peak, seconds, "{:.1%}"),
                    ]
                )
        panels[f"{variant}, images/s"] = rates
        own = [rate for side, rate in rates.items() if side.startswith("ours")]
        peers = [rate for side, rate in rates.items() if not side.startswith("ours")]
        if own and peers:
            verdicts.append(f"{variant}: {max(own) / max(peers):.2f} of HF's best")
    head = ["model", "batch", "side", "images/s", "first step after", "peak memory", "MFU"]
    sides.report("step", args.dtype, head, rows, kept, verdicts)
    sides.bars("step", panels)


if __name__ == "__main__":
    main()
