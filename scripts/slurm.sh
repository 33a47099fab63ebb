#!/bin/bash
# Train on a cluster with Slurm, one task per node:  sbatch scripts/slurm.sh dataset=cifar10 data_dir=DATA name=big
# runs/ and the data must be on a file system that all nodes share. All arguments are passed to the training command.
#SBATCH --job-name=gpu-image-pipeline
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=16
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
named=
for argument in "$@"; do case $argument in name=* | resume=*) named=yes ;; esac; done
[[ $named ]] || set -- "$@" "name=slurm-${SLURM_JOB_ID:?start this script with sbatch}"
# Each task writes TensorFlow's log to its own file; the tasks find each other by Slurm's variables (train/cluster.py).
export PIPELINE_LAUNCHER="sbatch scripts/slurm.sh"  # the command that resume hints show
# Since Slurm 22.05 srun does not inherit --cpus-per-task; --distribution=block numbers the tasks node by node.
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --distribution=block bash -c 'PIPELINE_LOG="logs/slurm-$SLURM_JOB_ID-$SLURM_PROCID.log" exec "${PYTHON:-.venv/bin/python}" -m pipeline.train "$@" cluster=slurm' train "$@"
