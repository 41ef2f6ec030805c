#!/usr/bin/env bash
# One benchmark, with what it needs: bash benchmarks/run.sh step|input|masking|start|growth|learning [--OPTION=VALUE ...]
#
# Ours runs in the environment of launch/setup.sh, each peer in one of its own beside it, which is
# made on first use. A peer that cannot be installed is left out, and said so in the table. Results go
# to benchmarks/out/NAME.json, .md and .png.
#
# PYTHON and VENV: see launch/setup.sh.
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch/setup.sh"

# peer NAME PACKAGE ...: an environment with these packages; prints its Python, or nothing.
peer() {
  local folder=$venv-$1
  if [ ! -e "$folder/.complete" ]; then
    echo "Installing ${*:2} into $folder" >&2
    {
      "$base" -m venv --clear "$folder" &&
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}" &&
        touch "$folder/.complete"
    } >&2 || return 0
  fi
  echo "$folder/bin/python"
}

name=${1:-}
[ -f "$root/benchmarks/$name.py" ] || fail "Which benchmark? bash benchmarks/run.sh step|input|masking|start|growth|learning"
shift
torch='' tensorflow=''
case $name in
  step) torch=$(peer torch torch==2.13.0 transformers pillow) ;;
  learning)
    torch=$(peer icarus torch==2.13.0 numpy einops pillow)
    # Without its dependency torchvision, of which it uses nothing here.
    [ -z "$torch" ] || "$torch" -m pip install --quiet --no-deps timm==0.3.2 >&2
    ;;
  input)
    torch=$(peer torch torch==2.13.0 transformers pillow)
    tensorflow=$(peer tensorflow tensorflow)
    ;;
esac
export TORCH_PYTHON=$torch TENSORFLOW_PYTHON=$tensorflow PYTHONPATH=$root
exec "$python" "$root/benchmarks/$name.py" "$@"
