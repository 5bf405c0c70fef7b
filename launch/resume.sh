#!/usr/bin/env bash
# Continue a run after a pre-emption: if the pod is gone, request a new one, set it up and start the same command. The run continues
# from its run directory, which must be on storage that outlives the pod. Arguments and variables are those of create, setup and run.
#
#   while launch/resume.sh --config … ; do sleep 60; done      # keeps a run on spot capacity going until you stop this loop
source "$(dirname "$0")/common.sh"
here=$(dirname "$0")
require TPU_TYPE TPU_RUNTIME
(($# > 0)) || { echo "resume.sh: give the same arguments as to launch/run.sh" >&2; exit 2; }

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
