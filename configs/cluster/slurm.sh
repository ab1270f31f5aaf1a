#!/bin/bash
# sbatch --nodes=4 configs/cluster/slurm.sh fit --config ... --ckpt_path last
# Five minutes before its time is over, or when it is preempted, the run saves and leaves, and the job goes back into the
# queue, where `--ckpt_path last` lets it go on. Where a step may take longer than the 270 seconds of torchrun.sh, raise both:
# --signal here and LEAVE in the environment.
#SBATCH --job-name=clp
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
told=""
trap 'told=yes; kill -TERM "$step"' TERM
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD NODES="$SLURM_JOB_NUM_NODES"
# One torchrun on each node, which starts a process for every GPU.
srun bash configs/cluster/torchrun.sh "$@" &
step=$!
wait "$step"
status=$?
if [ -n "$told" ]; then
  wait "$step"  # the trap ended the first wait
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
