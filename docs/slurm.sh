#!/usr/bin/env bash
# Pretraining on 4 machines of 8 GPUs each, for as long as it takes: the job puts itself back into the queue shortly
# before its time is up, and goes on where it was. Plan, preprocess and look (nnUNetv2_vf doctor -d 100) before.
# Start: sbatch slurm.sh; stop for good: scancel JOB. On one machine: --nodes=1, the rest as it is.
# Where requeueing is not allowed, queue several at once: sbatch --dependency=afterany:JOB slurm.sh
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

# source /path/to/.venv/bin/activate                # or what your cluster has: module load, conda activate
: "${nnUNet_raw:?}" "${nnUNet_preprocessed:?}" "${nnUNet_results:?}"   # on a file system that all machines share
variables=$(nnUNetv2_vf env) || exit 1
eval "$variables"
export nnUNet_n_proc_DA=7                           # workers of each of the 8 ranks of a machine
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120           # seconds that torchrun gives its ranks to do so; 30 unless set
export nnUNet_vf_batch_per_gpu=2                    # 64 samples in all; unset: the plan's batch, split among the ranks
                                                    # (a batch that large may want a larger nnUNet_vf_initial_lr)

requeue() {                                         # SLURM sends SIGUSR1 to this script, 300 seconds before the end
    scancel --signal=TERM "$SLURM_JOB_ID"           # ... and SIGTERM to torchrun and the ranks, which save and leave
    wait "$training"                                # (kill -TERM of srun would kill them at once)
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}" torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 10 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
    --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" \
    -m nnunetv2_vf.distributed 100 3d_fullres all -tr VFPretrainTrainer -p PCTNetPlans &
training=$!
wait "$training"
