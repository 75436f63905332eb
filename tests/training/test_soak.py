"""Ten minutes of training with all that runs beside it: nothing is held on to."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from latentddae.core import files

from .launchers import Launch, trains

SECONDS = 600
SETTINGS = [
    "total_images=1000000000",
    "log_every_images=320",
    "save.every_images=3200",
    "save.background=true",
    "monitor.every_images=8000",
    "monitor.images=4",
    "monitor.steps=2",
    "monitor.heldout_split=test",
    "monitor.probe.every_images=8000",
    "gc_every_steps=50",
]
SLACK_MB = 8
"""What the allocator may keep; 100 bytes a step would be a third of it."""


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    resident_mb: float
    files: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        numbers = dict(line.split()[:2] for line in status if len(line.split()) > 1)
        open_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(int(numbers["VmRSS:"]) / 1024, open_files, int(numbers["Threads:"]))


def watch(launch: Launch, seconds: float) -> dict[int, list[Held]]:
    """What each rank holds, every second."""
    ranks = launch.ranks()
    assert len(ranks) == 2
    held: dict[int, list[Held]] = {pid: [] for pid in ranks}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert launch.process.poll() is None, launch.log.read_text()
        for pid in ranks:
            held[pid].append(Held.by(pid))
        time.sleep(1)
    return held


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 200)
def test_ten_minutes_hold_on_to_nothing(pixel_shards, tmp_path) -> None:
    """Memory, files and threads of the last minutes are those of the third; the log is whole."""
    run = tmp_path / "run"
    config = str(Path(__file__).parent / "tiny.yaml")
    paths = [f"run={run}", f"data.path={pixel_shards}"]
    launch = Launch.start("torchrun", tmp_path / "log", ["--config", config, *paths, *SETTINGS])
    try:
        trains(launch, run, 16_000)  # every kind of work has been done twice
        held = watch(launch, SECONDS)
    finally:
        launch.kill()
    for samples in held.values():
        part = len(samples) // 5
        early, late = samples[part : 2 * part], samples[-part:]
        print(f"{early[0]} -> {late[-1]}")
        for name in ("files", "threads"):
            most = [max(getattr(each, name) for each in some) for some in (early, late)]
            assert most[1] <= most[0], f"{name}: {most}"
        memory = [statistics.median(each.resident_mb for each in some) for some in (early, late)]
        assert memory[1] - memory[0] < SLACK_MB, f"MB: {memory}"
    rows = [row for row in files.read_json_lines(run / "metrics.jsonl") if "event" not in row]
    print(f"{rows[-1]['images']:,} images, {len(rows):,} rows")
    assert [row["images"] for row in rows] == [320 * (n + 1) for n in range(len(rows))]
    assert len(list((run / "state").glob("images-*"))) <= 3  # two are kept, one is being written
