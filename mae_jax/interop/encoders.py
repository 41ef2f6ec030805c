"""Encoders with more than MAE's have: DINOv2, DINOv3, Pixio, and timm's with registers.

`canonical` gives their tensors the names of `names.TABLE`, `block_options` infers the options of
their blocks from names and shapes, and `complete` adds the tensors that DINOv3 leaves out. No
tensor says two things: that positions are rotary, which a config.json of DINOv3 says, or
LayerScale and registers without a position table; and the epsilon of norms (1e-5 in DINOv3, 1e-6 in
the others).
"""

import math
import re

import numpy as np

from mae_jax.errors import UserError
from mae_jax.interop.names import BLOCK, stem
from mae_jax.interop.read import DINO_LIKE, File
from mae_jax.models.block_options import BlockOptions
from mae_jax.models.spec import ModelSpec

# Other spellings of official names: of timm's Eva, its class of DINOv3, and of DINOv2's authors.
ALIASES = ((r"\.gamma_([12])$", r".ls\1.gamma"), (r"^register_tokens$", "reg_token"))
# Tensors of parts that our blocks do not have: a file with one of them is refused.
REFUSED = (
    (r"\.mlp\.(weights_in|gate_proj|w12|w1|fc1_g)\.", "a gated MLP (SwiGLU)"),
    (r"\.[qk]_norm\.bias$", "a LayerNorm of queries and keys, where RMSNorm is known"),
    (r"^(storage_tokens|rope_embed\.|rope\.)", "of rotary positions in a form of their own"),
    (r"^norm_pre\.", "a norm before the blocks"),
    (r"relative_position_bias_table$", "of relative positions"),
)
ROPE = 100.0  # DINOv3's base, where its config does not say it


def canonical(file: File) -> tuple[File, list[str]]:
    """Return a file with the names of `names.TABLE`, and notes on what was left out or assumed.

    Raises:
      UserError: the file has a tensor that our blocks have no use for, or lacks positions.
    """
    _refuse_by_name(file)
    eva = [name for name in file.state if re.search(r"\.(gamma_1|attn\.q_bias)$", name)]
    file = _renamed(file)
    rotary, table = has_rotary_positions(file), stem("encoder/pos_embed", file.family)
    if eva and not rotary:
        raise UserError(
            f"{file.name} has {eva[0]}, of timm's models beside its plain ViT, and not DINOv3's"
            " registers without a position table: what positions it has is not known, and it is"
            " not read"
        )
    several = _token(file).shape[1:2] > (1,)
    if (several or _scaled(file)) and table not in file.state and not rotary:
        raise UserError(
            f"{file.name} has no {table}, and nothing says that it is DINOv3, which has none: this"
            " would be a partial load"
        )
    _refuse_gated(file)
    notes, options = _leave_out(file), block_options(file)
    if options and options.norm == "rms":
        notes.append("norms have no bias: taken as RMSNorm with epsilon 1e-6")
    if rotary and "rope_theta" not in file.config:
        notes.append("positions: no table, but registers and LayerScale, so taken as DINOv3's")
    return file._replace(state=_with_rows_of_prefix(file)), notes


def has_rotary_positions(file: File) -> bool:
    """Return whether a file is DINOv3: no table, LayerScale, and its config or registers say so."""
    if stem("encoder/pos_embed", file.family) in file.state or not _scaled(file):
        return False
    kind = file.config.get("model_type")
    if kind in DINO_LIKE:
        return kind == "dinov3_vit"
    return stem("encoder/register_token", file.family) in file.state


def block_options(file: File) -> BlockOptions | None:
    """Return the options of the blocks of a canonical file, or None if they are MAE's."""
    blocks, rope = stem("encoder/stack/blocks", file.family), has_rotary_positions(file)
    registers = file.state.get(stem("encoder/register_token", file.family))
    normed = f"{blocks}.0.{stem('attn/q_norm', file.family, BLOCK)}.weight" in file.state
    norm = f"{blocks}.0.{stem('norm1', file.family, BLOCK)}"
    rms = f"{norm}.weight" in file.state and f"{norm}.bias" not in file.state
    epsilon = 1e-5 if rope else 1e-6
    if file.config.get("model_type") in DINO_LIKE:
        epsilon = _positive(file, "layer_norm_eps", epsilon)
    return BlockOptions(
        registers=0 if registers is None else registers.shape[1],
        qk_norm=normed,
        layer_scale=1.0 if _scaled(file) else 0.0,  # the initial value, which no weights depend on
        norm="rms" if rms else "layer",
        rope=_positive(file, "rope_theta", ROPE) if rope else 0.0,
        eps=epsilon,
    ).or_none()


def complete(file: File, spec: ModelSpec) -> None:
    """Put zeros into a file where DINOv3 has no biases of keys, and no position table."""
    block, family = spec.encoder.block, file.family
    if block is None or not block.rope:
        return
    width, blocks = spec.encoder.width, stem("encoder/stack/blocks", family)
    shape = (1, spec.cls_tokens + spec.num_patches, width)
    file.state[stem("encoder/pos_embed", family)] = np.zeros(shape, np.float32)
    missing, rows = "attention.attention.key", width
    if family == "official":
        missing, rows = "attn.qkv", 3 * width
    biases = [f"{blocks}.{layer}.{missing}.bias" for layer in range(spec.encoder.depth)]
    if not any(name in file.state for name in biases):
        file.state.update({name: np.zeros(rows, np.float32) for name in biases})


def _refuse_by_name(file: File) -> None:
    for name in file.state:
        for pattern, words in REFUSED:
            if re.search(pattern, name):
                raise UserError(
                    f"{file.name} has {name}, {words}: such encoders are not read. Those that are:"
                    " plain ViTs, also with registers, LayerScale, several class tokens or"
                    " DINOv3's rotary positions"
                )


def _renamed(file: File) -> File:
    """Return a file with the names of TABLE and a state of its own; without registers of size 0."""
    state = dict(file.state)
    if file.family == "official":
        for pattern, replacement in ALIASES:
            state = {re.sub(pattern, replacement, name): x for name, x in state.items()}
        _join_biases(state)
    registers = stem("encoder/register_token", file.family)
    if registers in state and not state[registers].size:
        del state[registers]
    return file._replace(state=state)


def _leave_out(file: File) -> list[str]:
    """Remove a mask token that no feature sees, and a head on two features; return notes."""
    state = file.state
    if f"{stem('decoder/embed', file.family)}.weight" not in state:
        state.pop("mask_token" if file.family == "official" else "vit.embeddings.mask_token", None)
    head = stem("head", file.family)
    weight = state.get(f"{head}.weight")
    if weight is None or weight.shape[1:] != (2 * _token(file).shape[-1],):
        return []
    for part in ("weight", "bias"):
        state.pop(f"{head}.{part}", None)
    return ["left out: the head, which reads the cls token and the patches' mean together"]


def _with_rows_of_prefix(file: File) -> dict[str, np.ndarray]:
    """Return the state with a row of positions for each class token, and none for registers.

    Only files with registers are changed: with timm's `no_embed_class` they have rows for patches
    alone, and without it rows for registers, too. In other files, a square number of rows may be
    of more than patches.
    """
    key, tokens = stem("encoder/pos_embed", file.family), stem("encoder/cls_token", file.family)
    registers = stem("encoder/register_token", file.family)
    table, token = file.state.get(key), file.state[tokens]
    if table is None or registers not in file.state or {table.ndim, token.ndim} != {3}:
        return file.state
    rows, cls = table.shape[1], token.shape[1]
    beside = file.state[registers].shape[1]
    if _square(rows - cls):
        return file.state
    if _square(rows):
        zeros = np.zeros((1, cls, table.shape[2]), np.float32)
        return file.state | {key: np.concatenate([zeros, table.astype(np.float32)], axis=1)}
    if not _square(rows - cls - beside):
        return file.state
    of_cls, of_registers, of_patches = np.split(table.astype(np.float32), [cls, cls + beside], 1)
    return file.state | {
        key: np.concatenate([of_cls, of_patches], axis=1),
        registers: file.state[registers].astype(np.float32) + of_registers,
    }


def _join_biases(state: dict[str, np.ndarray]) -> None:
    """Join timm's biases of q and v into one of q, k and v; its files have none of k."""
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"), None)
        if v is not None:
            state[name.replace("q_bias", "qkv.bias")] = np.concatenate([q, np.zeros_like(q), v])


def _refuse_gated(file: File) -> None:
    """Raise if the second layer of an MLP reads half of what the first gives."""
    first = f"{stem('encoder/stack/blocks', file.family)}.0."
    fc1, fc2 = (f"{first}{stem(x, file.family, BLOCK)}.weight" for x in ("mlp/fc1", "mlp/fc2"))
    shapes = [file.state[name].shape for name in (fc1, fc2) if name in file.state]
    if [len(shape) for shape in shapes] == [2, 2] and shapes[0][0] == 2 * shapes[1][1]:
        raise UserError(
            f"{file.name} has {fc1} of shape {shapes[0]} before {shapes[1]}, a gated MLP (SwiGLU):"
            " such encoders are not read"
        )


def _scaled(file: File) -> bool:
    blocks = stem("encoder/stack/blocks", file.family)
    return f"{blocks}.0.{stem('scale1/scale', file.family, BLOCK)}" in file.state


def _token(file: File) -> np.ndarray:
    return file.state[stem("encoder/cls_token", file.family)]


def _square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _positive(file: File, key: str, default: float) -> float:
    """Return a number that the file's config says, or the default where it says nothing."""
    value = file.config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise UserError(f"the file's {key} is {value!r}, which is not a possible {key}")
    return float(value)
