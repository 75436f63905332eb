"""Objectives: one frozen record each, all with the methods of diffusion/objective.py."""

from collections.abc import Callable
from typing import Any

from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.edm import EDM
from latentddae.diffusion.flow import Flow
from latentddae.diffusion.objective import Objective

OBJECTIVES: dict[str, Callable[..., Any]] = {"ddpm": DDPM, "edm": EDM, "flow": Flow}

__all__ = ["DDPM", "EDM", "OBJECTIVES", "Flow", "Objective"]
