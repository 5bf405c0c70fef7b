#!/usr/bin/env bash
# Without argument: end the run when its step is done and saved, which may take many minutes. `launch/stop.sh delete`: delete the pod.
source "$(dirname "$0")/common.sh"

case ${1:-} in
  # `systemctl stop` sends the signal of a shutdown, after which a run has only stop_grace_seconds. SIGHUP has no limit, and asks only once.
  '') on_all "if systemctl is-active --quiet appo; then sudo systemctl kill --kill-who main --signal HUP appo; fi; \
while systemctl is-active --quiet appo; do sleep 1; done; \
case \$(systemctl is-active appo) in activating|deactivating) sudo systemctl stop appo ;; esac" ;;
  delete) gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet ;;
  *)
    echo "stop.sh: expected no argument or 'delete', not '$1'" >&2
    exit 2
    ;;
esac
