#!/usr/bin/env bash
# Request a pod, and wait until it is active.
#
#   TPU_TYPE     accelerator type, e.g. v5p-128 (counts cores: 64 chips), v5litepod-64, v6e-64
#   TPU_RUNTIME  runtime version, e.g. v2-alpha-tpuv5 (v5p), v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv6e (v6e)
#   TPU_SPOT     1: spot capacity, which is cheaper but may be taken away at any time (launch/resume.sh continues the run)
#   TPU_POLL     seconds between two checks of the request (default 30)
source "$(dirname "$0")/common.sh"
require TPU_TYPE TPU_RUNTIME

request=(--accelerator-type "$TPU_TYPE" --runtime-version "$TPU_RUNTIME")
if ((slices == 1)); then
  request+=(--node-id "$TPU_NAME")
else
  request+=(--node-count "$slices" --node-prefix "$TPU_NAME")
fi
[[ "${TPU_SPOT:-0}" != 1 ]] || request+=(--spot)
gcloud compute tpus queued-resources create "$TPU_NAME" "${where[@]}" "${request[@]}"

wait_until_active
