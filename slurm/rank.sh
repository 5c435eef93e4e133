#!/bin/bash
# One process of a training, started by srun; the other variables come from common.sh. It becomes the
# training process, so that signals and exit codes are that one's own.
set -eu
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
exec "$GHOSTVIS_PYTHON" examples/pretrain_vlm.py "$@"
