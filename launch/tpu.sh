#!/usr/bin/env bash
# Make and set up a Cloud TPU slice, run on all its workers, and restart the run until it is finished.
#
#   export TPU=NAME TYPE=v5litepod-16 ZONE=us-west4-a [PROJECT=ID]
#   bash launch/tpu.sh create [--dry-run]    ask for the slice, as a queued resource
#   bash launch/tpu.sh setup                 copy this checkout to all workers, and install its packages
#   bash launch/tpu.sh run --config=FILE --workdir=gs://BUCKET/RUN [FLAG ...]
#                                            run until finished, through preemptions; the same command
#                                            again watches the run that was started before
#   bash launch/tpu.sh status | logs [WORKER] | stop | delete
#
# TIER          spot (default) or on-demand
# SLICES        number of slices of TYPE (default 1)
# RUNTIME       the image of the machines (default: the one for TYPE)
# XLA_PRESET    see launch/xla_flags.sh
# MAX_RESTARTS  of one `run` (default 50)
# POLL          seconds between two requests for the state (default 30)
#
# With --dry-run, every subcommand prints the calls that would change something, and makes none of them.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
poll=${POLL:-30}
slices=${SLICES:-1}
tries=1
dry=no
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

log() { echo "launch/tpu.sh: $*" >&2; }
fail() {
  log "$@"
  exit 1
}

# ask ARGUMENT ...: call gcloud, without questions on the terminal.
ask() { gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet < /dev/null; }

# change ARGUMENT ...: the same for calls that change something; --dry-run prints them.
change() {
  if [ "$dry" = yes ]; then
    printf '%q ' gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
    echo
  else
    ask "$@"
  fi
}

# Print the state of the queued resource, such as ACTIVE or WAITING_FOR_RESOURCES; NONE if there is none.
# If gcloud fails, try up to $tries times.
state() {
  local try
  if [ "$dry" = yes ]; then
    echo NONE
    return
  fi
  for ((try = 1; ; try++)); do
    if ask queued-resources describe "$TPU" '--format=value(state.state)' 2> "$work/error"; then
      return
    elif grep -q NOT_FOUND "$work/error"; then
      echo NONE
      return
    fi
    cat "$work/error" >&2
    [ "$try" -lt "$tries" ] || fail "gcloud could not tell the state of $TPU; its message is above."
    sleep "$poll"
  done
}

# Check TYPE and TIER, and set tier and runtime from them.
read_settings() {
  [ -n "${TYPE:-}" ] || fail "set TYPE to an accelerator type, such as TYPE=v5litepod-16."
  case ${TIER:-spot} in
    spot) tier=(--spot) ;;
    on-demand) tier=() ;;
    *) fail "TIER=$TIER: write spot or on-demand." ;;
  esac
  case $TYPE in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "TYPE=$TYPE: write v6e-N, v5p-N, v5litepod-N, v4-N, v3-N or v2-N." ;;
  esac
}

create() {
  local now name=("--node-id=$TPU")
  read_settings
  while now=$(state) && [ "$now" = DELETING ]; do
    log "$TPU: $now"
    sleep "$poll"
  done
  [ -n "$now" ] || exit 1
  case $now in
    NONE) ;;
    FAILED | SUSPENDED | SUSPENDING)
      [ "$now" != FAILED ] || ask queued-resources describe "$TPU" '--format=yaml(state)' >&2 || true
      log "$TPU is $now: it is deleted, and a new one is asked for."
      delete
      ;;
    *)
      log "$TPU is there already: $now."
      return
      ;;
  esac
  [ "$slices" -eq 1 ] || name=("--node-count=$slices" "--node-prefix=$TPU")
  change queued-resources create "$TPU" "${name[@]}" "--accelerator-type=$TYPE" \
    "--runtime-version=${RUNTIME:-$runtime}" "${tier[@]}"
  [ "$dry" = yes ] || log "asked for $TYPE. It costs from the time when it is ACTIVE until 'delete'."
}

delete() {
  if [ "$dry" = no ] && [ "$(state)" = NONE ]; then
    log "there is no $TPU; nothing to delete."
    return
  fi
  change queued-resources delete "$TPU" --force
}

nodes() {
  if [ "$slices" -eq 1 ]; then echo "$TPU"; else seq -f "$TPU-%.0f" 0 $((slices - 1)); fi
}

# everywhere COMMAND, or everywhere --copy FILE: run a command on, or copy a file to, every worker of
# every slice at once, with three tries where ssh fails. The output of worker W of NODE goes to
# $work/output/NODE.W. If some workers cannot be reached, name them and fail.
everywhere() {
  local node workers worker failed=0 call
  rm -rf "$work/output"
  mkdir "$work/output"
  for node in $(nodes); do
    call=(ssh "$node" "--command=$1")
    [ "$1" != --copy ] || call=(scp "$2" "$node:${2##*/}")
    if [ "$dry" = yes ]; then
      change tpu-vm "${call[@]}" --worker=all
      continue
    fi
    workers=$(ask tpu-vm describe "$node" '--format=value(networkEndpoints.len())') || return 1
    for ((worker = 0; worker < workers; worker++)); do
      touch "$work/output/$node.$worker.failed"
      (
        for try in 1 2 3; do
          if ask tpu-vm "${call[@]}" "--worker=$worker" \
            > "$work/output/$node.$worker" 2> "$work/output/$node.$worker.errors"; then
            rm "$work/output/$node.$worker.failed" "$work/output/$node.$worker.errors"
            break
          fi
          [ "$try" -eq 3 ] || sleep "${RETRY:-5}"
        done
      ) &
    done
  done
  wait
  for worker in "$work"/output/*.failed; do
    [ -e "$worker" ] || continue
    failed=1
    worker=${worker%.failed}
    log "worker ${worker##*.} of $(basename "${worker%.*}") failed three times:" \
      "$(tail -1 "$worker.errors")"
  done
  return "$failed"
}

# Print the last line of each worker's output after the worker's name.
answers() {
  local file name
  for file in "$work"/output/*; do
    case $file in *.failed | *.errors) continue ;; esac
    [ -e "$file" ] || continue
    name=$(basename "$file")
    echo "${name%.*} worker ${name##*.}: $(tail -1 "$file")"
  done
}

setup() {
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$work/mae_jax.tar.gz"
  if ! everywhere --copy "$work/mae_jax.tar.gz" ||
    ! everywhere 'mkdir -p mae_jax && tar -xzf mae_jax.tar.gz -C mae_jax' ||
    ! everywhere 'cd mae_jax && bash launch/worker.sh setup'; then
    fail "not every worker is set up; run 'setup' again: what is done stays done."
  fi
  answers
}

# Count a restart of `run`, and fail after too many.
count_restart() {
  ((++restarts <= ${MAX_RESTARTS:-50})) ||
    fail "gave up after $((restarts - 1)) restarts; the messages above, or 'logs', say why."
}

# Make and set up the slice, and return when it is ACTIVE.
ready() {
  local now before=''
  now=$(state)
  tries=5 # gcloud has worked: from now on, the network may fail for a while
  [ "$now" != ACTIVE ] || return 0
  create
  while now=$(state) || exit; [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDED)
        count_restart
        create
        ;;
      DELETING | NONE) fail "$TPU was deleted: there is nothing to wait for." ;;
    esac
    [ "$now" = "$before" ] || log "$TPU: $now"
    before=$now
    sleep "$poll"
  done
  setup
}

# lost STATE: set outcome for a slice that is not ACTIVE. It is deleted only by a user.
lost() { case $1 in DELETING | NONE) outcome=deleted ;; *) outcome=again ;; esac; }

# Wait until all workers have ended or the slice is lost, and set outcome to finished, stopped, error,
# deleted or again.
watch_run() {
  local failures=0 all now
  while true; do
    if everywhere 'cd mae_jax && bash launch/worker.sh status'; then
      failures=0
      all=$(answers)
      if ! grep -q ': running' <<< "$all"; then
        outcome=again
        if grep -E ': (ended|stopped)' <<< "$all" | grep -v -E ' (0|75)$' >&2; then
          outcome=error
        elif grep -q ': stopped' <<< "$all"; then
          outcome=stopped
        elif ! grep -v -q ': ended 0$' <<< "$all"; then
          outcome=finished
        fi
        return
      fi
    else
      now=$(state)
      if [ "$now" != ACTIVE ]; then
        lost "$now"
        return
      fi
      ((++failures < 5)) ||
        fail "some workers cannot be reached, but $TPU is ACTIVE. The run continues unwatched: 'status'" \
          "asks again, and 'run' with the same flags watches it again."
    fi
    sleep "$poll"
  done
}

run() {
  case " $* " in
    *" --workdir=gs://"*) ;;
    *) fail "--workdir=gs://BUCKET/RUN is needed: a worker's disk is deleted with the slice." ;;
  esac
  if [ -n "${XLA_PRESET:-}" ]; then
    # shellcheck source=launch/xla_flags.sh
    source "$root/launch/xla_flags.sh"
    (xla_preset "$XLA_PRESET") || exit 2
  fi
  read_settings # also needed to ask for the slice again after a preemption
  local restarts=0 start now
  start="cd mae_jax && ${XLA_PRESET:+XLA_PRESET=$XLA_PRESET }$(printf '%q ' bash launch/worker.sh start "$@" --distributed)"
  if [ "$dry" = yes ]; then
    everywhere "$start"
    return
  fi
  while true; do
    ready
    if everywhere "$start"; then
      answers | grep ': running already' >&2 || true # with the flags that it was started with
      watch_run
    else
      now=$(state)
      if [ "$now" != ACTIVE ]; then
        lost "$now"
      elif [ "$restarts" -gt 0 ]; then # ACTIVE, but about to be preempted
        outcome=again
        sleep "$poll"
      else
        everywhere 'cd mae_jax && bash launch/worker.sh stop' || true
        fail "the run could not be started on every worker, so it was stopped on all. Was 'setup' done?"
      fi
    fi
    case $outcome in
      finished)
        log "finished. $TPU costs until 'delete'."
        return 0
        ;;
      stopped)
        log "stopped, and saved; 'run' with the same flags continues. $TPU costs until 'delete'."
        return 75
        ;;
      deleted) fail "$TPU was deleted; 'run' with the same flags makes a slice and continues." ;;
      error) fail "the run ended with the error above; see 'logs'. $TPU costs until 'delete'." ;;
    esac
    count_restart
    log "a worker was lost or preempted ($(state)); restart $restarts, from the last checkpoint."
  done
}

command=${1:-}
[ "$#" -eq 0 ] || shift
args=()
for arg in "$@"; do
  if [ "$arg" = --dry-run ]; then dry=yes; else args+=("$arg"); fi
done
set -- "${args[@]+"${args[@]}"}"
case $command in
  status | logs) dry=no ;; # they change nothing
  create | setup | run | stop | delete) ;;
  *) fail "write create, setup, run, status, logs, stop or delete, not '$command'." ;;
esac
[ -n "${TPU:-}" ] || fail "set TPU to the name of the slice, such as TPU=my-run."
[ -n "${ZONE:-}" ] || fail "set ZONE to a zone that has TYPE, such as ZONE=us-west4-a."
[[ ${MAX_RESTARTS:-50} =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS: write a number."
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$slices: write a number, from 1."
case $command in
  run) ;;
  logs) [ "$#" -le 1 ] || fail "logs takes the number of one worker, not also '$2'." ;;
  *) [ "$#" -eq 0 ] || fail "$command takes nothing but --dry-run, not '$1'." ;;
esac
command -v gcloud > /dev/null || [ "$dry" = yes ] ||
  fail "there is no gcloud: install the Google Cloud CLI, and log in with 'gcloud auth login'."

case $command in
  status)
    now=$(state)
    echo "$TPU: $now"
    [ "$now" != ACTIVE ] || {
      everywhere 'cd mae_jax && bash launch/worker.sh status' || true
      answers
    }
    ;;
  logs)
    ask tpu-vm ssh "$(nodes | head -1)" "--worker=${1:-0}" '--command=tail -n 200 -F mae_jax_run/log'
    ;;
  stop)
    everywhere 'cd mae_jax && bash launch/worker.sh stop'
    answers
    ;;
  *) "$command" "$@" ;;
esac
