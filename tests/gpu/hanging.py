"""A run whose device never finishes what it was given."""

import time

import torch

from latentddae.training.loop import Loop


def install() -> None:
    """Make the third step of a run of batches of 16 queue work for minutes, and wait for it."""
    honest = Loop.step

    def step(self: Loop, batch: object) -> None:
        honest(self, batch)
        if self.images == 48:
            if torch.cuda.is_available():
                torch.cuda._sleep(10**12)  # cycles of the device
                torch.cuda.synchronize()
            time.sleep(600)

    Loop.step = step
