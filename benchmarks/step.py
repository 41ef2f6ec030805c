r"""The pre-training step: ours against Hugging Face's ViTMAEForPreTraining with fused AdamW.

    bash benchmarks/run.sh step [--variant=B/16,...] [--batches=16,...] [--dtype=float32] ...

The same model, batch, precision and device, forward, backward and update; images stay on the
device. The peer runs eager and compiled by torch.compile; ours on a CPU as one device and as a
device per core, with FSDP over them. The best of each, and of several batches, counts. Where one
Python has JAX for the GPU, torch and transformers, without run.sh:

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
    parser.add_argument("--batches", default="16", help="that are tried, of every variant")
    parser.add_argument("--rounds", type=int, default=2)
    parser.set_defaults(steps=4)
    args = parser.parse_args()
    here_only = ("--rounds", "--variant", "--batch")
    given = [f"--steps={args.steps}", *(a for a in sys.argv[1:] if not a.startswith(here_only))]
    here, torch = sides.HERE, os.environ.get("TORCH_PYTHON", "")
    cores = f"--devices={len(os.sched_getaffinity(0))}"
    kept, rows, verdicts, panels = {}, [], [], {}
    for variant in args.variant.split(","):
        rates: dict[str, float] = {}  # images per second of a side, at its best batch
        for batch in args.batches.split(","):
            what = [f"--variant={variant}", f"--batch={batch}", *given]
            results = sides.take_turns(
                {
                    "ours": [sys.executable, f"{here}/ours.py", *what],
                    "ours, a device per core": [sys.executable, f"{here}/ours.py", *what, cores],
                    "HF, eager": [torch, f"{here}/huggingface.py", *what],
                    "HF, torch.compile": [torch, f"{here}/huggingface.py", "--compiled", *what],
                },
                args.rounds,
            )
            kept[f"{variant}, batch {batch}"] = results
            for side, found in results.items():
                rows.append([variant, batch, side, *cells(found, int(batch), results["ours"])])
                if seconds := sides.median(found):
                    rates[side] = max(rates.get(side, 0), int(batch) / seconds)
        panels[f"{variant}, images/s"] = rates
        own = [rate for side, rate in rates.items() if side.startswith("ours")]
        peers = [rate for side, rate in rates.items() if not side.startswith("ours")]
        if own and peers:
            verdicts.append(f"{variant}: {max(own) / max(peers):.2f} of HF's best")
    head = ["model", "batch", "side", "images/s", "first step after", "peak memory", "MFU"]
    title = f"{args.dtype}; {sides.all_versions(results)}"
    text = "\n\n".join([title, sides.markdown(head, rows), *verdicts])
    sides.report("step", text, {"results": kept})
    sides.bars("step", panels)


def cells(found: list[dict], batch: int, own: list[dict]) -> list[str]:
    """Of one side's results: images/s, time to the first step, memory, MFU; or what went wrong.

    The MFU counts the model's operations and the chip's peak as our side knows them.
    """
    seconds = sides.median(found)
    if seconds is None:
        return [sides.errors(found), "", "", ""]
    flops, peak = own[0].get("flops"), own[0].get("peak_flops")
    return [
        f"{batch / seconds:.2f}",
        f"{sides.median(found, 'first_step'):.0f} s",
        f"{sides.median(found, 'peak_gib'):.1f} GiB",
        f"{100 * flops / seconds / peak:.1f} %" if flops and peak else "",
    ]


if __name__ == "__main__":
    main()
