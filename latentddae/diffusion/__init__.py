"""Objectives: one frozen record each, all with the methods of `Objective`."""

from collections.abc import Callable

from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.edm import EDM
from latentddae.diffusion.flow import Flow
from latentddae.diffusion.objective import Objective

OBJECTIVES: dict[str, Callable[..., Objective]] = {"ddpm": DDPM, "edm": EDM, "flow": Flow}

__all__ = ["DDPM", "EDM", "OBJECTIVES", "Flow", "Objective"]
