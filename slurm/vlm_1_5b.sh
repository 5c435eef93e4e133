#!/bin/bash
# Train the 1.5B model: sbatch slurm/vlm_1_5b.sh [section.key=value ...]
# Another file of settings: GHOSTVIS_CONFIG=my.yaml sbatch slurm/vlm_1_5b.sh
#
#SBATCH --job-name=vlm_1_5b       # as squeue shows it
#SBATCH --nodes=1                 # more nodes: more data parallelism, nothing else changes
#SBATCH --ntasks-per-node=4       # one process for each GPU
#SBATCH --gpus-per-node=4         # refused at submission where nodes have fewer
#SBATCH --cpus-per-task=8         # reading and decoding pictures beside the GPU
#SBATCH --time=12:00:00           # the limit of one start; what is left follows in the next
#SBATCH --signal=B:USR1@300       # 5 minutes before the limit: save, stop, back into the queue
#SBATCH --requeue                 # start again after preemption or a dead node
#SBATCH --open-mode=append        # one log through all starts
#SBATCH --output=%x-%j.out        # the job's name and number
set -eu
source slurm/common.sh
train "${GHOSTVIS_CONFIG:-examples/configs/vlm_1_5b_easyvqa.yaml}" "$@"
