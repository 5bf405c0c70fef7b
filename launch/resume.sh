#!/usr/bin/env bash
# Continue a run after a pre-emption: if the pod is gone, request a new one; if its workers were not given the command (since they
# were booted), set them up and start it. The run continues from its run directory, which must be on storage that outlives the pod.
# Arguments and variables are those of create, setup and run. Exit codes:
#
#   0  the run was started, or is there already
#   1  it could not be started now: call resume.sh again
#   2  an argument or a variable is missing
#   3  the run has ended: it is done, was stopped, or failed with an error that a restart repeats. launch/run.sh starts it again
#
#   until launch/resume.sh --config … ; [[ $? == [23] ]]; do sleep 60; done      # keeps a run on spot capacity going until it ends
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
# What each worker says: not-started, or how the unit has ended for good. A worker whose unit runs, or waits for a restart, says nothing.
# The unit comes first: another user may have started it, or ssh may have failed before the command was noted in ~/appo_jax.started.
asked="case \$(systemctl is-active appo) in active|activating|deactivating) exit 0 ;; esac; \
if [[ \$(cat $boot) != \$(cat \$HOME/$home.started 2>/dev/null) ]]; then echo not-started; exit; fi; \
echo \"ended: \$(hostname): \$(systemctl show --property Result,ExecMainStatus appo | tr '\n' ' ')\"; \
journalctl _SYSTEMD_UNIT=appo.service --lines 1 --output cat || true" # --unit gives systemd's lines on the unit, too
if ! told=$(on_all "$asked"); then
  echo "$TPU_NAME: a worker does not answer; call resume.sh again" >&2
  exit 1
fi
if [[ $told == *ended:* && $told != *not-started* ]]; then
  echo "$told"
  echo "$TPU_NAME: the run has ended; its last lines are above. 'launch/run.sh' with the same arguments starts it again" >&2
  exit 3
fi
if [[ $told != *not-started* ]]; then
  echo "$TPU_NAME: the command runs, nothing to do (the supervisors on the workers restart what crashes)"
  exit
fi
"$here/stop.sh" 2>/dev/null || true # some workers may have been given the command
"$here/setup.sh" || exit 1
"$here/run.sh" "$@"
