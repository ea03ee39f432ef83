import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_clip

from unclip.clip import CLIP
from unclip.training.losses import CLIPLoss
from unclip.training.reconstruction import (
    ReconstructingCLIP,
    ReconstructingCLIPLoss,
    ReconstructionConfig,
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ReconstructingCLIP(tiny_clip(), ReconstructionConfig(size=4, width=64))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    return {"image": images, "caption": ["a red apple", "a blue fish", "a red fish", "a pear"]}


def test_the_loss_is_contrastive_plus_reconstruction(network, batch):
    network.eval()
    terms = ReconstructingCLIPLoss(network)(network, batch)
    clip = CLIPLoss(network.clip)(network.clip, batch)["loss"]
    emb = F.normalize(network.clip.encode_image(batch["image"]), dim=-1)
    error = F.mse_loss(network.head(emb), F.adaptive_avg_pool2d(batch["image"], 4))
    torch.testing.assert_close(terms["contrastive"], clip)
    torch.testing.assert_close(terms["loss"], clip + 10 * error)
    target = F.adaptive_avg_pool2d(batch["image"], 4)

    def perfect(*inputs):  # sharded networks return what autocast computes
        return *network(*inputs)[:3], target.bfloat16()

    error = F.mse_loss(target.bfloat16().float(), target)  # the target is not rounded
    mse = ReconstructingCLIPLoss(network)(perfect, batch)["mse"]
    torch.testing.assert_close(mse, error, rtol=1e-3, atol=0)


def test_both_terms_fall(network, batch):
    loss_fn = ReconstructingCLIPLoss(network)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    terms = []
    for _ in range(60):
        terms.append(loss_fn(network, batch))
        optimizer.zero_grad()
        terms[-1]["loss"].backward()
        optimizer.step()
    for name in ("contrastive", "mse"):
        assert terms[-1][name] < 0.5 * terms[0][name]


def test_embedding_noise_is_added_in_training_only(batch):
    torch.manual_seed(0)
    noisy = ReconstructingCLIP(tiny_clip(), ReconstructionConfig(size=4, width=64, emb_noise=0.5))
    loss_fn = ReconstructingCLIPLoss(noisy)
    assert loss_fn(noisy, batch)["mse"] != loss_fn(noisy, batch)["mse"]
    noisy.eval()
    assert loss_fn(noisy, batch)["mse"] == loss_fn(noisy, batch)["mse"]


def test_only_clip_is_saved(network, batch, tmp_path):
    network.save(tmp_path / "clip")
    clip = CLIP.from_pretrained(tmp_path / "clip")
    network.eval()
    with torch.no_grad():
        expected = network.clip.encode_image(batch["image"])
        torch.testing.assert_close(clip.encode_image(batch["image"]), expected)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"weight": -1.0}, {"emb_noise": float("nan")}])
def test_invalid_settings_are_errors(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is .*; expected"):
        ReconstructionConfig(**wrong)
