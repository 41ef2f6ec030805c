# shellcheck shell=bash
# Make the virtual environment with the locked packages; the other scripts of this folder source this.
#
# PYTHON  the Python to make it from, 3.11 or newer (default: python3)
# VENV    its folder (default: .venv in the checkout; .venv-X.Y if PYTHON is set)
#
# Afterwards $root is the checkout and $python the environment's Python. A complete environment is kept
# while the lock is unchanged; an incomplete or outdated one is made again.

case ${1:-} in -h | --help) # of whichever script sources this: its first lines
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
  ;;
esac

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
base=${PYTHON:-python3}

version=$("$base" -c '
import sys
print("%d.%d" % sys.version_info[:2])
sys.exit(sys.version_info < (3, 11))') ||
  fail "Python 3.11 or newer is needed, but $base is ${version:-not there, or does not run}." \
    "Set PYTHON=/path/to/python."
"$base" -c 'import venv, ensurepip' 2> /dev/null ||
  fail "$base comes without venv or pip; on Debian and Ubuntu: apt install python$version-venv."

venv=${VENV:-$root/.venv${PYTHON:+-$version}}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python
stamp=$venv/.mae_jax
# A digest of what the environment is made from. The stamp holds it once everything is installed.
digest=$("$base" - "$root" << 'END'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
lock = (root / "launch/requirements.lock").read_bytes()
print(hashlib.sha256(lock + sys.version.encode() + bytes(root)).hexdigest())
END
)

if ! "$python" -c '' 2> /dev/null || [ "$(cat "$stamp" 2> /dev/null)" != "$digest" ]; then
  if [ ! -e "$stamp" ] && [ -e "$venv" ] && ! rmdir "$venv" 2> /dev/null; then
    fail "$venv was not made by launch/setup.sh: remove it, or set VENV=ANOTHER_FOLDER."
  fi
  echo "Installing the locked packages into $venv (Python $version, 1.3 GB): some minutes"
  mkdir -p "$venv"
  echo unfinished > "$stamp"
  find "$venv" -mindepth 1 ! -name "${stamp##*/}" -delete
  echo '*' > "$venv/.gitignore"
  "$base" -m venv "$venv"
  pip=("$python" -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" --no-compile --requirement "$root/launch/requirements.lock"
  # pip would compile on one core. Files that are not for this version of Python fail, and are left.
  "$python" -m compileall -qq --workers 0 "$venv/lib" > /dev/null || true
  "${pip[@]}" --no-deps --editable "$root"
  echo "$digest" > "$stamp"
fi
