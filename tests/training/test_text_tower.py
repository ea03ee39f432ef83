"""Training of the text tower on image embeddings that do not change."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_clip

from unclip.training.text_tower import TextTower, TextTowerConfig, TextTowerLoss
from unclip.types import TextEncoding


@pytest.fixture
def base():
    torch.manual_seed(0)
    return tiny_clip().requires_grad_(False).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    return {"image": images, "caption": ["a red apple", "a blue fish", "a red fish", "a pear"]}


def train(base, batch, keep: float, steps: int = 30):
    network = TextTower(copy.deepcopy(base)).train()
    loss = TextTowerLoss(network, base, TextTowerConfig(base="", keep=keep))
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    terms = []
    for _ in range(steps):
        terms.append(loss(network, batch))
        optimizer.zero_grad()
        terms[-1]["loss"].backward()
        optimizer.step()
    return network, terms


def test_captions_are_learned_and_image_embeddings_do_not_change(base, batch):
    network, terms = train(base, batch, keep=0.0)
    assert terms[-1]["contrastive"] < 0.8 * terms[0]["contrastive"]
    before, after = base.encode_image(batch["image"]), network.clip.encode_image(batch["image"])
    assert torch.equal(before, after)
    assert terms[0]["distance"] == 0  # the tower starts unchanged


def test_encodings_of_captions_that_were_understood_are_kept(base, batch):
    base, _ = train(base, batch, keep=0.0, steps=60)  # now it retrieves the image of every caption
    base = base.clip.requires_grad_(False).eval()
    swapped = {**batch, "image": batch["image"].roll(1, dims=0)}
    text = base.encode_text(batch["caption"]).emb

    def moved(keep: float) -> float:
        known = {**batch, "image": batch["image"] + 0.05}  # nearly the same images
        network, _ = train(base, known, keep)
        return (network.clip.encode_text(batch["caption"]).emb - text).square().mean().item()

    assert moved(100.0) < 0.5 * moved(0.0)
    _, terms = train(base, swapped, keep=100.0)  # no caption retrieves its image
    assert terms[0]["distance"] == 0 and terms[-1]["contrastive"] < terms[0]["contrastive"]


def test_captions_are_matched_in_full_precision():
    image_emb = F.normalize(torch.ones(8) + 0.001 * torch.eye(8), dim=1)  # each nearest to itself
    emb = TextEncoding(image_emb, torch.zeros(8, 2, 4), torch.ones(8, 2, dtype=torch.bool))
    moved = replace(emb, emb=torch.cat([image_emb[:1], torch.eye(8)[1:]]))
    with torch.autocast("cpu", torch.bfloat16):
        distance = TextTowerLoss._distance(moved, emb, image_emb)
    expected = (moved.emb - emb.emb).square().sum(dim=1).mean()  # of all captions
    torch.testing.assert_close(distance, expected)
