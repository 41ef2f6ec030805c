#!/usr/bin/env bash
# Run `mae-jax train` on one host; the exit status tells a launcher what to do next.
#
#   bash launch/host.sh --config=FILE --workdir=DIR --distributed        (TPU pods, GKE, Slurm)
#   bash launch/host.sh --config=FILE --workdir=DIR --coordinator=HOST:PORT --num_hosts=N --host=I
#
# Exit status:
#   0      the run is finished
#   75     start all hosts again, to continue from the last checkpoint: the run was asked to stop and has
#          saved, or a host was lost or never came
#   130    Ctrl-C: the run has saved, unless it was pressed twice
#   other  an error that a restart does not cure
#
# VENV        the environment (default: .venv in the checkout; python3 if there is none)
# XLA_PRESET  a name of launch/xla_flags.sh
# NAME        the name of this host in messages
# STATUS_DIR  a folder for a file with the exit status; Slurm's number of the process is its name
set -uo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${VENV:-$root/.venv}/bin/python
if [ -n "${VENV:-}" ] && [ ! -x "$python" ]; then
  echo "VENV=$VENV: there is no $python; bash launch/setup.sh makes it" >&2
  exit 2
fi
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
  kill -0 "$process" 2> /dev/null || break # else a signal interrupted `wait`, and was passed on
done

log() { echo "$name: $*" >&2; }
again="Start all hosts again: they continue from the last checkpoint."
if [ "$status" -ge 128 ]; then
  sleep 1 # until its last messages are in the file
fi
case $status in
  134) # SIGABRT, with which XLA ends a process when other processes are gone
    lost=$(grep -A1 -m1 'stopped sending heartbeats' "$errors" | tail -1 | tr -dc '0-9 ')
    if [ -n "$lost" ]; then
      log "host $lost was lost (no heartbeat). See its log for why. $again"
      status=75
    elif grep -q 'JAX distributed service detected fatal errors' "$errors"; then
      log "host 0, the coordinator, is gone: it was lost, or its log names the host that was lost. $again"
      status=75
    else
      log "aborted itself (SIGABRT); its messages above say why."
    fi
    ;;
  137)
    log "killed (SIGKILL), by the kernel if its memory ran out: see 'dmesg'. $again"
    status=75
    ;;
  143 | 129)
    log "ended by a signal before it could save. $again"
    status=75
    ;;
esac
exit "$status"
