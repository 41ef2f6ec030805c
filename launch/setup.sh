# shellcheck shell=bash
# The virtual environment with the locked packages; sourced by the other scripts of this folder.
#
# PYTHON  the Python to build it from, 3.11 or newer (default: python3)
# VENV    where it goes (default: .venv in the checkout; .venv-X.Y when PYTHON is given)
#
# Afterwards $root is the checkout and $python the environment's Python. Nothing is done when the
# environment is complete and the lock unchanged; a half-made or outdated one is made again.

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
base=${PYTHON:-python3}

command -v "$base" > /dev/null || fail "No $base found: install Python 3.11 or newer, or set PYTHON=/path/to/python."
version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$base does not run; set PYTHON=/path/to/python (3.11 or newer)."
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$base is Python $version, but 3.11 or newer is needed: set PYTHON=/path/to/a/newer/python."
"$base" -c 'import venv, ensurepip' 2> /dev/null ||
  fail "$base comes without venv or pip: install them (on Debian and Ubuntu: apt install python$version-venv)."

venv=${VENV:-$root/.venv${PYTHON:+-$version}}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python
stamp=$venv/.mae_jax
# What the environment is made from; the stamp holds it once everything is installed.
wanted=$("$base" - "$root" << 'END'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
lock = (root / "launch/requirements.lock").read_bytes()
print(hashlib.sha256(lock + sys.version.encode() + bytes(root)).hexdigest())
END
)

if ! "$python" -c '' 2> /dev/null || [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]; then
  if [ ! -e "$stamp" ] && [ -e "$venv" ] && ! rmdir "$venv" 2> /dev/null; then
    fail "$venv exists and was not made by launch/setup.sh: remove it, or set VENV=ANOTHER_FOLDER."
  fi
  echo "Installing the packages of launch/requirements.lock into $venv (Python $version): some minutes"
  mkdir -p "$venv"
  echo unfinished > "$stamp"
  find "$venv" -mindepth 1 ! -name "${stamp##*/}" -delete
  echo '*' > "$venv/.gitignore"
  "$base" -m venv "$venv"
  "$python" -m pip install --quiet --disable-pip-version-check --requirement "$root/launch/requirements.lock"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --editable "$root"
  echo "$wanted" > "$stamp"
fi
