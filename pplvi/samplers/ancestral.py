"""Ancestral draws: the model's own, with equal weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from pplvi.objectives.step import Step
from pplvi.programs.dreams import dream
from pplvi.samplers.base import Request
from pplvi.samplers.importance import step_of
from pplvi.types import Program


class Ancestral:
    """Ancestral sampling: the model dreams latents and data together, and the guide is scored on its dreams.

    One step of exact draws with equal weights, for the sleep phase (Hinton et al. 1995). Dreams reach the guide in the
    place of the data: through Pyro's ``observations=`` keyword, or for an argument that *is* an observed value.
    """

    proposal: ClassVar[str] = "model"

    def __call__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], request: Request
    ) -> Iterator[Step]:
        """Yield one step of ``request.num_particles`` dreams, each of the size of the data, in one call if possible."""
        counts = request.counts
        parts = [dream(model, guide, args, kwargs, count) for count in counts]
        runs = [run for together, _ in parts for run in together]
        log_target = torch.cat([run.log_target().detach() for run in runs])
        step = step_of(runs[0], log_target, torch.cat([log_forward for _, log_forward in parts]))
        yield replace(step, log_weight=torch.zeros_like(log_target))  # exact draws: equal weights
