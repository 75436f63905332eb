"""Train a small AutoencoderKL:

python data_prep/train_autoencoder.py --source DIR --out autoencoder/ [--steps 2500]
"""

import sys

from latentddae.core.errors import run_command
from latentddae.data.encoding.train_autoencoder import main

if __name__ == "__main__":
    sys.exit(run_command("train_autoencoder", main))
