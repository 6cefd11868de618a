#!/usr/bin/env bash
# Train on the nodes of a SLURM job, one process per GPU. Before the time limit and on preemption all processes save a
# checkpoint and stop; the job is requeued and resumes. Copy this file, adapt the lines below, and submit it where blockft
# is on PATH. This script was tried with stand-ins for srun and scontrol, not on a cluster.
#   sbatch recipes/launch/slurm.sh RECIPE OUT [key=value ...]
#   sbatch --nodes 4 recipes/launch/slurm.sh my-recipe.yaml out/run train.batch_rows=64
# OUT is the run's folder (train.output_dir), on a file system that all nodes share; if it exists, the run is resumed.
# Network: export NCCL_SOCKET_IFNAME before sbatch if NCCL chooses the wrong interface.
#SBATCH --job-name=blockft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n 2,8p "$0" >&2
  exit 2
fi
recipe=$1 out=$2
shift 2

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

resume=()
if [ -d "$out" ]; then resume=(--resume); fi

# exec: SLURM's SIGTERM must reach blockft and not a shell around it
code=0
srun --kill-on-bad-exit=1 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec blockft train "$@"' \
  blockft "$recipe" "train.output_dir=$out" "$@" "${resume[@]}" || code=$?

# 130: stopped by a signal, after saving a checkpoint
if [ "$code" -eq 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
