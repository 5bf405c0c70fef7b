#!/usr/bin/env bash
# Run a sweep on several slices. Each slice is a separate queued resource, TPU_NAME-0, TPU_NAME-1, …, on which a worker takes trials
# from the sweep's folder on the shared storage. Arguments are those of `appo-jax sweep`; variables are those of create and setup:
#
#   export TPU_TYPE=v6e-1 TPU_WORKERS=4
#   launch/sweep.sh --config configs/sweeps/slices.py
#   until launch/sweep.sh --config … ; [[ $? == [23] ]]; do sleep 60; done      # replaces slices that are taken away, until all end
#   launch/sweep.sh delete                                    # gives all slices back
#
#   TPU_WORKERS  number of slices, each of one host: a worker trains on the devices of its own machine
#
# Exit codes are those of resume.sh: 3 if the workers on all slices have ended, 2 if a variable is missing on any, else 1 if one failed.
source "$(dirname "$0")/common.sh"
here=$(dirname "$0")
(($# > 0)) || { echo "sweep.sh: give the arguments of 'appo-jax sweep', e.g. --config configs/sweeps/slices.py" >&2; exit 2; }
((slices == 1)) || { echo "sweep.sh: TPU_SLICES is $slices; a worker of a sweep has one slice; TPU_WORKERS is their number" >&2; exit 2; }
[[ $1 == delete ]] || require TPU_TYPE TPU_RUNTIME TPU_WORKERS
require TPU_WORKERS # with a smaller number, `delete` would leave slices that go on, and cost

workers=() failed=() ended=0 worst=1
for ((i = 0; i < TPU_WORKERS; i++)); do
  if [[ $1 == delete ]]; then
    TPU_NAME=$TPU_NAME-$i "$here/stop.sh" delete &
  else
    TPU_NAME=$TPU_NAME-$i TPU_COMMAND='sweep --worker' "$here/resume.sh" "$@" &
  fi
  workers+=($!)
done
for i in "${!workers[@]}"; do
  code=0
  wait "${workers[i]}" || code=$?
  case $code in
    0) ;;
    3) ended=$((ended + 1)) ;; # its worker has ended: all trials are done, or it failed
    *)
      failed+=("$TPU_NAME-$i")
      ((code != 2)) || worst=2 # a wrong argument or variable: trying again does not help
      ;;
  esac
done
if ((${#failed[@]})); then
  echo "sweep.sh: failed: ${failed[*]}; delete incomplete slices (TPU_NAME=… launch/stop.sh delete), then try again" >&2
  exit "$worst"
fi
((ended < ${#workers[@]})) || exit 3
