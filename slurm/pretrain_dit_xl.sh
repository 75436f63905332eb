#!/bin/bash
#SBATCH --job-name=dit_xl --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@300 --output=logs/%x-%j.out
# sbatch [options] slurm/pretrain_dit_xl.sh [CONFIG.yaml] [key=value ...]
#
# Pretrains DiT-XL/2 (675 M weights), without labels unless another CONFIG is given. Any setting of `latentddae train` may
# follow: run=runs/mine data.path=data/imagenet256. Every #SBATCH value is a default: --nodes=2 on the command line wins.
# 256 images a step on 8 GPUs are 32 each; the training state takes 3.0 GB of each by formula, activations come on top.
# More nodes would leave each GPU too few images to be busy; pretrain_dit_xl_batch1024.sh has the recipe for four.
# Warned, preempted or requeued, the job saves and goes on where it stopped. docs/cluster.md
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/env.sh
pretrain configs/pretrain/dit_xl_2_imagenet256_uncond.yaml "$@"
