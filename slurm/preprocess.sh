#!/bin/bash
# Prepare data on a node without GPUs, any command of `python -m tools.preprocess`:
#   sbatch slurm/preprocess.sh build recipe.yaml --out train.gvd
#
#SBATCH --job-name=preprocess     # as squeue shows it
#SBATCH --nodes=1                 # one is enough
#SBATCH --ntasks=1                # one process
#SBATCH --cpus-per-task=16        # `--workers` of the command uses them
#SBATCH --time=08:00:00           # the limit of a start
#SBATCH --requeue                 # a command that has not finished has left no dataset
#SBATCH --open-mode=append        # one log through all starts
#SBATCH --output=%x-%j.out        # the job's name and number
set -eu
export GHOSTVIS_DEVICE=cpu
source slurm/common.sh
run -m tools.preprocess "$@"
