"""Names and layouts of the PyTorch families beside ours: one table, read in both directions.

Axes of the layouts, as einops has them: d width, e decoder width, h hidden width of an MLP, s
heads, f head width, n tokens of the whole image, r rows, c columns and ch channels of a patch, t
target dim, y classes, k class tokens, g registers. A linear layer of PyTorch is (out, in), ours
(in, out); its fused qkv is [q | k | v], each head-major. Source: docs/REFERENCE.md section 8;
transformers 5.24.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.errors import UserError
from mae_jax.models.block_options import BlockOptions
from mae_jax.models.posemb import sincos_2d
from mae_jax.models.spec import ModelSpec, ViTSpec

Family = Literal["official", "hf"]  # timm has the names of the official encoder


# Parts of a layer: ours, PyTorch's, our axes, PyTorch's axes.
def _linear(i: str, o: str) -> tuple:
    return ("/kernel", ".weight", f"{i} {o}", f"{o} {i}"), ("/bias", ".bias", o, o)


def _norm(d: str) -> tuple:
    return ("/scale", ".weight", d, d), ("/bias", ".bias", d, d)


def _scale(d: str) -> tuple:
    return (("/scale", ".weight", d, d),)


def _tensor(axes: str) -> tuple:
    return (("", "", axes, axes),)


CONV = (("/kernel", ".weight", "(r c ch) d", "d ch r c"), ("/bias", ".bias", "d", "d"))
QKV = (
    ("/kernel", ".weight", "d three s f", "(three s f) d"),
    ("/bias", ".bias", "three s f", "(three s f)"),
)
PROJ = (("/kernel", ".weight", "s f d", "d (s f)"), ("/bias", ".bias", "d", "d"))

# Ours, official (and timm), Hugging Face, layout. Names in braces are tensors that are concatenated
# along their first axis: the rows [q | k | v] of one tensor of the others.
Row = tuple[str, str, str, Any]
BLOCK: tuple[Row, ...] = (
    ("norm1", "norm1", "layernorm_before", _norm("d")),
    ("attn/qkv", "attn.qkv", "attention.attention.{query,key,value}", QKV),
    ("attn/proj", "attn.proj", "attention.output.dense", PROJ),
    ("norm2", "norm2", "layernorm_after", _norm("d")),
    ("mlp/fc1", "mlp.fc1", "intermediate.dense", _linear("d", "h")),
    ("mlp/fc2", "mlp.fc2", "output.dense", _linear("h", "d")),
    ("attn/q_norm", "attn.q_norm", "attention.attention.q_norm", _scale("f")),
    ("attn/k_norm", "attn.k_norm", "attention.attention.k_norm", _scale("f")),
    ("scale1/scale", "ls1.gamma", "layer_scale1.lambda1", _tensor("d")),
    ("scale2/scale", "ls2.gamma", "layer_scale2.lambda1", _tensor("d")),
)
TABLE: tuple[Row, ...] = (
    ("encoder/cls_token", "cls_token", "vit.embeddings.cls_token", _tensor("1 k d")),
    ("encoder/register_token", "reg_token", "vit.embeddings.register_tokens", _tensor("1 g d")),
    ("encoder/pos_embed", "pos_embed", "vit.embeddings.position_embeddings", _tensor("1 n d")),
    ("encoder/patch_embed", "patch_embed.proj", "vit.embeddings.patch_embeddings.projection", CONV),
    ("encoder/stack/blocks", "blocks", "vit.encoder.layer", BLOCK),
    ("encoder/norm", "norm", "vit.layernorm", _norm("d")),
    ("decoder/embed", "decoder_embed", "decoder.decoder_embed", _linear("d", "e")),
    ("decoder/mask_token", "mask_token", "decoder.mask_token", _tensor("1 1 e")),
    ("decoder/pos_embed", "decoder_pos_embed", "decoder.decoder_pos_embed", _tensor("1 n e")),
    ("decoder/stack/blocks", "decoder_blocks", "decoder.decoder_layers", BLOCK),
    ("decoder/norm", "decoder_norm", "decoder.decoder_norm", _norm("e")),
    ("decoder/pred", "decoder_pred", "decoder.decoder_pred", _linear("e", "t")),
    ("fc_norm", "fc_norm", "fc_norm", _norm("d")),
    ("head", "head", "classifier", _linear("d", "y")),
)

# Other spellings of Hugging Face's names: what transformers 5 calls layers in memory, what it
# writes for decoder layers, models without a head, which leave out the first "vit.", and what
# DINOv2, DINOv3 and Pixio call the same.
HF_ALIASES = (
    (r"^(dinov2|dinov2_with_registers|dinov3_vit|pixio)\.", ""),
    (r"^(model\.)?layer\.", "vit.encoder.layer."),
    (r"^norm\.", "vit.layernorm."),
    (r"^(?=(embeddings|encoder|layers|layernorm|pooler)\.)", "vit."),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.(fc1|up_proj)\.", ".intermediate.dense."),
    (r"\.mlp\.(fc2|down_proj)\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.patch_embeddings\.(?=weight$|bias$)", ".patch_embeddings.projection."),
)


class Entry(NamedTuple):
    """One tensor of ours, or one layer of a stacked one, and where another family keeps it."""

    path: str
    layer: int | None  # of a stacked tensor
    names: tuple[str, ...]  # theirs; several are concatenated along their first axis
    ours: str  # axes
    theirs: str
    sizes: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """PyTorch's shape, of all names together."""
        groups = re.findall(r"\([^)]*\)|\S+", self.theirs)
        axes = (group.strip("()").split() for group in groups)
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in axes)

    def rearranged(self, x: np.ndarray, source: str, target: str) -> np.ndarray:
        """Return `x` with the axes `target` instead of `source`."""
        axes = set(re.findall(r"[a-z]+", source))
        sizes = {axis: size for axis, size in self.sizes.items() if axis in axes}
        return rearrange(x, f"{source} -> {target}", **sizes)


def canonical_hf(name: str) -> str:
    """Return a Hugging Face name, in whichever spelling, as TABLE has it."""
    for pattern, replacement in HF_ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def stem(path: str, family: Family, table: tuple[Row, ...] = TABLE) -> str:
    """Return what a family calls a part of TABLE or BLOCK, without the suffix .weight or .bias."""
    return next(hf if family == "hf" else official for p, official, hf, _ in table if p == path)


def entries(spec: ModelSpec, family: Family) -> Iterator[Entry]:
    """Yield every tensor that a network has in a family, position tables included."""
    rows, cols = spec.patch_size
    sizes = {
        "1": 1, "three": 3, "d": spec.encoder.width, "n": spec.cls_tokens + spec.num_patches,
        "r": rows, "c": cols, "ch": spec.channels, "t": spec.target_dim, "y": spec.classes,
        "e": spec.decoder.width if spec.decoder else 0, "k": spec.cls_tokens,
        "g": spec.encoder.registers,
    }  # fmt: skip
    absent = [
        "fc_norm" if spec.final_norm else "encoder/norm",
        *["head"] * (not spec.classes),
        *["decoder"] * (not spec.decoder),
        *["encoder/register_token"] * (not spec.encoder.registers),
    ]
    for path, *_, layout in TABLE:
        theirs = stem(path, family)
        if path.startswith(tuple(absent)):
            continue
        if layout is not BLOCK:
            layout = _of_norm(layout, spec.encoder)
            yield from _parts(path, theirs, None, layout, sizes)
            continue
        vit = spec.decoder if spec.decoder and path.startswith("decoder") else spec.encoder
        inside = {"d": vit.width, "s": vit.heads, "f": vit.width // vit.heads, "h": vit.mlp_width}
        inside["depth"] = vit.depth
        options = vit.block or BlockOptions()
        left_out = ["attn/q_norm", "attn/k_norm"] * (not options.qk_norm)
        left_out += ["scale1/scale", "scale2/scale"] * (not options.layer_scale)
        for layer in range(vit.depth):
            for part, *_, part_layout in BLOCK:
                if part in left_out:
                    continue
                part_layout = _of_norm(part_layout, vit)
                name = f"{theirs}.{layer}.{stem(part, family, BLOCK)}"
                yield from _parts(f"{path}/{part}", name, layer, part_layout, sizes | inside)


def _of_norm(layout: Any, vit: ViTSpec) -> Any:
    """Return the layout without a bias if it is that of a norm and norms have none."""
    rms = vit.block and vit.block.norm == "rms"
    return _scale("d") if rms and layout == _norm("d") else layout


def _parts(
    path: str, name: str, layer: int | None, layout: Any, sizes: dict[str, int]
) -> Iterator[Entry]:
    before, _, rest = name.partition("{")  # 'a.{x,y}' names 'a.x' and 'a.y'
    inside, _, after = rest.partition("}")
    for part, suffix, axes, their_axes in layout:
        names = tuple(before + x + after + suffix for x in inside.split(","))
        yield Entry(path + part, layer, names, axes, their_axes, sizes)


def to_ours(
    state: dict[str, np.ndarray], spec: ModelSpec, family: Family
) -> tuple[dict, ModelSpec]:
    """Return their state dict as our float32 parameters, and the spec by `with_positions`.

    A position table of a pre-training model that equals the sine-cosine table is no parameter of
    ours; one that differs is kept as one. Tensors are removed from `state` as they are copied, so
    that memory holds the network once.

    Raises:
      UserError: a tensor is missing, has another shape, is not of floats, or is not finite.
    """
    wanted = list(entries(spec, family))
    missing = [name for entry in wanted for name in entry.names if name not in state]
    missing = [name for name in missing if not name.endswith(("pos_embed", "position_embeddings"))]
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing, so that this would be a partial load:"
            f" {', '.join(missing[:5])}{', ...' * (len(missing) > 5)}"
        )
    flat: dict[str, np.ndarray] = {}
    for entry in wanted:
        if entry.names[0] not in state:
            continue  # a fixed position table, which we compute
        x = _take(state, entry)
        if entry.path.endswith("pos_embed") and not spec.classes and is_sincos(x, spec.grid):
            continue  # a classifier keeps its table, which it trains
        x = entry.rearranged(x, entry.theirs, entry.ours)
        if entry.layer is None:
            flat[entry.path] = np.array(x, np.float32, order="C")
            continue
        if entry.layer == 0:
            flat[entry.path] = np.empty((entry.sizes["depth"], *x.shape), np.float32)
        flat[entry.path][entry.layer] = x
    for path, x in flat.items():
        if not np.isfinite(x).all():
            raise UserError(f"{path} has values that are not finite: the file's weights are broken")
    return unflatten_dict(flat, sep="/"), with_positions(spec, flat)


def with_positions(spec: ModelSpec, paths: Any) -> ModelSpec:
    """Return the spec with trained positions where `paths`, of parameters, has a table of them."""

    def vit(side: str) -> Any:
        old = getattr(spec, side)
        return old and dataclasses.replace(old, trained_positions=f"{side}/pos_embed" in paths)

    return dataclasses.replace(spec, encoder=vit("encoder"), decoder=vit("decoder"))


def _take(state: dict[str, np.ndarray], entry: Entry) -> np.ndarray:
    parts = [state.pop(name) for name in entry.names]
    rows, *rest = entry.shape
    expected = (rows // len(parts), *rest)
    for name, x in zip(entry.names, parts, strict=True):
        if x.shape != expected:
            raise UserError(
                f"{name} has shape {tuple(x.shape)} where {expected} is expected from the file's"
                " other tensors: it is damaged, or of another model"
            )
        if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
            raise UserError(f"{name} holds {x.dtype}, not floating-point numbers")
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def to_theirs(params: Mapping, spec: ModelSpec, family: Family) -> dict[str, np.ndarray]:
    """Return our parameters as their state dict: the exact inverse of `to_ours`.

    The tensors are float32 views of the parameters, in the order of TABLE, with position tables
    written out.

    Raises:
      UserError: a decoder without a mask token, blocks with options, several class tokens or
        channel groups, which those families do not know.
    """
    block = spec.encoder.block and f"blocks with {spec.encoder.block}"
    groups = spec.channel_groups and f"the channel groups {spec.channel_groups}"
    if block or groups or spec.cls_tokens > 1:
        raise UserError(
            f"these weights have {block or groups or f'{spec.cls_tokens} class tokens'}, which"
            " other formats cannot hold: convert with --to=ours"
        )
    if spec.tokens_in_encoder and spec.decoder:
        raise UserError(
            "these weights are of a run with masking.tokens_in_encoder: their decoder has no mask"
            " token, which other formats need. Convert with --part=encoder, or --to=ours"
        )
    flat = flatten_dict(params, sep="/")
    state = {}
    for entry in entries(spec, family):
        if entry.path in flat:
            x = np.asarray(flat[entry.path], np.float32)
            x = x if entry.layer is None else x[entry.layer]
        else:  # a fixed position table
            x = sincos_2d(entry.shape[-1], spec.grid)[None]
        x = entry.rearranged(x, entry.ours, entry.theirs)
        for name, part in zip(entry.names, np.split(x, len(entry.names)), strict=True):
            state[name] = part
    return state


def is_sincos(table_1ND: np.ndarray, grid: tuple[int, int]) -> bool:
    """Return whether a position table is the fixed one, but for rounding to its own type."""
    width = table_1ND.shape[-1]
    if width % 4 or table_1ND.shape[1] != 1 + math.prod(grid):
        return False
    rounding = max(1e-5, float(jnp.finfo(table_1ND.dtype).eps))
    return bool(np.abs(table_1ND[0].astype(np.float32) - sincos_2d(width, grid)).max() < rounding)
