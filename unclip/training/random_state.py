"""The state of all global random generators of a process, as plain JSON types."""

from __future__ import annotations

import base64
import random
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """The generators of Python, NumPy, torch and this process's accelerator."""
    version, python, gauss = random.getstate()
    numpy = dict(np.random.get_state(legacy=False))
    device = _accelerator()
    return {
        "python": [version, list(python), gauss],
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": _encode(torch.get_rng_state()),
        "device": _encode(device.get_rng_state()) if device else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    numpy = state["numpy"]
    np.random.set_state(
        {**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], np.uint32)}}
    )
    torch.set_rng_state(_decode(state["torch"]))
    device = _accelerator()
    if device and state["device"]:
        device.set_rng_state(_decode(state["device"]))


def _accelerator() -> ModuleType | None:
    """torch.cuda or the like, if the machine has what this build of torch is for."""
    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
