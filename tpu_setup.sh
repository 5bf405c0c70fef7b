#!/usr/bin/env bash
# Set up one TPU VM: Python environment, sandbox, shared storage; then check what the machine can do. It can be run again.
# launch/setup.sh runs it on every worker of a pod.
#
#   TPU_SHARED  NFS export to mount at /mnt/shared (optional)
#   PYTHON      Python 3.11 or newer (default python3.11, installed if missing)
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3.11}
packages=(bubblewrap nfs-common)
apt=(apt-get -qq -o DPkg::Lock::Timeout=600) # a new VM installs its own updates at first, and holds the lock meanwhile
sudo "${apt[@]}" update
if ! command -v "$python" >/dev/null; then
  # Ubuntu 22.04, which TPU VMs run, has Python 3.11 in its universe.
  packages+=(python3.11 python3.11-venv)
elif [[ -z "${PYTHON:-}" ]]; then
  packages+=(python3.11-venv)
fi
sudo DEBIAN_FRONTEND=noninteractive "${apt[@]}" install --yes "${packages[@]}"

if [[ -n "${TPU_SHARED:-}" ]]; then
  mounted=$(findmnt -nvo SOURCE /mnt/shared || true)
  if [[ -z $mounted ]]; then
    sudo mkdir -p /mnt/shared
    sudo mount -t nfs "$TPU_SHARED" /mnt/shared
  elif [[ ${mounted%/} != "${TPU_SHARED%/}" ]]; then
    echo "tpu_setup.sh: $mounted is mounted at /mnt/shared, but TPU_SHARED is $TPU_SHARED; unmount it there (sudo umount" \
      "/mnt/shared), or set TPU_SHARED to it" >&2
    exit 1
  fi
fi

rm -rf build ./*.egg-info # of an earlier version: pip would install its modules again, if they are newer or gone now
[[ -x .venv/bin/pip ]] || "$python" -m venv .venv # pip comes last: without python3-venv there would be only a python
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --constraint requirements.txt '.[tpu]'
.venv/bin/appo-jax doctor
