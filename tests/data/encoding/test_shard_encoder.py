"""A batch is written while the autoencoder has the next one, which nothing waits for."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentddae.core.errors import DataError, WriteError
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.encoding.decode_pool import decoded_batches
from latentddae.data.encoding.encode import encode
from latentddae.data.encoding.plan import EncodeConfig, Plan, make_plan
from latentddae.data.encoding.shard_encoder import BatchEncoder, Buffers
from latentddae.data.shard_writer import ShardWriter
from latentddae.data.shards import ShardSet
from latentddae.data.sources.open import open_source

VIEWS, BATCH = ("original", "mirror"), 4


class Watched:
    """An autoencoder whose `encode` is replaced; everything else is passed on."""

    def __init__(self, honest: Autoencoder, run: Callable[[int, torch.Tensor], Any]) -> None:
        self.honest, self.run, self.calls = honest, run, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.honest, name)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """One view (n, 3, H, W) -> its moments, as changed by `run` with the number of the call."""
        self.calls += 1
        changed = self.run(self.calls, images)
        return self.honest.encode(images) if changed is None else changed


def settings(source: Path, out: Path, **changes: Any) -> EncodeConfig:
    options = {"views": VIEWS, "batch": BATCH, "shard_size": 12, "workers": 2, **changes}
    return EncodeConfig(source=str(source), out=str(out), resolution=32, **options)


def plan_of(photos: Path, tmp_path: Path, autoencoder: Autoencoder) -> Plan:
    config = settings(photos, tmp_path / "out")
    return make_plan(config, open_source(str(photos), "train"), autoencoder.spec(32, VIEWS))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def threads() -> list[str]:
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith(("encode", "decode"))]


def test_samples_are_written_while_the_next_batch_is_encoded(
    photos, tmp_path, small_autoencoder, monkeypatch
) -> None:
    """The first sample is not written before the second batch is begun, and that is not finished
    before the sample is written; the third is not begun before the first is whole."""
    begun, first, honest_add = threading.Event(), threading.Event(), ShardWriter.add
    written: list[str] = []

    def waits(call: int, images: torch.Tensor) -> None:
        if call == len(VIEWS) + 1:
            begun.set()
        if call == 2 * len(VIEWS):
            assert first.wait(20), "nothing was written while the second batch was encoded"
        done = len(written)
        assert done >= BATCH * (-(-call // len(VIEWS)) - 2), (
            f"call {call} came after {done} samples"
        )
        assert threading.current_thread().name.startswith("encode")

    def add(writer: ShardWriter, *args: Any) -> None:
        assert begun.wait(20), "the second batch waits until the first is written"
        written.append(threading.current_thread().name)
        first.set()
        time.sleep(0.05 * (len(written) <= BATCH))
        honest_add(writer, *args)

    monkeypatch.setattr(ShardWriter, "add", add)
    encode(settings(photos, tmp_path / "out"), Watched(small_autoencoder, waits))
    assert set(written) == {"MainThread"} and len(written) == 30 and not threads()
    monkeypatch.undo()
    encode(settings(photos, tmp_path / "plain"), small_autoencoder)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_pixels_may_take_the_way_of_a_gpu(photos, tmp_path, small_autoencoder, monkeypatch) -> None:
    """Through two buffers of their own, in place of the memory that the decoder reuses."""
    encode(settings(photos, tmp_path / "plain"), small_autoencoder)
    made: list[Buffers] = []
    honest = Buffers.of

    def with_pixels(plan: Plan, device: torch.device) -> Buffers:
        pixels = torch.zeros(BATCH, len(VIEWS), 3, 32, 32, dtype=torch.uint8)
        made.append(honest(plan, device)._replace(pixels=pixels))
        return made[-1]

    monkeypatch.setattr(Buffers, "of", with_pixels)
    encode(settings(photos, tmp_path / "out"), small_autoencoder)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert len(made) == 2 and all(buffers.pixels.any() for buffers in made)


def test_a_batch_is_launched_without_waiting_and_comes_back_in_one_copy(
    photos, tmp_path, small_autoencoder, monkeypatch
) -> None:
    """However many views there are; all other copies are to the device."""
    counts: Counter[str] = Counter()
    plan = plan_of(photos, tmp_path, small_autoencoder)
    moments = torch.zeros(BATCH, *plan.spec.stored_shape)
    encoder = BatchEncoder(plan, Watched(small_autoencoder, lambda _, x: moments[: len(x)]))
    batch = next(decoded_batches(plan, [0]))
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "to", "copy_"):
            honest = getattr(torch.Tensor, name)

            def counted(
                x: torch.Tensor, *args: Any, name=name, honest=honest, **kwargs: Any
            ) -> Any:
                counts[name] += name != "copy_" or kwargs == {"non_blocking": True}
                return honest(x, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        encoded = encoder(batch)
    assert counts == Counter({"copy_": 1})
    assert encoded.stored().shape == (BATCH, len(VIEWS), *plan.spec.stored_shape)


def test_what_float16_cannot_hold_names_image_and_view(photos, tmp_path, small_autoencoder) -> None:
    """Overflow, NaN and infinity, each in one view of one image; the others are as they were."""
    bad = {1: (2, float("nan")), 4: (0, 7e4), 5: (3, float("-inf"))}

    def spoilt(call: int, images: torch.Tensor) -> torch.Tensor | None:
        moments = small_autoencoder.encode(images)
        if call in bad:
            row, value = bad[call]
            moments[row, -1, -1, -1] = value
        return moments

    plan = plan_of(photos, tmp_path, small_autoencoder)
    indices = list(plan.batches(0))
    entry = encode(
        settings(photos, tmp_path / "out", max_bad=3), Watched(small_autoencoder, spoilt)
    )
    expected = {}
    for call, (row, _) in bad.items():
        name = plan.source.names[indices[(call - 1) // 2][row]]
        view = VIEWS[(call - 1) % 2]
        expected[name] = f"the autoencoder's numbers are not finite in float16 ({view})"
    assert dict(entry["bad_images"]) == expected
    encode(settings(photos, tmp_path / "plain"), small_autoencoder)
    found, whole = (ShardSet(tmp_path / name, "train") for name in ("out", "plain"))
    at = {key: row for row, key in enumerate(whole.keys(np.arange(len(whole))))}
    rows = np.array([at[key] for key in found.keys(np.arange(len(found)))])
    assert len(rows) == 27
    assert (found.gather(np.arange(27)) == whole.gather(rows)).all()


@pytest.mark.parametrize("where", ["autoencoder", "writer"])
def test_an_error_has_its_class_and_leaves_no_thread(
    where, photos, tmp_path, small_autoencoder, monkeypatch
) -> None:
    """It is met after whole batches before it are written; nothing of the shard stays."""
    error = DataError("the fourth") if where == "autoencoder" else WriteError("no space")
    calls: list[int] = []

    def fails(call: int, images: torch.Tensor) -> None:
        if where == "autoencoder" and call == 2 * 3 + 2:
            raise error

    def full(writer: ShardWriter, data: bytes) -> None:
        calls.append(len(data))
        if where == "writer" and len(calls) == 30:
            raise error
        honest(writer, data)

    honest = ShardWriter._write
    monkeypatch.setattr(ShardWriter, "_write", full)
    with pytest.raises(type(error), match=str(error)) as kept:  # and with it the frames
        encode(settings(photos, tmp_path / "out"), Watched(small_autoencoder, fails))
    assert kept and not threads()
    assert [p.name for p in (tmp_path / "out").glob("*tar*")] == ["train-000000.tar"]
