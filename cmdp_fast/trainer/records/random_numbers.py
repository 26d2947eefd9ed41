"""The random numbers of a process: Python's, numpy's and PyTorch's, on the CPU and on the process's GPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the generators stand, as plain objects and tensors, which are read without running anything."""
    state = np.random.get_state(legacy=False)
    numbers = {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}
    states = {"python": random.getstate(), "numpy": numbers, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Any], device: torch.device) -> None:
    """Puts the generators to where `random_state` found them on such a device."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
