"""The estimate of a training step's memory: the sizes of Karlo, and against a measured step."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from scripts import ROOT, load_script
from torch import Tensor, nn

from unclip.clip import CLIP, CLIPConfig
from unclip.config import load_config
from unclip.models.lora import LoRAConfig, add_lora
from unclip.models.unclip.prior import DiffusionPrior, PriorConfig
from unclip.training.dry_run import step_memory
from unclip.types import TextEncoding

FINE_TUNING = (
    "lora.rank=16",
    "data.batch_size=16",
    "fit.gradient_checkpointing=true",
)


def loss(prior: DiffusionPrior, batch: int) -> Tensor:
    """A loss of the prior for texts that fill all slots."""
    c = prior.config
    states = torch.randn(batch, c.context_length, c.text_width)
    mask = torch.ones(batch, c.context_length, dtype=torch.bool)
    text = TextEncoding(torch.randn(batch, c.emb_dim), states, mask)
    return prior(torch.randn(batch, c.emb_dim), torch.rand(batch), text).square().mean()


def test_karlos_prior_with_lora_fits_in_12_gb():
    pytest.importorskip("peft")
    training = load_script("prior").PriorTraining
    config = load_config(ROOT / "configs/karlo/prior.yaml", training, FINE_TUNING)
    clip_config = CLIPConfig(open_clip.get_model_config("ViT-L-14"))
    with torch.device("meta"):
        prior = DiffusionPrior(config.model)
        clip = CLIP(clip_config, tokenizer=lambda texts: None)
        add_lora(prior, config.lora)
        prior.gradient_checkpointing = config.fit.gradient_checkpointing
        memory = step_memory(
            prior, lambda: loss(prior, config.data.batch_size), frozen=[clip], ema=True
        )
        full = DiffusionPrior(config.model)
        with_all_weights = step_memory(full, lambda: loss(full, config.data.batch_size))
    assert memory["weights"] > 4.0e9 and 1.6e9 < memory["frozen networks"] < 1.8e9
    assert sum(memory.values()) < 12e9 < 20e9 < sum(with_all_weights.values())


def test_8_bit_state_takes_a_quarter():
    prior = DiffusionPrior(PriorConfig(8, 8, 4, 8, 1, 2))
    plain, small = (
        step_memory(prior, lambda: loss(prior, 1), optimizer=kind)["AdamW"]
        for kind in ("adamw", "adamw8bit")
    )
    assert plain == 4 * small


def measure(lora: bool, checkpointing: bool) -> None:
    """Print the estimate for a step, and how much a process grew in two steps."""
    torch.manual_seed(0)

    def build(width: int, depth: int) -> DiffusionPrior:
        prior = DiffusionPrior(PriorConfig(256, 256, 77, width, depth, 4))
        if lora:
            add_lora(prior, LoRAConfig(rank=8))
        prior.gradient_checkpointing = checkpointing
        return prior

    def train(prior: nn.Module, batch: int) -> None:
        optimizer = torch.optim.AdamW([p for p in prior.parameters() if p.requires_grad])
        for _ in range(2):
            loss(prior, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(build(32, 1), 1)  # loads the kernels
    before = own_memory("VmRSS")
    train(build(256, 8), 32)
    grown = own_memory("VmHWM") - before
    prior = build(256, 8)
    memory = step_memory(prior, lambda: loss(prior, 32), ema=False)
    print(json.dumps([sum(memory.values()), grown]))


def own_memory(kind: str) -> int:
    """Return the memory of this process in bytes; ru_maxrss would include that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s*(\d+) kB", status)[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("lora", "checkpointing"), [(False, False), (False, True), (True, False), (True, True)]
)
def test_the_estimate_is_that_of_a_measured_step(lora, checkpointing):
    pytest.importorskip("peft")
    code = (
        "import unclip.clip; from training.test_step_memory import measure; "
        f"measure({lora}, {checkpointing})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed memory is given back
        capture_output=True,
        text=True,
    )
    estimate, grown = json.loads(done.stdout.splitlines()[-1])
    assert estimate == pytest.approx(grown, rel=0.15), (estimate, grown)


if __name__ == "__main__":
    for arguments in ((False, False), (False, True), (True, False), (True, True)):
        measure(*arguments)
