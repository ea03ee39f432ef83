"""What the machine can do at best: convolutions and matrix products of good shapes, the best of many runs."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from unclip.evaluation.bench.clock import Clock
from unclip.pipelines.base import find_device

SECONDS, RUNS = 0.5, 3  # for each shape at least


def measure_peak(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of "convolution" and "matmul", with the shapes of Karlo's U-Nets."""
    batch = 64 if device.type == "cuda" else 1
    best = {"convolution": 0.0, "matmul": 0.0}
    for channels, side in ((320, 64), (640, 32)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(batch, channels, side, side, device=device).to(
                dtype, memory_format=memory_format
            )
            weight = torch.randn(channels, channels, 3, 3, device=device).to(
                dtype, memory_format=memory_format
            )
            flops = 2 * batch * 9 * (channels * side) ** 2
            rate = flops / _best(
                lambda x=x, weight=weight: F.conv2d(x, weight, padding=1), device, SECONDS / 2
            )
            best["convolution"] = max(best["convolution"], rate)
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best["matmul"] = 2 * n**3 / _best(lambda: F.linear(a, b), device, SECONDS)
    return best


@torch.inference_mode()
def _best(compute: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of all runs that fit into the time, or of a few, after one to warm up."""
    compute()
    times, end = [], time.perf_counter() + seconds
    while len(times) < RUNS or time.perf_counter() < end:
        clock = Clock(device)
        clock.wait()
        clock.mark()
        compute()
        clock.mark()
        times += clock.seconds()
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device")
    parser.add_argument("--dtype", required=True, help="as torch names it")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    peak = measure_peak(find_device(args.device), getattr(torch, args.dtype))
    args.out.write_text(json.dumps(peak), encoding="utf-8")


if __name__ == "__main__":
    main()
