"""Convert: weights between this project, official .pth files, timm and Hugging Face."""

import os
import re
from pathlib import Path
from typing import Any

from absl import flags

from mae_jax.errors import UserError

USAGE = """\
mae-jax convert INPUT OUTPUT --to=ours|official|timm|hf [FLAG ...]

INPUT, whose format is found out: an official .pth (encoder, full, visualize, fine-tuned, linear
probe, training checkpoint), a Hugging Face ViTMAE or ViT directory, a timm .safetensors or .pth, a
workdir of this project or one of its checkpoints, also in a bucket. Nothing in a file is ever run.
OUTPUT, by --to:
    ours      a workdir, for --config.init_from=OUTPUT and mae_jax.load
    official  a .safetensors with the official names
    timm      a .safetensors with timm's names; encoders and classifiers
    hf        a directory for from_pretrained: ViTMAEForPreTraining, or ViTModel of an encoder
"""
FORMATS = ("ours", "official", "timm", "hf")


def parse(argv: list[str]) -> tuple[str, Path, flags.FlagValues]:
    """Input, output and options.

    Raises:
      UserError: something is missing, unknown or of the wrong type.
    """
    values = flags.FlagValues()
    flags.DEFINE_enum("to", None, FORMATS, "format of the output", flag_values=values)
    flags.DEFINE_enum("part", "all", ("all", "encoder"), "what to take", flag_values=values)
    for name, text in (
        ("image_size", "of the images to make a model for: SIDE or HEIGHTxWIDTH"),
        ("file_image_size", "of the file, where its patches are not in a square"),
    ):
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, text in (
        ("channels", "of the images to make a model for; encoder only"),
        ("heads", "of the encoder, where the file does not say"),
        ("decoder_heads", "of the decoder, where the file does not say"),
    ):
        flags.DEFINE_integer(name, None, text, lower_bound=1, flag_values=values)
    flags.DEFINE_enum(
        "target", None, ("pixels", "norm_pixels"), "what the decoder predicts", flag_values=values
    )
    for name in ("mean", "std"):
        flags.DEFINE_list(name, None, f"{name} of each channel, at 0..1", flag_values=values)
    flags.DEFINE_bool(
        "averaged", False, "of a run with config.ema, the averaged weights", flag_values=values
    )
    flags.DEFINE_string("licence", "", "for the model card", flag_values=values)
    flags.DEFINE_bool(
        "allow_unused", False, "go on with tensors that have no place", flag_values=values
    )
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=values)
    try:
        rest = values(["mae-jax convert", *argv])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if values.help:
        print(USAGE)
        print(values.main_module_help() or values.get_help())
        raise SystemExit(0)
    if len(rest) != 2 or values.to is None:
        raise UserError(f"INPUT, OUTPUT and --to are wanted\n{USAGE}")
    return rest[0], Path(rest[1]), values


def options(values: flags.FlagValues) -> dict[str, Any]:
    """The flags as arguments of `interop.open.open_weights`."""

    def numbers(name: str) -> tuple[float, ...] | None:
        given = getattr(values, name)
        try:
            return tuple(float(x) for x in given) if given else None
        except ValueError:
            raise UserError(
                f"--{name}={','.join(given)}: write numbers with commas between them"
            ) from None

    return {
        "part": values.part,
        "image_size": size("image_size", values.image_size),
        "file_image_size": size("file_image_size", values.file_image_size),
        "channels": values.channels,
        "heads": values.heads,
        "decoder_heads": values.decoder_heads,
        "target": values.target,
        "mean": numbers("mean"),
        "std": numbers("std"),
        "allow_unused": values.allow_unused,
        "averaged": values.averaged,
    }


def size(name: str, text: str | None) -> tuple[int, int] | None:
    """'224' or '224x448' -> (height, width).

    Raises:
      UserError: it is neither.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise UserError(f"--{name}={text!r}: write SIDE or HEIGHTxWIDTH, such as 224 or 224x448")
    return int(found[1]), int(found[2] or found[1])


def main(argv: list[str]) -> int:
    source, output, values = parse(argv)
    arguments = options(values)
    from mae_jax.interop import write
    from mae_jax.interop.open import open_weights, save

    if values.to in ("official", "timm"):
        write.refuse_pth(output)
    with write.whole(output) as part:
        spec, params, report, about = open_weights(source, **arguments)
        print("\n".join(report))
        about = about | {"licence": values.licence}
        if values.to == "ours":
            save(part, spec, params, about["origin"])
        elif values.to == "hf":
            write.hf(part, spec, params, about)
        else:
            {"official": write.official, "timm": write.timm}[values.to](part, spec, params)
    print(f"written: {output}{os.sep * output.is_dir()}")
    return 0
