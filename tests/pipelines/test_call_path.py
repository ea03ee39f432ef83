"""The path of one prompt: how many of our files a call touches, and how deep the U-Net lies."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import unclip
import unclip._deprecated
from unclip.models.unet import UNet
from unclip.pipelines import memory
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

PACKAGE = str(Path(unclip.__file__).parent)
MAX_FILES = 18
NEW_LOCALS = 0x2  # flag of functions; the bodies of modules and classes do not have it


def trace(pipe: UnCLIPPipeline) -> tuple[set[str], list[str]]:
    """Return the files whose functions a call runs, and the stack at the decoder's first U-Net."""
    files: set[str] = set()
    stack: list[str] = []
    unet = pipe.decoder.unet

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if not code.co_flags & NEW_LOCALS or code.co_filename == unclip._deprecated.__file__:
            return  # a module, a class, or the import hook, as libraries import late
        files.add(code.co_filename)
        if code is UNet.forward.__code__ and frame.f_locals["self"] is unet and not stack:
            at: FrameType | None = frame
            while at is not None and not stack[:1] == [UnCLIPPipeline.__call__.__qualname__]:
                if at.f_code.co_filename.startswith(PACKAGE):
                    stack.insert(0, at.f_code.co_qualname)
                at = at.f_back

    sys.setprofile(profile)
    try:
        pipe("a red apple", seed=0, progress=False)
    finally:
        sys.setprofile(None)
    return files, stack


def test_the_path_from_a_prompt_to_the_unet_is_short(tiny_pipe, monkeypatch):
    monkeypatch.setattr(memory, "enabled", False)  # the default; other tests run the command line
    pipe = UnCLIPPipeline(
        tiny_pipe.clip, tiny_pipe.prior, tiny_pipe.decoder, tiny_pipe.upsamplers, tiny_pipe.options
    )
    tiny_pipe("a red apple", progress=False)  # libraries import modules in the first call
    files, stack = trace(pipe)
    assert stack[0] == "UnCLIPPipeline.__call__" and stack[-1] == "UNet.forward"
    assert len(stack) <= 7, stack
    assert len(files) <= MAX_FILES, sorted(files)
