#!/usr/bin/env bash
# Do on one worker of a TPU pod what launch/tpu.sh asks for over ssh. The last line printed is the answer.
#
#   bash launch/worker.sh setup | start FLAG ... | status | stop
#
# A started run outlives the connection. Its output goes to ~/mae_jax_run/log.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
run=$HOME/mae_jax_run # files: log; pid and exit (status) of launch/host.sh; stopped, after `stop`

running() { [ -e "$run/pid" ] && kill -0 "$(cat "$run/pid")" 2> /dev/null; }

status() {
  if running; then
    echo running
  elif [ -e "$run/exit" ] && [ -e "$run/stopped" ]; then
    echo "stopped $(cat "$run/exit")"
  elif [ -e "$run/exit" ]; then
    echo "ended $(cat "$run/exit")"
  elif [ -e "$run/pid" ]; then
    echo "ended 75" # the machine was rebooted during the run
  else
    echo idle
  fi
}

case ${1:-} in
  setup)
    new_enough() { "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }
    for PYTHON in python3.12 python3.13 python3.11 python3; do
      if new_enough "$PYTHON"; then break; fi
    done
    if ! new_enough "$PYTHON"; then # the TPU images have Ubuntu 22.04, which has 3.10
      sudo add-apt-repository --yes ppa:deadsnakes/ppa > /dev/null
      sudo apt-get install --yes --quiet python3.12-venv > /dev/null
      PYTHON=python3.12
    fi
    VENV=$root/.venv
    # shellcheck source=launch/setup.sh
    source "$root/launch/setup.sh"
    version=$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("jax"))')
    "$python" -m pip install --quiet --disable-pip-version-check "jax[tpu]==$version" gcsfs # gs://
    echo ready
    ;;
  start)
    shift
    if running; then
      echo "running already"
      exit
    fi
    mkdir -p "$run"
    rm -f "$run/exit" "$run/stopped" "$run/pid"
    # shellcheck disable=SC2016 # expanded by the inner shell
    setsid nohup bash -c '
      echo $$ > "$1/pid"
      bash "$2/launch/host.sh" "${@:3}" &
      host=$!
      trap "kill -TERM $host" TERM
      while true; do
        wait $host && status=0 || status=$?
        kill -0 $host 2> /dev/null || break
      done
      echo $status > "$1/exit.part"
      mv "$1/exit.part" "$1/exit"
    ' mae_jax "$run" "$root" "$@" >> "$run/log" 2>&1 < /dev/null &
    for ((tenths = 0; tenths < 100; tenths++)); do # until `status` can see the process
      [ ! -e "$run/pid" ] || break
      sleep 0.1
    done
    echo started
    ;;
  status) status ;;
  stop) # the run saves first; if it does not end in five minutes, call `stop` again
    mkdir -p "$run"
    touch "$run/stopped"
    for ((seconds = 0; seconds < 300; seconds++)); do
      running || break
      [ "$seconds" -gt 0 ] || kill -TERM "$(cat "$run/pid")"
      sleep 1
    done
    status
    ;;
  *)
    echo "launch/worker.sh: setup, start, status or stop, not '${1:-}'" >&2
    exit 2
    ;;
esac
