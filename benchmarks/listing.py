"""`latentddae inspect` on a folder of ImageNet's size: seconds and memory.

    python benchmarks/listing.py [--files 1300000]

The files are empty: names that end like an image's are believed unopened.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import machine, record

CLASSES = 1000
GOAL_S, GOAL_GB = 60.0, 1.0


def write_names(root: Path, count: int) -> None:
    for number in range(CLASSES):
        folder = root / "train" / f"n{number:08d}"
        folder.mkdir(parents=True)
        for i in range(number, count, CLASSES):
            (folder / f"n{number:08d}_{i}.JPEG").touch()
    (root / "val" / "n00000000").mkdir(parents=True)
    (root / "val" / "n00000000" / "v1.JPEG").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_300_000)
    count = parser.parse_args().files
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        write_names(Path(folder), count)
        command = [sys.executable, "-m", "latentddae", "inspect", folder]
        start = time.perf_counter()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - start
    assert f"{count + 1:,} listed" in said, said
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    goal = f"goal, {count:,} names"
    record("inspect_seconds", seconds, GOAL_S, "s", goal, higher_is_better=False)
    record("inspect_memory", gigabytes, GOAL_GB, "GB", goal, higher_is_better=False)


if __name__ == "__main__":
    main()
