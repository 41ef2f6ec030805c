#!/usr/bin/env bash
# One host of a run: `mae-jax train`, with an exit status that tells a launcher what to do next.
#
#   bash launch/host.sh --config=FILE --workdir=DIR --distributed        (TPU pods, GKE, Slurm)
#   bash launch/host.sh --config=FILE --workdir=DIR --coordinator=HOST:PORT --num_hosts=N --host=I
#
# 0 finished. 75 start all hosts again, they go on from the last checkpoint: the run was asked to stop
# and has saved, or a host was lost or never came. Anything else: an error that starting again does not cure.
#
# VENV: the environment (default: .venv in the checkout; without it, python3). XLA_PRESET: a name of
# launch/xla_flags.sh. NAME: what this host is called in messages. STATUS_DIR: a folder for a file with the
# exit status, named by Slurm's number of the process.
set -uo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${VENV:-$root/.venv}/bin/python
[ -x "$python" ] || python=python3
name=${NAME:-$(hostname)${SLURM_PROCID:+, process $SLURM_PROCID}}
errors=$(mktemp)
trap 'status=$?
  [ -z "${STATUS_DIR:-}" ] || echo "$status" > "$STATUS_DIR/$SLURM_PROCID"
  rm -f "$errors"' EXIT
if [ -n "${XLA_PRESET:-}" ]; then
  # shellcheck source=launch/xla_flags.sh
  source "$root/launch/xla_flags.sh"
  xla_preset "$XLA_PRESET" || exit 2
fi

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -m mae_jax train "$@" 2> >(trap '' TERM HUP INT && exec tee "$errors" >&2) &
process=$!
trap 'kill -TERM "$process"' TERM INT
while true; do
  wait "$process"
  status=$?
  kill -0 "$process" 2> /dev/null || break # interrupted by a signal, which was passed on
done

say() { echo "$name: $*" >&2; }
again="Start all hosts again: they go on from the last checkpoint."
if [ "$status" -ge 128 ]; then
  sleep 1 # until the last of its words are in the file
fi
case $status in
  134) # SIGABRT, by which XLA ends a process of which others are gone
    lost=$(grep -A1 -m1 'stopped sending heartbeats' "$errors" | tail -1 | tr -dc '0-9 ')
    if [ -n "$lost" ]; then
      say "host $lost was lost (no heartbeat). See its log for why. $again"
      status=75
    elif grep -q 'JAX distributed service detected fatal errors' "$errors"; then
      say "host 0, the coordinator, is gone: lost itself, or its log names the host that was. $again"
      status=75
    else
      say "aborted (SIGABRT) by itself; what it printed above says why."
    fi
    ;;
  137)
    say "killed (SIGKILL); by the kernel if its memory ran out, which 'dmesg' tells. $again"
    status=75
    ;;
  143 | 130 | 129)
    say "ended by a signal before it could save. $again"
    status=75
    ;;
esac
exit "$status"
