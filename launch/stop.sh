#!/usr/bin/env bash
# End the run (it saves, then leaves), and with `launch/stop.sh delete` give the pod back.
source "$(dirname "$0")/common.sh"

case ${1:-} in
  '') on_all 'sudo systemctl stop appo' ;;
  delete) gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet ;;
  *)
    echo "stop.sh: expected nothing or 'delete', not '$1'" >&2
    exit 2
    ;;
esac
