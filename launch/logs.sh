#!/usr/bin/env bash
# Show the run's logs. Without argument: follow worker 0's log. launch/logs.sh all: the last lines and the state of every worker.
# launch/logs.sh status RUN_DIR: what the run does now on every host, and its last error (a run, or a folder of runs).
source "$(dirname "$0")/common.sh"

case ${1:-} in
  all) on_all 'hostname; systemctl is-active appo; journalctl --unit appo --lines 20 --output cat' ;;
  '') gcloud compute tpus tpu-vm ssh "$(nodes | head -1)" "${where[@]}" --worker 0 \
    --command 'journalctl --unit appo --lines 200 --output cat --follow' ;;
  status)
    (($# > 1)) || { echo "logs.sh: status needs the run's directory, with its path on the workers" >&2; exit 2; }
    printf -v runs '%q ' "${@:2}"
    gcloud compute tpus tpu-vm ssh "$(nodes | head -1)" "${where[@]}" --worker 0 \
      --command "cd \$HOME/$home && .venv/bin/appo-jax status $runs"
    ;;
  *)
    echo "logs.sh: expected no argument, 'all' or 'status RUN_DIR', not '$1'" >&2
    exit 2
    ;;
esac
