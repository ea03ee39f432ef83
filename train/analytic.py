"""Measure the error of a prior at each noise level, for the sampler "analytic" (unCLIP, table 3).

    python train/analytic.py --prior runs/tiny/prior/model --clip runs/tiny/clip/model \\
        --data data/tiny

The errors are written to the schedule.json of the prior. From them, Analytic-DPM (2201.06503,
2206.07309) computes the optimal variance of each step.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unclip.checkpoints.folders import SCHEDULE_FILE
from unclip.checkpoints.store import load_as, load_schedule
from unclip.clip import CLIP
from unclip.config import save_json
from unclip.data.loader import Batch, DataConfig
from unclip.diffusion.samplers import threshold
from unclip.diffusion.schedules import Schedule
from unclip.files import exit_on_error
from unclip.models.unclip.mlp_prior import MLPPrior
from unclip.models.unclip.prior import DiffusionPrior
from unclip.pipelines.request import check_count
from unclip.pipelines.runtime import find_device
from unclip.training.embedded import open_loader
from unclip.training.initialization import load_clip
from unclip.training.losses import image_embeddings

# P timesteps, B batch, D embedding width


@torch.inference_mode()
def measure_errors(
    prior: DiffusionPrior | MLPPrior, clip: CLIP, schedule: Schedule, batch: Batch, points: int
) -> Tensor:
    """Return the mean squared error of the predicted x_0 at P = points timesteps, (P,)."""
    x_0 = prior.normalize(image_embeddings(clip, batch))  # (B, D)
    context = prior.condition(clip.encode_captions(batch["caption"]))
    errors = []
    for t in np.linspace(0, schedule.num_timesteps - 1, points).round().astype(int).tolist():
        at = torch.full((len(x_0),), t, device=x_0.device)
        x_t = schedule.add_noise(x_0, torch.randn_like(x_0), at)
        predicted = threshold(prior.denoise(x_t, at, context), prior.x0_limit)
        errors.append((predicted - x_0).square().mean())
    return torch.stack(errors)


def main(args: argparse.Namespace) -> None:
    check_count("--batches", args.batches)
    check_count("--points", args.points)
    kinds, device = (DiffusionPrior, MLPPrior), find_device(args.device)
    prior = load_as(args.prior, kinds, "a diffusion prior of train/prior.py", device=device)
    config, clip = load_schedule(args.prior), load_clip(args.clip, prior.config, device)
    data = DataConfig(args.data, clip.image_size, args.batch_size)
    loader = open_loader(data, clip, embed_once=False)
    torch.manual_seed(0)
    schedule, count = Schedule(config), min(args.batches, len(loader))  # at most an epoch
    batches = tqdm(islice(loader, count), total=count)
    found = [measure_errors(prior, clip, schedule, batch, args.points) for batch in batches]
    errors = tuple(round(error, 5) for error in torch.stack(found).mean(dim=0).tolist())
    save_json(replace(config, x0_errors=errors), Path(args.prior) / SCHEDULE_FILE)
    print(f"{args.prior}: {min(errors):.3f} to {max(errors):.3f}, on {count} batches")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prior", required=True, metavar="FOLDER", help="the trained prior")
    add("--clip", required=True, metavar="FOLDER", help="its CLIP")
    add("--data", required=True, metavar="DATA", help="captioned images, or embeddings")
    add("--batches", type=int, default=50, metavar="N", help="default: %(default)s")
    add("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--points", type=int, default=50, metavar="N", help="timesteps (default: %(default)s)")
    add("--device", default="cpu", help="default: %(default)s")
    with exit_on_error():
        main(parser.parse_args())
