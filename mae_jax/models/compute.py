"""Settings for running a network: speed, memory and rounding. No parameter depends on them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mae_jax.errors import UserError, nearest

ATTENTION = ("auto", "xla", "cudnn")
DTYPES = ("float32", "bfloat16", "float16")


def why_no_cudnn(device: Any, dtype: str, head_widths: Sequence[int]) -> str:
    """Return why cuDNN's fused attention cannot train on a device; '' = it can.

    Args:
      device: a JAX device, or the description of one.
      dtype: of the matrix products.
    """
    generation = getattr(device, "compute_capability", "").partition(".")[0]
    if not generation.isdecimal():  # AMD's are named gfx942 and the like
        return f"it is for NVIDIA GPUs, and this is {device.device_kind}"
    if int(generation) < 8:
        return f"it is for NVIDIA GPUs from A100 on, and this is {device.device_kind}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, and config.model.dtype is {dtype}"
    if wrong := [width for width in head_widths if width % 8 or width > 128]:
        return f"it takes heads of 8, 16, ..., 128 numbers, and width / heads is {wrong[0]} here"
    return ""


class ComputeConfig(NamedTuple):
    """Settings for running a network: speed, memory and rounding.

    Args:
      dtype: of matrix products; parameters, LayerNorm and softmax stay float32.
      residual_dtype: of the residual stream.
      scan_unroll: blocks per iteration of the loop over blocks; `depth` or more: no loop.
      remat: compute each block again in the backward pass instead of keeping its inside.
      attention: "xla" takes our own `attention.attend`, "cudnn" NVIDIA's fused kernel.
      constrain: applied to the residual stream around every block.
      split_heads: q, k and v are three products: where devices share the heads (mesh axis
        `tensor`), and on GPUs, whose compiler found no tiles for the gradient of one product.
      float32_sums: gradients of matrices are summed over devices in float32, not in `dtype`.
      plain_biases: gradients of biases are plain sums, for GPUs, not products with ones.
    """

    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    scan_unroll: int = 1
    remat: bool = False
    attention: Literal["xla", "cudnn"] = "xla"
    constrain: Callable[[Array], Array] = lambda x: x
    split_heads: bool = False
    float32_sums: bool = False
    plain_biases: bool = False

    @property
    def one_pass_norms(self) -> bool:
        """True if products are in 16 bits, which round more than a variance of one pass errs."""
        return self.dtype != jnp.float32

    @classmethod
    def from_config(
        cls,
        model: Mapping[str, Any],
        constrain: Callable[[Array], Array] = lambda x: x,
        device: Any = None,
        split_heads: bool = False,
    ) -> "ComputeConfig":
        """Return how config.model says that a network is run, with what is automatic decided.

        `attention="auto"` is cuDNN's where it can run, else our own. `scan_unroll=0` is one block
        after the other without a loop on TPUs and GPUs, and a loop on CPUs.

        Args:
          device: one of those that the network is for, or its description; None = JAX's first.

        Raises:
          UserError: an unknown type or attention, scan_unroll < 0, or cudnn where it cannot run.
        """
        device = jax.devices()[0] if device is None else device
        choices = {"dtype": DTYPES, "residual_dtype": DTYPES, "attention": ATTENTION}
        for name, known in choices.items():
            if model[name] not in known:
                raise UserError(f"config.model.{name}={model[name]!r}{nearest(model[name], known)}")
        sides = [side for side in ("", "decoder_") if f"{side}depth" in model]
        unroll, attention = model["scan_unroll"], model["attention"]
        if unroll < 0:
            raise UserError(f"config.model.scan_unroll={unroll} must be at least 0, the automatic")
        if unroll == 0:
            depth = max(model[f"{side}depth"] for side in sides)
            unroll = 1 if device.platform == "cpu" else depth
        if attention != "xla":
            head_widths = [model[f"{side}width"] // model[f"{side}heads"] for side in sides]
            refusal = why_no_cudnn(device, model["dtype"], head_widths)
            if refusal and attention == "cudnn":
                raise UserError(
                    f"config.model.attention=cudnn: {refusal}; choose auto, which takes it where it"
                    " can run, or xla"
                )
            attention = "xla" if refusal else "cudnn"
        return cls(
            jnp.dtype(model["dtype"]),
            jnp.dtype(model["residual_dtype"]),
            unroll,
            model["remat"],
            attention,
            constrain,
            split_heads or device.platform == "gpu",
            model.get("float32_sums", False),
            device.platform == "gpu",
        )
