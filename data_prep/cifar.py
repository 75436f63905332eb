"""CIFAR-10 or CIFAR-100 to 32-pixel images for the pixel-space models:

    python data_prep/cifar.py --source cifar10 --out data/cifar10 --download

For the latent models' transfer, DDAE's recipe (crops at 32 pixels, then 256): --autoencoder
stabilityai/sd-vae-ft-ema --resolution 256 --crop native --views copy1,copy2 --test-views original
"""

import sys

from latentddae.core.errors import run_command
from latentddae.data.encoding.encode import main

DEFAULTS = (
    "splits=train,test views=original,mirror test_views=original autoencoder=none resolution=32"
)

if __name__ == "__main__":
    sys.exit(run_command("cifar", main, [*DEFAULTS.split(), *sys.argv[1:]]))
