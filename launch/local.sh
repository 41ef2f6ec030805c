#!/usr/bin/env bash
# Run several hosts as processes of one machine: for tests, and to see what a pod does.
#
#   bash launch/local.sh N --config=FILE --workdir=DIR [FLAG ...]
#
# Exit status, once all hosts have ended: 0, 75 (start again; see launch/host.sh), 130 (Ctrl-C), or that
# of the first host with an error. PORT: the coordinator's (default: 8476).
set -uo pipefail

case ${1:-} in
  '' | *[!0-9]* | 0*)
    echo "launch/local.sh: the first argument is the number of hosts, not '${1:-}'" >&2
    exit 2
    ;;
esac
count=$1
shift
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ended=$(mktemp) # a line for each host in the order in which they end: its number and status
trap 'rm -f "$ended"' EXIT

export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages: fewer page faults on CPUs
hosts=()
for ((i = 0; i < count; i++)); do
  (
    NAME="host $i" bash "$here/host.sh" "$@" "--coordinator=localhost:${PORT:-8476}" \
      "--num_hosts=$count" "--host=$i" &
    host=$!
    trap 'kill -TERM "$host"' TERM
    while true; do
      wait "$host"
      status=$?
      kill -0 "$host" 2> /dev/null || break
    done
    echo "$i $status" >> "$ended"
  ) &
  hosts+=($!)
done
trap 'kill -TERM "${hosts[@]}" 2> /dev/null' TERM INT
for host in "${hosts[@]}"; do
  while kill -0 "$host" 2> /dev/null; do wait "$host"; done
done

read -r first status < "$ended"
if error=$(grep -v -m1 -E ' (0|75|130)$' "$ended"); then
  echo "launch/local.sh: host ${error% *} failed with status ${error#* }; its message is above." >&2
  exit "${error#* }"
fi
if status=$(grep -o -m1 -E ' (75|130)$' "$ended"); then
  echo "launch/local.sh: stopped (host $first ended first). Run the same command again to continue" \
    "from the last checkpoint." >&2
  exit "${status# }"
fi
