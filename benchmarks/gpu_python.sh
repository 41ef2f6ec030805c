# shellcheck shell=bash
# Choose GPU_PYTHON, a Python with JAX for the GPU, and TORCH_PYTHON; make their environments if need
# be. For `source`; see gpu.sh for what both mean.
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
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages: fewer page faults on CPUs
export TORCH_PYTHON=${TORCH_PYTHON:-} PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
