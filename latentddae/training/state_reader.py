"""Reading a resume state: any range of any parameter, whatever ranks and ZeRO stage wrote it."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from latentddae.core import dist
from latentddae.core.errors import DataError
from latentddae.training.checksums import checksums, named_sums
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine
from latentddae.training.states import NON_TRAINABLE, Partitions, State, partitions


class StateReader:
    """Reads any range of any parameter out of a state, whatever ranks wrote it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        self._non_trainable: dict[str, tuple[_File, str]] = {}
        for file_name in state.info["files"]:
            file: _File = safe_open(state.path / file_name, "pt")
            for key in file.keys():
                kind, start, name = key.split("/", 2)
                if kind == NON_TRAINABLE:
                    self._non_trainable[name] = file, key
                    continue
                low, length = int(start), file.get_slice(key).get_shape()[0]
                piece = _Piece(low, low + length, file, key)
                self._pieces.setdefault((kind, name), []).append(piece)

    @property
    def kinds(self) -> set[str]:
        """What is stored of every parameter: "master", the optimizer's states, the averages."""
        return {kind for kind, _ in self._pieces}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the trainable parameters, in the model's order."""
        return {name: tuple(shape) for name, shape in self.state.info["shapes"].items()}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter: (numel,) float32."""
        out = torch.empty(numel)
        filled = 0
        for piece in self._pieces.get((kind, name), []):
            low, high = max(piece.start, start), min(piece.end, start + numel)
            if low < high:
                stored = piece.file.get_slice(piece.key)
                out[low - start : high - start] = stored[low - piece.start : high - piece.start]
                filled += high - low
        if filled != numel:
            raise DataError(
                f"{self.state.path}: {kind} of {name} has {filled} of {numel} elements "
                f"from {start} on"
            )
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter, any shape (its own), float32."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).reshape(shape)

    def non_trainable_state(self) -> dict[str, Tensor]:
        """Frozen parameters and persistent buffers by name, in their own shape and dtype."""
        return {name: file.get_tensor(key) for name, (file, key) in self._non_trainable.items()}

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of one kind, any shape (its own), in the model's order."""
        for name in self.shapes:
            yield name, self.whole(kind, name)


@torch.no_grad()
def load(state: State, engine: Engine, ema: Ema) -> None:
    """Fill the engine's masters, the optimizer's state and the EMA from a state of any world size.

    A collective. Raises DataError naming a parameter whose checksum is not the stored one.
    """
    reader, values = StateReader(state), partitions(engine, ema)
    for kind, flat in values.items():
        for fragment in (f for f in engine.fragments if f.is_in(flat)):
            piece = reader.read(kind, fragment.name, fragment.start, fragment.numel)
            fragment.of(flat).copy_(piece)
    engine.optimizer_steps = int(state.info["optimizer_steps"])
    engine.load_non_trainable_state(reader.non_trainable_state())
    _compare_checksums(state, engine, values)
    engine.broadcast_masters()


def _compare_checksums(state: State, engine: Engine, values: Partitions) -> None:
    names = list(engine.shapes)
    tables = dist.gather_objects(checksums(names, engine.fragments, values))
    stored = state.info["checksums"]
    for kind, sums in named_sums(list(values), names, tables).items():
        for name, value in sums.items():
            if stored[kind].get(name) != value:
                raise DataError(f"{state.path}: {kind} of {name} is not what was saved")


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...

    def __getitem__(self, item: slice) -> Tensor: ...


class _File(Protocol):
    """An open safetensors file, as far as it is used here."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _Slice: ...

    def get_tensor(self, name: str) -> Tensor: ...


class _Piece(NamedTuple):
    """Elements [start, end) of a flattened parameter, and where they are stored."""

    start: int
    end: int
    file: _File
    key: str
