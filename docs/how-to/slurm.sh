#!/usr/bin/env bash
# Pretrain on 4 machines with 8 GPUs each, for as long as it takes.
#
# Shortly before its time limit the job saves, puts itself back into the queue, and later continues at the same step.
# Before you start: import, plan and preprocess the dataset, and check it: nnUNetv2_vf doctor -d 100 -p PCTNetPlans
# Adapt: dataset and plans (last command), the environment, and the numbers of machines, CPUs and GPUs (--gpus-per-node
# and --nproc-per-node; nnUNet_n_proc_DA times their number should be less than the number of CPUs).
# It has been tested with SLURM's commands replaced by small scripts and ranks on CPUs, not on a cluster with GPUs.
#
#   start:          sbatch slurm.sh
#   one machine:    set --nodes=1, leave the rest as it is
#   stop:           scancel JOB
#
# After scancel the ranks have SLURM's KillWait to save, usually 30 seconds. If that is too short, the training later
# continues from its last checkpoint, which is at most 30 minutes old.
#
# If your cluster does not allow requeueing, queue several jobs. Those that start after the end of the training only
# repeat its report:
#   sbatch --dependency=afterany:JOB slurm.sh
#SBATCH --job-name=vf-pretraining
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
##SBATCH --account=... --partition=...

# Activate your environment here: source /path/to/.venv/bin/activate, module load ..., or conda activate ...
# Or use the container: container=(apptainer exec --nv --bind /path/to/shared /path/to/nnunetv2-vf.sif)
container=()

# nnU-Net's folders must be on a file system that all machines share.
: "${nnUNet_raw:?}" "${nnUNet_preprocessed:?}" "${nnUNet_results:?}"
variables=$("${container[@]}" nnUNetv2_vf env) || exit 1
eval "$variables"

# Data workers of each rank. A machine has 8 ranks, one for each GPU.
export nnUNet_n_proc_DA=7
# Seconds that torchrun gives its ranks to save and exit. The default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
# 2 samples for each rank, 64 in all. Without this line, the batch of the plans is split among the ranks.
# A batch this large may need a larger nnUNet_vf_initial_lr.
export nnUNet_vf_batch_per_gpu=2

# SLURM sends SIGUSR1 to this script 300 seconds before the time limit.
requeue() {
    # Send SIGTERM to torchrun and the ranks: they save and exit. (kill -TERM of srun would kill them at once.)
    scancel --signal=TERM "$SLURM_JOB_ID"
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}" "${container[@]}" torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 10 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
    --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" \
    -m nnunetv2_vf.distributed 100 3d_fullres all -tr VFPretrainTrainer -p PCTNetPlans &
training=$!
wait "$training"
