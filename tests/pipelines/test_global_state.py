"""Images do not depend on torch's global state, which is what the caller made it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

import unclip


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "a default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_images_do_not_depend_on_it(state, tiny_pipe, tiny_dalle, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "model")

    def outputs():
        pipe = unclip.load(tmp_path / "model", "cpu")
        text = pipe.encode_text("a red apple")
        latent = pipe.random_latent(text.emb, seed=0)
        return [
            *pipe("a red apple", seed=0, progress=False).images,
            *tiny_dalle("a red apple", seed=0, progress=False).images,
            text.emb.numpy(),
            latent.image_emb.numpy(),
        ]

    expected = outputs()
    with state():
        found = outputs()
    for ours, wanted in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(wanted))


def test_it_is_restored(tiny_pipe):
    with default_dtype(torch.float64), torch.device("meta"), torch.autocast("cpu"):
        tiny_pipe("a red apple", progress=False)
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device().type == "meta" and torch.is_autocast_enabled("cpu")
