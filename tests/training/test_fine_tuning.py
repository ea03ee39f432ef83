"""Fine-tuning the bundled model: an adapter learns a style that the model has not seen."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import torch
from scripts import ROOT, run_script
from torch import Tensor
from torch.nn.functional import cosine_similarity

import unclip
from unclip.data.emoji import find_emoji, render
from unclip.data.folder import FolderDataset

SHARED = ROOT.parent / "shared/data"
TRAINED, HELD_OUT = 200, 60  # images
OTHERS = ("noto", "twemoji", "blob")  # styles of the bundled model


def write_fxemoji(work: Path) -> tuple[Path, list[str]]:
    """Write the training images of FxEmoji and held-out ones; return the names of all."""
    for archive in ("iconify", "svgmoji"):
        if not (SHARED / f"{archive}.tar.xz").is_file():
            pytest.skip(f"{SHARED} has no {archive}.tar.xz")
        with tarfile.open(SHARED / f"{archive}.tar.xz") as tar:
            wanted = ("fxemoji/icons.json", "svgmoji/emoji.json", "svgmoji__noto/svg/1F34E.svg")
            tar.extractall(work, [m for m in tar if m.name.endswith(wanted)], filter="data")
    checkout = next(work.rglob("packages")).parent
    found, _ = find_emoji(checkout, f"fxemoji={work / 'fxemoji'}")
    chosen = [e for e in found if e.style == "fxemoji" and e.entry.get("group") not in (None, 9)]
    chosen = chosen[: TRAINED + HELD_OUT]
    for i, emoji in enumerate(chosen):
        folder = work / ("data/style" if i < TRAINED else "data/held_out")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03}.png").write_bytes(render(emoji.svg, 64))
        name = emoji.entry["annotation"]
        (folder / f"{i:03}.txt").write_text(f"{name}, fxemoji emoji", encoding="utf-8")
    return work, [emoji.entry["annotation"] for emoji in chosen]


def embeddings(pipe: unclip.UnCLIPPipeline, prompts: list[str]) -> Tensor:
    """Sample an embedding of each prompt, always with the same noise."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe.sample_prior(pipe.encode_text(prompts), generators=generators, candidates=1)


@pytest.mark.nightly
def test_a_lora_of_the_prior_learns_a_style_and_keeps_the_rest(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("resvg_py")
    work, names = write_fxemoji(tmp_path)
    monkeypatch.chdir(work)
    (work / "assets").symlink_to(ROOT / "assets")
    if not os.environ.get("LORA"):  # the folder of a trained adapter
        run_script(
            ROOT / "train/prior.py",
            *("--config", str(ROOT / "configs/finetune/prior.yaml"), "--set", "fit.steps=300"),
        )
    pipe = unclip.load("emoji")
    held_out = FolderDataset(work / "data/held_out")
    true = pipe.encode_image([sample.image for sample in held_out])
    new = [sample.captions[0] for sample in held_out]
    old = [f"{name}, {style} emoji" for style in OTHERS for name in names[TRAINED::3]]
    before = [embeddings(pipe, prompts) for prompts in (new, old)]
    pipe.load_lora(os.environ.get("LORA", "runs/finetune/prior/model"))
    after = [embeddings(pipe, prompts) for prompts in (new, old)]

    closer = cosine_similarity(after[0], true) - cosine_similarity(before[0], true)
    moved, kept = (cosine_similarity(a, b).mean() for a, b in zip(after, before, strict=True))
    print(
        f"cosine to true embeddings of unseen images of the style: "
        f"{cosine_similarity(before[0], true).mean():.3f} before, "
        f"{cosine_similarity(after[0], true).mean():.3f} after; "
        f"before to after: {moved:.3f} for the style, {kept:.3f} for others"
    )
    # Measured: 0.570 to 0.594. A prior that knew three styles went from 0.503 to 0.557.
    assert closer.mean() > 0.015 and cosine_similarity(after[0], true).mean() > 0.58
    assert kept > 0.8 and kept > moved + 0.03
