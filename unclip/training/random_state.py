"""The state of the global random generators as plain JSON."""

from __future__ import annotations

import base64
import random
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """Return the state of all global generators (Python, NumPy, torch, device) as plain JSON."""
    version, python, gauss = random.getstate()
    numpy = dict(np.random.get_state(legacy=False))
    device = _device_module()
    return {
        "python": [version, list(python), gauss],
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": _encode(torch.get_rng_state()),
        "device": _encode(device.get_rng_state()) if device else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the state that `random_state` returned."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(_decode(state["torch"]))
    device = _device_module()
    if device and state["device"]:
        device.set_rng_state(_decode(state["device"]))


def _device_module() -> ModuleType | None:
    """Return torch.cuda or the like; None if the machine has no accelerator."""
    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
