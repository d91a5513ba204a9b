#!/usr/bin/env bash
# Run one step of a set-up: one line with its time; everything it prints goes to a log, which is shown if it fails.
set -uo pipefail
[ $# -ge 3 ] || { echo "usage: step.sh LOG LABEL COMMAND [ARGUMENT ...]" >&2; exit 2; }
log=$1 label=$2
shift 2
printf '%-46s' "$label" >&2
started=$SECONDS
echo "== $label: $*" >>"$log"
if "$@" >>"$log" 2>&1; then
  printf '%4d s\n' $((SECONDS - started)) >&2
else
  status=$?
  printf 'failed after %d s; %s ends with\n' $((SECONDS - started)) "$log" >&2
  tail -n 30 "$log" >&2
  exit "$status"
fi
