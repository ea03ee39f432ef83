"""Speed of a data loader: images per second, and the time that a training step waits for data."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

from unclip.data.loader import DataConfig, Loader

WARM_UP = 2  # batches, which start the workers


@dataclass(frozen=True)
class LoaderSpeed:
    workers: int
    images_per_second: float
    wait: float  # seconds, mean over steps


def measure(
    config: DataConfig, workers: int, batches: int, step_seconds: float = 0.0
) -> LoaderSpeed:
    """Load batches with a number of worker processes; each step lasts `step_seconds`.

    With `step_seconds` 0, the loader runs at full speed.
    """
    loader = Loader(replace(config, workers=workers))
    stream = itertools.chain.from_iterable(itertools.repeat(loader))  # endless epochs
    for _ in itertools.islice(stream, WARM_UP):
        time.sleep(step_seconds)
    waited, images, start = 0.0, 0, time.perf_counter()
    for _ in range(batches):
        before = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - before
        images += len(batch["key"])
        time.sleep(step_seconds)
    return LoaderSpeed(workers, images / (time.perf_counter() - start), waited / batches)
