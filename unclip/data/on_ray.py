"""Precomputation on a Ray cluster: Ray Data distributes the parts and restarts lost workers."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from unclip.data.parts import PartWriter, ShardParts
from unclip.data.precompute import Job, Load, complete, find_device, start
from unclip.data.text import ColumnNames
from unclip.extras import import_extra


class Worker:
    """An actor with the network of a job; called with the numbers of parts."""

    def __init__(self, options: Namespace, load: Load) -> None:
        compute, _ = load(options, find_device(options))
        writer = PartWriter(options.out)
        parts = ShardParts(options.data, ColumnNames(options.image, options.caption))
        self.job = Job(parts, compute, writer, options.batch_size)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for part in batch["part"]:
            self.job.run(int(part))
        return batch


def precompute_on_ray(options: Namespace, load: Load, settings_file: str) -> dict[str, str]:
    """Compute all parts that are not complete with `options.ray` workers; see `precompute`.

    Uses the cluster of RAY_ADDRESS, or starts Ray on this machine. A worker that is lost is
    restarted, and its part computed again. OUT must be a folder that all nodes share.
    """
    import_extra("ray.data", "ray", "--ray")
    import ray  # pyright: ignore[reportMissingImports]

    parts = ShardParts(options.data, ColumnNames(options.image, options.caption))
    _, settings = load(options, "cpu")
    writer = start(options.out, settings_file, {**parts.settings, **settings})
    todo = [n for n in range(len(parts)) if not complete(writer, n, options.verify)]
    if todo:
        gpus = 0 if find_device(options) == "cpu" else 1
        rows = ray.data.from_items([{"part": n} for n in todo], override_num_blocks=len(todo))
        workers = ray.data.ActorPoolStrategy(size=min(options.ray, len(todo)))
        computed = rows.map_batches(
            Worker,
            batch_size=1,
            compute=workers,
            fn_constructor_args=(options, load),
            num_gpus=gpus,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            computed.materialize()
        except ray.exceptions.RayError as error:
            reason = " ".join(str(getattr(error, "cause", None) or error).split())
            raise ValueError(f"a part failed on Ray: {reason[-500:]}") from None
    writer.write_manifest(len(parts))
    return {}
