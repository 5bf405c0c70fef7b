#!/usr/bin/env bash
# Start one command on all workers under a supervisor. Arguments are those of `appo-jax train`:
#
#   launch/run.sh --config configs/qwen2_5_7b_reasoning.py --policy.path /mnt/shared/qwen2_5_7b_sft --data /mnt/shared/appo_rl \
#       --tools.search.url http://10.0.0.3:8000/retrieve --run-dir /mnt/shared/runs/qwen
#
#   TPU_RETRIES  restarts after a crash before systemd gives up (default 20)
#   TPU_ENV      names of variables of this shell that the command gets, e.g. "OPENAI_API_KEY XLA_FLAGS". Their values are copied in
#                a file that only its owner may read, so that no list of processes and no log shows them
#   TPU_COMMAND  the command that is started instead of `train`: `sft`, on all workers together, or another one, on each
#                separately (launch/sweep.sh: `sweep --worker`)
source "$(dirname "$0")/common.sh"
(($# > 0)) || { echo "run.sh: give the arguments of 'appo-jax train', e.g. --config configs/qwen2_5_7b_reasoning.py" >&2; exit 2; }

printf -v arguments '%q ' "${@//\$/\$\$}" # systemd expands $NAME in a unit's arguments, and reads $$ as one $
command=${TPU_COMMAND:-train}
together=''
[[ $command != train && $command != sft ]] || together='--setenv APPO_DISTRIBUTED=1' # all hosts of the pod are one run

# shellcheck disable=SC2086
require ${TPU_ENV:-}
own=$(mktemp)
trap 'rm -f "$own"' EXIT
for name in ${TPU_ENV:-}; do
  value=$(printf %s "${!name}" | sed 's/[\\"$`]/\\&/g') # quoted as systemd reads it
  printf '%s="%s"\n' "$name" "$value" >>"$own"
done
for node in $(nodes); do
  [[ -z ${TPU_ENV:-} ]] || gcloud compute tpus tpu-vm scp "$own" "$node:$home.env.new" "${where[@]}" --worker all
done
environment="rm -f \$HOME/$home.env"
[[ -z ${TPU_ENV:-} ]] || environment="chmod 600 \$HOME/$home.env.new; mv \$HOME/$home.env.new \$HOME/$home.env"
# A unit that runs keeps its variables: it reads the file again at each restart.
refuse=$(refuse_running "rm -f \$HOME/$home.env.new")

# systemd is the supervisor: it outlives the ssh connection, restarts the command after a crash, and gives up after TPU_RETRIES
# restarts. A crash of one host ends the others too, so that all of them start again and go on from the last checkpoint.
# Exit codes 1 (an error that a restart meets again), 2 (a config that cannot run) and 130 (asked to stop) are final.
# A run that stop.sh asks to stop finishes its step, which may take many minutes, and saves it. At a shutdown of the machine, systemd sends
# KillSignal instead, and the run has stop_grace_seconds.
# When memory runs out, the kernel ends a process of a tool, and its call fails. OOMPolicy=continue: systemd does not stop the run then.
on_all "$refuse; $environment; sudo systemctl reset-failed appo 2>/dev/null; sudo systemd-run --unit appo --uid \$(id -u) --gid \$(id -g) \
--working-directory \$HOME/$home --setenv HOME=\$HOME $together --property EnvironmentFile=-\$HOME/$home.env \
--property Restart=on-failure --property RestartSec=15 \
--property StartLimitIntervalSec=infinity --property StartLimitBurst=$((${TPU_RETRIES:-20} + 1)) \
--property RestartPreventExitStatus='1 2 130' --property KillMode=mixed --property KillSignal=SIGINT \
--property TimeoutStopSec=infinity --property OOMPolicy=continue --property LimitNOFILE=65536 \$HOME/$home/.venv/bin/appo-jax $command $arguments \
&& cat $boot >\$HOME/$home.started"
