#!/usr/bin/env bash
# What the run says: follow worker 0's log, or (launch/logs.sh all) the last lines and the state of every worker.
source "$(dirname "$0")/common.sh"

case ${1:-} in
  all) on_all 'hostname; systemctl is-active appo; journalctl --unit appo --lines 20 --output cat' ;;
  '') gcloud compute tpus tpu-vm ssh "$(nodes | head -1)" "${where[@]}" --worker 0 \
    --command 'journalctl --unit appo --lines 200 --output cat --follow' ;;
  *)
    echo "logs.sh: expected nothing or 'all', not '$1'" >&2
    exit 2
    ;;
esac
