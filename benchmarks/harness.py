"""What the benchmarks share: interleaved timing, and one list of results in
benchmarks/results.json.

A row is {"name", "ours", "other", "ratio", "unit", "opponent"}; ratio > 1 means that ours is
better. Variants run in one process on the same inputs, in turns; the median of the rounds counts,
in CPU seconds of this process.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
ROUNDS = 5


def cpu_seconds(
    variants: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS
) -> dict[str, float]:
    """Median CPU seconds of each variant; every round runs all of them, after one round to warm
    up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name, run in variants.items():
            start = time.process_time()
            run()
            if round_number:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def record(
    name: str, ours: float, other: float, unit: str, opponent: str, higher_is_better: bool = True
) -> None:
    """Print one comparison and put it into results.json, in place of an older row of that name."""
    ratio = ours / other if higher_is_better else other / ours
    row = {
        "name": name,
        "ours": round(ours, 4),
        "other": round(other, 4),
        "ratio": round(ratio, 3),
        "unit": unit,
        "opponent": opponent,
    }
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [old for old in rows if old["name"] != name] + [row]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    shown = [f"{v:,.1f}" if v >= 100 else f"{v:.3g}" for v in (ours, other)]
    print(f"{name}: {shown[0]} against {shown[1]} {unit} ({opponent}): {ratio:.2f}x")


def machine() -> str:
    """The load beside us, to be printed with every run."""
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
