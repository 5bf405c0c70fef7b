#!/usr/bin/env bash
# Without argument: end the run (it saves first). `launch/stop.sh delete`: delete the pod.
source "$(dirname "$0")/common.sh"

case ${1:-} in
  '') on_all 'sudo systemctl stop appo' ;;
  delete) gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet ;;
  *)
    echo "stop.sh: expected no argument or 'delete', not '$1'" >&2
    exit 2
    ;;
esac
