"""Convert: weights between this project, official files, timm and Hugging Face."""

from pathlib import Path

from absl import flags

from mae_jax import files
from mae_jax.commands import cli
from mae_jax.errors import UserError

USAGE = """\
mae-jax convert INPUT OUTPUT --to=ours|official|timm|hf [FLAG ...]

INPUT, whose format is recognised: an official .pth (encoder, full, visualize, fine-tuned,
training checkpoint), a Hugging Face directory of ViTMAE, ViT, DINOv2, DINOv3 or Pixio, a timm
.safetensors, .pth or directory, a workdir of this project or one of its checkpoints, also in a
bucket. Nothing in a file is ever run.
OUTPUT, by --to:
    ours      a workdir, for --config.init_from=OUTPUT and mae_jax.load
    official  a .safetensors with the official names
    timm      a .safetensors with timm's names; encoders and classifiers
    hf        a directory for from_pretrained: ViTMAEForPreTraining, or ViTModel of an encoder
"""
FORMATS = ("ours", "official", "timm", "hf")


def parse(argv: list[str]) -> tuple[str, Path, flags.FlagValues]:
    """Return input, output and options."""
    values = flags.FlagValues()
    flags.DEFINE_enum("to", None, FORMATS, "format of the output", flag_values=values)
    cli.define_weight_flags(values)
    rest = cli.parse("convert", USAGE, argv, values)
    if len(rest) != 2 or values.to is None:
        raise UserError(f"INPUT, OUTPUT and --to are wanted\n{USAGE}")
    files.require_local(rest[1], "OUTPUT")
    return rest[0], Path(rest[1]), values


def main(argv: list[str]) -> int:
    source, output, values = parse(argv)
    from mae_jax.interop import open as interop
    from mae_jax.interop import write

    if values.to in ("official", "timm"):
        write.refuse_pth(output)
    with write.whole(output) as part:
        weights = interop.open_weights(source, **cli.weight_options(values))
        print("\n".join(weights.report))
        if values.to == "ours":
            interop.save(part, weights.spec, weights.params, origin=source)
        else:
            writers = {"official": write.official, "timm": write.timm, "hf": write.hf}
            writers[values.to](part, weights.spec, weights.params)
    said = write.not_in_file(weights.spec) if values.to in ("official", "timm") else ""
    if said:
        print(f"such a file does not say how images are normalised; to read it, give {said}")
    print(f"written: {output}{'/' * output.is_dir()}")
    return 0
