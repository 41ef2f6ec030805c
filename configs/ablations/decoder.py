"""Depth and width of the decoder: the paper's Tables 1a and 1b.

    mae-jax sweep --config=configs/ablations/decoder.py --workdir=DIR --dry_run

Hardware and hours: --dry_run says them for each row. Arguments: configs/ablations/common.py.
Expected: the paper's numbers, which the table repeats; we have not measured them.
"""

from mae_jax.configs.ablations.common import sweep

DEPTHS = {1: (84.8, 65.5), 2: (84.9, 70.0), 4: (84.9, 71.9), 8: (84.9, 73.5), 12: (84.4, 73.3)}
WIDTHS = {
    128: (84.9, 69.1), 256: (84.8, 71.3), 512: (84.9, 73.5), 768: (84.4, 73.1), 1024: (84.3, 73.1)
}  # fmt: skip


def get_config(arg=None):
    paper = {f"depth_{n}": x for n, x in DEPTHS.items()}
    paper |= {f"width_{n}": x for n, x in WIDTHS.items()}
    return sweep(arg, rows, paper)


def rows(config):
    widths = [n for n in WIDTHS if n % config.model.decoder_heads == 0]
    return {
        **{f"depth_{n}": dict(model=dict(decoder_depth=n)) for n in DEPTHS},
        **{f"width_{n}": dict(model=dict(decoder_width=n)) for n in widths},
    }
