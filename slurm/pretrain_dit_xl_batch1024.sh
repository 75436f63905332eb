#!/bin/bash
#SBATCH --job-name=dit_xl_1024 --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@300 --output=logs/%x-%j.out
# sbatch [options] slurm/pretrain_dit_xl_batch1024.sh [CONFIG.yaml] [key=value ...]
#
# Pretrains DiT-XL/2 (675 M weights) with 1024 images a step on four nodes, without labels unless another CONFIG is given.
# 1024 images a step on 32 GPUs are 32 each; the training state takes 1.8 GB of each by formula, activations come on top.
# Another batch needs another learning rate, by the configuration's rule: 1e-4 * sqrt(global_batch / 256). Every #SBATCH value
# is a default: --nodes=2 on the command line wins.
# Warned, preempted or requeued, the job saves and goes on where it stopped. docs/cluster.md
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/env.sh
pretrain configs/pretrain/dit_xl_2_imagenet256_uncond_batch1024.yaml "$@"
