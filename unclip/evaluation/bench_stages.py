"""The process in which `unclip bench` times warm calls, stage by stage."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from unclip.evaluation.bench import PROMPT
from unclip.evaluation.commands import DTYPES
from unclip.pipelines import load
from unclip.pipelines.base import generators_from
from unclip.pipelines.unclip import UnCLIPPipeline

T = TypeVar("T")


def measure(pipe: UnCLIPPipeline, batch: int, repeat: int) -> dict[str, Any]:
    """Seconds of whole calls and of each stage, after one of each to warm up."""
    timer, options = Timer(pipe), pipe.options
    for seed in range(repeat + 1):
        timer("call", pipe, PROMPT, num_images=batch, seed=seed, progress=False)
    for seed in range(repeat + 1):
        generators = generators_from(range(seed, seed + batch))
        text = timer("text", pipe.encode_text, PROMPT)
        emb = timer("prior", pipe.sample_prior, text, num_images=batch, generators=generators)
        small = timer("decoder", pipe.decode, emb, text.repeat_interleave(batch), generators=generators)
        large = timer("upsampler", pipe.upsample, small, generators=generators)
    return {
        "seconds": {name: values[1:] for name, values in timer.seconds.items()},
        "steps": {
            "prior": options.prior.steps,
            "decoder": options.decoder.steps,
            "upsampler": sum(stage.steps for stage in options.upsamplers),
        },
        "size": large.shape[-1],
        "machine": {
            "gpu": torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else None,
            "device": str(pipe.device),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


class Timer:
    """Calls functions and keeps the seconds until the device is done, in lists by name."""

    def __init__(self, pipe: UnCLIPPipeline) -> None:
        self.device = pipe.device
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
        start = time.perf_counter()
        result = function(*args, **options)
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        pipe = load(args.model, args.device, getattr(torch, DTYPES[args.dtype]) if args.dtype else None)
        args.out.write_text(json.dumps(measure(pipe, args.batch, args.repeat)), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
