#!/usr/bin/env bash
# Go on after a pre-emption: if the pod is gone, ask for a new one, set it up and start the same command. The run directory,
# on storage that outlives the pod, holds what it goes on from. Arguments and variables are those of create, setup and run.
#
#   while launch/resume.sh --config … ; do sleep 60; done      # attends to a run on spot capacity until it is told to stop
source "$(dirname "$0")/common.sh"
here=$(dirname "$0")
require TPU_TYPE TPU_RUNTIME
(($# > 0)) || { echo "resume.sh: give the arguments that launch/run.sh was given" >&2; exit 2; }

state=$(pod_state || echo MISSING)
if [[ $state == ACTIVE ]]; then
  echo "$TPU_NAME: ACTIVE, nothing to do (the supervisors on the workers restart what crashes)"
  exit
fi
echo "$TPU_NAME: $state"
[[ $state == MISSING ]] || "$here/stop.sh" delete
"$here/create.sh"
"$here/setup.sh"
"$here/run.sh" "$@"
