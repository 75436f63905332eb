#!/bin/bash
#SBATCH --job-name=pixel --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=12 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=B:USR1@300 --output=logs/%x-%j.out
# sbatch [options] slurm/pretrain_pixel.sh [CONFIG.yaml] [key=value ...]
#
# Pretrains a U-Net on stored pixels: DDPM++ under EDM on CIFAR-10 unless another CONFIG of configs/pixel/ is given. Any
# setting of `latentddae train` may follow: run=runs/mine data.path=data/cifar10-pixels. Every #SBATCH value is a default.
# Warned, preempted or requeued, the job saves and goes on where it stopped. docs/cluster.md, docs/pixels.md
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/env.sh
pretrain configs/pixel/edm_ddpmpp_cifar10.yaml "$@"
