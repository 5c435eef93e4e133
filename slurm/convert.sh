#!/bin/bash
# Convert weights on a node without GPUs, any command of `python -m ghostvis_mega convert`:
#   sbatch slurm/convert.sh export runs/sft/checkpoints/step-00010000 --out exports/sft --data sft.gvd
#
#SBATCH --job-name=convert        # as squeue shows it
#SBATCH --nodes=1                 # one is enough
#SBATCH --ntasks=1                # one process
#SBATCH --cpus-per-task=8         # tensors are read and written in parallel
#SBATCH --time=02:00:00           # the limit of a start
#SBATCH --requeue                 # an export that has not finished has left no directory
#SBATCH --open-mode=append        # one log through all starts
#SBATCH --output=%x-%j.out        # the job's name and number
set -eu
export GHOSTVIS_DEVICE=cpu
source slurm/common.sh
run -m ghostvis_mega convert "$@"
