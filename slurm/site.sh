# shellcheck shell=bash
# What differs from one cluster to the next, and nothing else. Every line is a default: what is set
# in the environment that `sbatch` is called from is stronger, so a test or one job needs no edit.
# Account, partition and the like are sbatch's own: export SBATCH_ACCOUNT, SBATCH_PARTITION, ...

# Python of the environment that `make env` makes; every node must see it under this name.
: "${GHOSTVIS_PYTHON:=$PWD/.venv/bin/python}"
# Commands before anything else, such as `module load cuda`: a file that is sourced, if named.
: "${GHOSTVIS_SETUP:=}"
# cuda, or cpu: no GPU is looked at.
: "${GHOSTVIS_DEVICE:=cuda}"
# The ranks meet at this port of the first node. Of its own for each job: nodes may be shared.
: "${GHOSTVIS_MASTER_PORT:=$((20000 + (${SLURM_JOB_ID:-0} + 7 * ${SLURM_RESTART_COUNT:-0}) % 10000))}"
# Ranks that go on this long after another one has ended are taken down.
: "${GHOSTVIS_WAIT_S:=60}"
# A job that has not finished starts itself again while it gets on; this often without a new checkpoint.
: "${GHOSTVIS_FRUITLESS_STARTS:=2}"
# What a node needs free in /tmp and /dev/shm, in MiB.
: "${GHOSTVIS_MIN_FREE_MIB:=512}"

# Network. Name the interface where NCCL and gloo do not find the right one by themselves.
: "${NCCL_SOCKET_IFNAME:=}" "${GLOO_SOCKET_IFNAME:=$NCCL_SOCKET_IFNAME}"
: "${NCCL_IB_HCA:=}"
: "${NCCL_DEBUG:=WARN}"
# The last collectives of each rank are kept, and written when one of them times out.
: "${TORCH_FR_BUFFER_SIZE:=2000}" "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"
: "${OMP_NUM_THREADS:=1}"
