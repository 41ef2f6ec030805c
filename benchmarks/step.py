"""The pre-training step: ours against Hugging Face's ViTMAEForPreTraining with fused AdamW.

    bash benchmarks/run.sh step [--variant=B/16] [--batch=16] [--dtype=float32] [--rounds=2] ...

The same model, batch, precision and device, forward, backward and update; images stay on the
device. The peer runs eager and compiled by torch.compile; the faster counts.
"""

import argparse
import os
import sys

from benchmarks import ours, sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    ours.options(parser)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    given = [arg for arg in sys.argv[1:] if not arg.startswith("--rounds")]
    here, torch = sides.HERE, os.environ.get("TORCH_PYTHON", "")
    results = sides.take_turns(
        {
            "ours": [sys.executable, f"{here}/ours.py", *given],
            "HF, eager": [torch, f"{here}/huggingface.py", *given],
            "HF, torch.compile": [torch, f"{here}/huggingface.py", "--compiled", *given],
        },
        args.rounds,
    )
    medians = {name: sides.median(found) for name, found in results.items()}
    best = min((m for name, m in medians.items() if m and name != "ours"), default=None)
    rows = []
    for name, found in results.items():
        if (seconds := medians[name]) is None:
            rows.append([name, sides.errors(found), "", "", "", ""])
            continue
        peak = found[0].get("peak_flops")
        rows.append(
            [
                name,
                f"{args.batch / seconds:.2f}",
                f"{best / seconds:.2f}" if best else "",
                f"{sides.median(found, 'first_step'):.0f} s",
                f"{sides.median(found, 'peak_gib'):.1f} GiB",
                f"{100 * found[0]['flops'] / seconds / peak:.1f} %" if peak else "",
            ]
        )
    head = ["side", "images/s", "of HF's best", "first step after", "peak memory", "MFU"]
    title = f"{args.variant}, batch {args.batch}, {args.dtype}; {sides.all_versions(results)}"
    sides.report("step", f"{title}\n\n{sides.markdown(head, rows)}", {"results": results})


if __name__ == "__main__":
    main()
