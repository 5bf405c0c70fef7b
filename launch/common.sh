# shellcheck shell=bash disable=SC2034
# The other scripts source this file: the names of the pod, and functions that run commands on it.
#
#   TPU_PROJECT  Google Cloud project            TPU_NAME    name of the pod (and of its queued resource)
#   TPU_ZONE     zone, e.g. us-east5-a           TPU_SLICES  slices joined over the data-centre network (default 1)
set -euo pipefail

require() {
  local name missing=()
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) && return
  echo "$(basename "$0"): set ${missing[*]} (docs/pods.md says what each one is)" >&2
  exit 2
}

require TPU_PROJECT TPU_ZONE TPU_NAME
slices=${TPU_SLICES:-1}
where=(--project "$TPU_PROJECT" --zone "$TPU_ZONE")
home=appo_jax # the repository, in the home directory of every worker
boot=/proc/sys/kernel/random/boot_id # run.sh copies it to ~/appo_jax.started: resume.sh sees whether a worker was given the command

# The names of the pod's TPU nodes: a single one, or one per slice.
nodes() {
  if ((slices == 1)); then
    echo "$TPU_NAME"
  else
    seq --format "$TPU_NAME-%.0f" 0 $((slices - 1))
  fi
}

# Run a command on all workers of all nodes at the same time. Fails if it fails on any of them.
on_all() {
  local node pids=() pid failed=0
  for node in $(nodes); do
    gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker all --command "$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
  done
  return "$failed"
}

# For a worker's shell: leave with an error if the unit runs there. An argument is done before.
refuse_running() {
  echo "case \$(systemctl is-active appo) in active|activating|deactivating) ${1:+$1; }\
echo \"\$(hostname): the unit appo runs; 'launch/stop.sh' ends it\" >&2; exit 1 ;; esac"
}

# The state of the pod's request, or MISSING. Asks again while gcloud fails, because a connection may be gone for some minutes.
pod_state() {
  local errors state attempt
  errors=$(mktemp)
  for ((attempt = 0; attempt < 20; attempt++)); do
    if state=$(gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" --format 'value(state.state)' 2>"$errors"); then
      break
    elif grep -q NOT_FOUND "$errors"; then
      state=MISSING
      break
    fi
    cat "$errors" >&2
    state=''
    sleep "${TPU_POLL:-30}"
  done
  rm -f "$errors"
  [[ -n $state ]] && echo "$state"
}

# Wait until the requested pod is there. Fails if the request does.
wait_until_active() {
  local state
  while true; do
    state=$(pod_state) || return 1
    echo "$TPU_NAME: $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | MISSING)
        echo "$(basename "$0"): the request failed; 'launch/stop.sh delete' removes it" >&2
        return 1
        ;;
    esac
    sleep "${TPU_POLL:-30}"
  done
}
