"""Any folder of images to latents at 256 pixels: python data_prep/folder.py --source
photos --out data/photos

photos/ holds train/CLASS/... and val/CLASS/... (or test/). A folder without splits:
`latentddae encode` alone. All
options of `latentddae encode` may follow.
"""

import sys

from latentddae.core.errors import run_command
from latentddae.data.encoding.all_splits import main_for

if __name__ == "__main__":
    main = main_for({"train": ("--views", "original,mirror"), "val": ()}, ("--resolution", "256"))
    sys.exit(run_command("folder", main, sys.argv[1:]))
