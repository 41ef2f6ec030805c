#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: ours against Hugging Face's ViTMAE in one table, in ten minutes after
# the installation. Elsewhere the same in tiny, to see that it works.
#
#   bash benchmarks/gpu.sh [--tiny] [--images=folder:PATH] [--limit=600]
#
# Results go to benchmarks/out/gpu.json and gpu.md, a trace to benchmarks/out/gpu_run/profile.
#
# GPU_PYTHON    a Python that has JAX for the GPU and our other packages (default: an environment .venv-gpu
#               with the locked packages and jax[cuda13])
# TORCH_PYTHON  a Python that has torch and transformers, or '' for none (default: .venv-gpu-torch)
# PYTHON        see launch/setup.sh
set -euo pipefail

# shellcheck source=benchmarks/gpu_python.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/gpu_python.sh"
exec "$GPU_PYTHON" "$root/benchmarks/gpu.py" "$@"
