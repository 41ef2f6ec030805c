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

if [ -z "${GPU_PYTHON:-}" ]; then
  VENV=${VENV:-$(dirname -- "${BASH_SOURCE[0]}")/../.venv-gpu}
  # shellcheck source=launch/setup.sh
  source "$(dirname -- "${BASH_SOURCE[0]}")/../launch/setup.sh"
  pip=(-m pip install --quiet --disable-pip-version-check)
  version=$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("jax"))')
  ! command -v nvidia-smi > /dev/null || "$python" "${pip[@]}" "jax[cuda13]==$version" >&2
  if [ -z "${TORCH_PYTHON+set}" ] && command -v nvidia-smi > /dev/null; then
    [ -e "$venv-torch" ] || "$base" -m venv "$venv-torch"
    TORCH_PYTHON=$venv-torch/bin/python
    "$TORCH_PYTHON" "${pip[@]}" torch transformers pillow >&2 || TORCH_PYTHON=''
  fi
  GPU_PYTHON=$python
fi
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export TORCH_PYTHON=${TORCH_PYTHON:-} PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$GPU_PYTHON" "$root/benchmarks/gpu.py" "$@"
