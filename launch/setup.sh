#!/usr/bin/env bash
# Copy the repository (its last commit) to every worker and set each one up with tpu_setup.sh. The package becomes exactly that of the
# commit; other files that a worker has under ~/appo_jax stay. While the unit of run.sh runs on any worker, nothing is changed: at a
# restart it would find no package, or another one.
#
#   TPU_SHARED  NFS export (Filestore: 10.0.0.2:/share) that every worker mounts at /mnt/shared: weights, data, run directories
source "$(dirname "$0")/common.sh"

on_all "$(refuse_running)"
archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$(dirname "$0")/.." archive --format tar.gz --output "$archive" HEAD
for node in $(nodes); do
  gcloud compute tpus tpu-vm scp "$archive" "$node:$home.tar.gz" "${where[@]}" --worker all
done
printf -v shared %q "${TPU_SHARED:-}"
on_all "mkdir -p $home && rm -rf $home/appo_jax && tar -xzf $home.tar.gz -C $home && cd $home && TPU_SHARED=$shared bash tpu_setup.sh"
