#!/bin/bash
# One training run on several machines of a SLURM cluster: one task a machine, which starts one process a GPU.
#
#   sbatch --nodes 4 examples/slurm_train.sh RECIPE [--key value ...]
#
# All machines must see the same files (images, the run's folder) and have the same environment. The run continues from
# its last checkpoint when the job is started again, also with another number of machines.
#SBATCH --job-name=opencoca
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: sbatch --nodes N $0 RECIPE [--key value ...]" >&2; exit 2; }

first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))

# --signal above asks for SIGTERM two minutes before the time is up; torchrun hands it on, and the run saves and stops.
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_machine:29500" \
    --max-restarts 3 \
    -m opencoca train "$@"
