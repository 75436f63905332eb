"""CIFAR-10 or CIFAR-100 to 32-pixel images for the pixel-space models:

    python data_prep/cifar.py --source cifar10 --out data/cifar10 --download

For the latent models' transfer, DDAE's recipe (crops at 32 pixels, then 256): --autoencoder
stabilityai/sd-vae-ft-ema --resolution 256 --crop native --views original,copy1,copy2
"""

import sys

from latentddae.core.errors import run_command
from latentddae.data.encoding.all_splits import main_for

SPLITS = {"train": ("--views", "original,mirror"), "test": ()}

if __name__ == "__main__":
    main = main_for(SPLITS, ("--autoencoder", "none", "--resolution", "32"))
    sys.exit(run_command("cifar", main, sys.argv[1:]))
