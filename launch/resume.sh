#!/usr/bin/env bash
# Continue a run after a pre-emption: if the pod is gone, request a new one; if its workers were not given the command (since they
# were booted), set them up and start it. The run continues from its run directory, which must be on storage that outlives the pod.
# Arguments and variables are those of create, setup and run.
#
#   while launch/resume.sh --config … ; do sleep 60; done      # keeps a run on spot capacity going until you stop this loop
source "$(dirname "$0")/common.sh"
here=$(dirname "$0")
require TPU_TYPE TPU_RUNTIME
(($# > 0)) || { echo "resume.sh: give the same arguments as to launch/run.sh" >&2; exit 2; }

while true; do
  state=$(pod_state)
  echo "$TPU_NAME: $state"
  [[ $state == SUSPENDING || $state == DELETING ]] || break
  sleep "${TPU_POLL:-30}"
done
case $state in
  ACTIVE) ;;
  CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) wait_until_active ;; # a new request would lose its place
  MISSING) "$here/create.sh" ;;
  *)
    "$here/stop.sh" delete
    "$here/create.sh"
    ;;
esac
if ! told=$(on_all "[[ \$(cat $boot) == \$(cat \$HOME/$home.started 2>/dev/null) ]] || echo not-started"); then
  echo "$TPU_NAME: a worker does not answer; call resume.sh again" >&2
  exit
fi
if [[ $told != *not-started* ]]; then
  echo "$TPU_NAME: the command was started, nothing to do (the supervisors on the workers restart what crashes)"
  exit
fi
"$here/stop.sh" 2>/dev/null || true # some workers may have been given the command
"$here/setup.sh"
"$here/run.sh" "$@"
