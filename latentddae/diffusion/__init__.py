"""Objectives: one frozen record each, all with the methods of diffusion/objective.py."""

from collections.abc import Callable
from typing import Any

from latentddae.diffusion.flow import Flow

OBJECTIVES: dict[str, Callable[..., Any]] = {"flow": Flow}

__all__ = ["OBJECTIVES", "Flow"]
