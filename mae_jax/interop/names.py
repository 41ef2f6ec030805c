"""Names and layouts of the PyTorch families beside ours: one table, read in both directions.

Axes of the layouts, as einops has them: d width, e decoder width, h hidden width of an MLP, s
heads, f head width, n tokens of the whole image, r rows, c columns and ch channels of a patch, p
values of a patch, y classes. A linear layer of PyTorch is (out, in), ours (in, out); its fused qkv
is [q | k | v], each head-major. Source: REFERENCE section 8; transformers 5.23.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mae_jax.errors import UserError
from mae_jax.interop.pth import release
from mae_jax.models.posemb import sincos_2d

Family = Literal["official", "hf"]  # timm has the names of the official encoder


class Spec(NamedTuple):
    """What a network is: enough to build it, and to name its tensors."""

    grid: tuple[int, int]  # rows and columns of patches
    patch: tuple[int, int]
    channels: int
    width: int
    depth: int
    heads: int
    hidden: int  # width inside the MLPs of the encoder
    decoder_width: int = 0  # 0: no decoder
    decoder_depth: int = 0
    decoder_heads: int = 0
    decoder_hidden: int = 0
    classes: int = 0  # 0: no head
    pool: str = "cls"  # of a classifier: "avg" or "cls"
    positions: bool = False  # the encoder's position table is a parameter, not sine-cosine
    decoder_positions: bool = False
    tokens_in_encoder: bool = False  # the encoder has the mask token, see `mae.MAE`
    target: str = "norm_pixels"  # of the decoder
    mask_ratio: float = 0.75
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of the images' channels, at 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

    @property
    def values(self) -> int:
        return math.prod(self.patch) * self.channels


# Parts of a layer: ours, PyTorch's, our axes, PyTorch's axes.
def _linear(i: str, o: str) -> tuple:
    return ("/kernel", ".weight", f"{i} {o}", f"{o} {i}"), ("/bias", ".bias", o, o)


def _norm(d: str) -> tuple:
    return ("/scale", ".weight", d, d), ("/bias", ".bias", d, d)


def _tensor(axes: str) -> tuple:
    return (("", "", axes, axes),)


CONV = (("/kernel", ".weight", "(r c ch) d", "d ch r c"), ("/bias", ".bias", "d", "d"))
QKV = (
    ("/kernel", ".weight", "d three s f", "(three s f) d"),
    ("/bias", ".bias", "three s f", "(three s f)"),
)
PROJ = (("/kernel", ".weight", "s f d", "d (s f)"), ("/bias", ".bias", "d", "d"))

# Ours, official (and timm), Hugging Face, layout. Three names: rows [q | k | v] of the one.
BLOCK = (
    ("norm1", "norm1", "layernorm_before", _norm("d")),
    ("attn/qkv", "attn.qkv", "attention.attention.{query,key,value}", QKV),
    ("attn/proj", "attn.proj", "attention.output.dense", PROJ),
    ("norm2", "norm2", "layernorm_after", _norm("d")),
    ("mlp/fc1", "mlp.fc1", "intermediate.dense", _linear("d", "h")),
    ("mlp/fc2", "mlp.fc2", "output.dense", _linear("h", "d")),
)
TABLE: tuple[tuple[str, str, str, Any], ...] = (
    ("encoder/cls_token", "cls_token", "vit.embeddings.cls_token", _tensor("1 1 d")),
    ("encoder/pos_embed", "pos_embed", "vit.embeddings.position_embeddings", _tensor("1 n d")),
    ("encoder/patch_embed", "patch_embed.proj", "vit.embeddings.patch_embeddings.projection", CONV),
    ("encoder/stack/blocks", "blocks", "vit.encoder.layer", BLOCK),
    ("encoder/norm", "norm", "vit.layernorm", _norm("d")),
    ("decoder/embed", "decoder_embed", "decoder.decoder_embed", _linear("d", "e")),
    ("decoder/mask_token", "mask_token", "decoder.mask_token", _tensor("1 1 e")),
    ("decoder/pos_embed", "decoder_pos_embed", "decoder.decoder_pos_embed", _tensor("1 n e")),
    ("decoder/stack/blocks", "decoder_blocks", "decoder.decoder_layers", BLOCK),
    ("decoder/norm", "decoder_norm", "decoder.decoder_norm", _norm("e")),
    ("decoder/pred", "decoder_pred", "decoder.decoder_pred", _linear("e", "p")),
    ("fc_norm", "fc_norm", "fc_norm", _norm("d")),
    ("head", "head", "classifier", _linear("d", "y")),
)

# Other spellings of Hugging Face's names: what transformers 5 calls layers in memory, what it
# writes for decoder layers, and models without a head, which leave out the first "vit.".
HF_ALIASES = (
    (r"^(?=(embeddings|encoder|layers|layernorm|pooler)\.)", "vit."),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.([qkv])_proj\.", r".attention.attention.\1."),
    (r"\.attention\.attention\.q\.", ".attention.attention.query."),
    (r"\.attention\.attention\.k\.", ".attention.attention.key."),
    (r"\.attention\.attention\.v\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


class Entry(NamedTuple):
    """One tensor of ours, or one layer of one, and where it is in the other family."""

    path: str
    layer: int | None  # of a stacked tensor
    names: tuple[str, ...]  # theirs; several are concatenated along their first axis
    ours: str  # axes
    theirs: str
    sizes: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """PyTorch's, of all names together."""
        return _shape(self.theirs, self.sizes)


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    groups = re.findall(r"\([^)]*\)|\S+", axes)
    return tuple(math.prod(sizes[name] for name in group.strip("()").split()) for group in groups)


def _names(axis: str, axes: str) -> bool:
    return axis != "1" and bool(re.search(rf"\b{axis}\b", axes))


def canonical_hf(name: str) -> str:
    """Any spelling of a Hugging Face name, as TABLE has it."""
    for pattern, replacement in HF_ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def entries(spec: Spec, family: Family) -> Iterator[Entry]:
    """Every tensor that a network has in a family, position tables included."""
    rows, cols = spec.patch
    sizes = {
        "1": 1, "three": 3, "d": spec.width, "e": spec.decoder_width, "h": spec.hidden,
        "s": spec.heads, "f": spec.width // spec.heads, "n": 1 + math.prod(spec.grid),
        "r": rows, "c": cols, "ch": spec.channels, "p": spec.values, "y": spec.classes,
    }  # fmt: skip
    for ours, official, hf, layout in TABLE:
        theirs = hf if family == "hf" else official
        if not _has(spec, ours):
            continue
        if layout is not BLOCK:
            for part, suffix, axes, their_axes in layout:
                yield Entry(ours + part, None, (theirs + suffix,), axes, their_axes, sizes)
            continue
        inside, depth = sizes, spec.depth
        if ours.startswith("decoder"):
            width, heads, depth = spec.decoder_width, spec.decoder_heads, spec.decoder_depth
            inside = sizes | {"d": width, "s": heads, "f": width // heads}
            inside["h"] = spec.decoder_hidden
        for layer in range(depth):
            for name, official_name, hf_name, parts in BLOCK:
                stem = f"{theirs}.{layer}.{hf_name if family == 'hf' else official_name}"
                for part, suffix, axes, their_axes in parts:
                    names = tuple(x + suffix for x in _braces(stem))
                    yield Entry(f"{ours}/{name}{part}", layer, names, axes, their_axes, inside)


def _has(spec: Spec, path: str) -> bool:
    if path == "encoder/norm":
        return not spec.classes or spec.pool == "cls"
    if path == "fc_norm":
        return bool(spec.classes) and spec.pool == "avg"
    if path == "head":
        return bool(spec.classes)
    return bool(spec.decoder_width) if path.startswith("decoder/") else True


def _braces(stem: str) -> list[str]:
    """'a.{x,y}' -> ['a.x', 'a.y']."""
    found = re.search(r"\{(.*)\}", stem)
    if not found:
        return [stem]
    return [stem[: found.start()] + x + stem[found.end() :] for x in found[1].split(",")]


def to_ours(state: Mapping[str, np.ndarray], spec: Spec, family: Family) -> tuple[dict, Spec]:
    """Their state dict as our parameters, float32; and the spec with what its positions are.

    A position table of a pre-training model that equals the sine-cosine table is no parameter of
    ours; one that differs is kept as one.

    Raises:
      UserError: a tensor is missing, has another shape, is not of floats, or is not finite.
    """
    wanted = list(entries(spec, family))
    missing = [name for entry in wanted for name in entry.names if name not in state]
    missing = [name for name in missing if not name.endswith(("pos_embed", "position_embeddings"))]
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing, so that this would be a partial load:"
            f" {_some(missing)}"
        )
    flat: dict[str, np.ndarray] = {}
    fixed = {"encoder": True, "decoder": True}
    for entry in wanted:
        if entry.names[0] not in state:
            continue  # a fixed position table, which we compute
        x = tensor = _read(state, entry)
        side, _, last = entry.path.partition("/")
        if last == "pos_embed":
            fixed[side] = not (side == "encoder" and spec.classes) and is_sincos(x, spec.grid)
        sizes = {k: v for k, v in entry.sizes.items() if _names(k, entry.theirs)}
        x = rearrange(x, f"{entry.theirs} -> {entry.ours}", **sizes)
        if entry.layer is None:
            flat[entry.path] = np.array(x, np.float32, order="C")
        else:
            if entry.layer == 0:
                depth = spec.decoder_depth if entry.path.startswith("decoder") else spec.depth
                flat[entry.path] = np.empty((depth, *x.shape), np.float32)
            flat[entry.path][entry.layer] = x
        release(tensor)
    for path, x in flat.items():
        if not np.isfinite(x).all():
            raise UserError(f"{path} has values that are not finite: the file's weights are broken")
    for side, is_fixed in fixed.items():
        if is_fixed and f"{side}/pos_embed" in flat:
            del flat[f"{side}/pos_embed"]
    spec = spec._replace(positions=not fixed["encoder"], decoder_positions=not fixed["decoder"])
    return unflatten(flat), spec


def _read(state: Mapping[str, np.ndarray], entry: Entry) -> np.ndarray:
    parts = [state[name] for name in entry.names]
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


def to_theirs(params: Mapping, spec: Spec, family: Family) -> dict[str, np.ndarray]:
    """The exact inverse of `to_ours`: float32, in the order of the table; positions written out.

    The tensors are views of the parameters, so that no second copy of the network is made.

    Raises:
      UserError: a decoder without a mask token, which those families do not know.
    """
    if spec.tokens_in_encoder and spec.decoder_width:
        raise UserError(
            "these weights are of a run with masking.tokens_in_encoder: their decoder has no mask"
            " token, which other formats need. Convert with --part=encoder, or --to=ours"
        )
    flat = flatten(params)
    state = {}
    for entry in entries(spec, family):
        if entry.path in flat:
            x = np.asarray(flat[entry.path], np.float32)
            x = x if entry.layer is None else x[entry.layer]
        else:  # a fixed position table
            x = sincos_2d(entry.shape[-1], spec.grid)[None]
        sizes = {k: v for k, v in entry.sizes.items() if _names(k, entry.ours)}
        x = rearrange(x, f"{entry.ours} -> {entry.theirs}", **sizes)
        for name, part in zip(entry.names, np.split(x, len(entry.names)), strict=True):
            state[name] = part
    return state


def is_sincos(table_1ND: np.ndarray, grid: tuple[int, int]) -> bool:
    """Whether a position table is the fixed one, but for rounding to its own type."""
    width = table_1ND.shape[-1]
    if width % 4 or table_1ND.shape[1] != 1 + math.prod(grid):
        return False
    rounding = max(1e-5, float(jnp.finfo(table_1ND.dtype).eps))
    return bool(np.abs(table_1ND[0].astype(np.float32) - sincos_2d(width, grid)).max() < rounding)


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': x}} -> {'a/b': x}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """{'a/b': x} -> {'a': {'b': x}}."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
