"""Every test sees eight simulated CPU devices and full float32 matmuls."""

import os
from pathlib import Path

import compiler

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one process of the tests compiled, the others need not.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {compiler.FLAG}"
)

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

# Files whose time goes into compiling. What is spared is the machine code's quality, not the passes
# over the program: what is counted in a program stays as it is. What compares bits with another
# process is compiled as that is, and tests/test_parity.py as users compile.
COMPILED_FAST = {
    *("test_block_options", "test_class_tokens", "test_classifier", "test_convert"),
    *("test_finetune", "test_fit"),
    *("test_init_from", "test_knn", "test_load", "test_models", "test_probe", "test_recipes"),
    *("test_reconstruct", "test_results", "test_robustness", "test_sharding", "test_train"),
    *("test_optimizers", "test_patches", "test_segment", "test_segment_pictures", "test_sweep"),
    *("test_visualize", "test_crossmae", "test_examples", "test_latent"),
    *("test_api", "test_axes", "test_bands", "test_compute", "test_fork", "test_limits"),
    *("test_logistic", "test_masks", "test_profiling", "test_evals_multihost"),
    *("test_segment_multihost", "test_checkpoint"),
    *("test_channel_groups", "test_encoders", "test_compare_encoders", "test_plan"),
}


@pytest.fixture(autouse=True, scope="module")
def compile_fast(request):
    quick = request.module.__name__.rpartition(".")[2] in COMPILED_FAST
    jax.config.update("jax_disable_most_optimizations", quick)
