"""Losses of the priors without diffusion, and embeddings computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CONTEXT, EMB_DIM, TEXT_WIDTH, tiny_clip
from scripts import write_shape_images

from unclip.data.loader import Augment, DataConfig, Loader
from unclip.embeddings import normalise
from unclip.models.unclip.ar_prior import ARPrior, ARPriorConfig
from unclip.models.unclip.one_shot_prior import OneShotPrior, OneShotPriorConfig
from unclip.training.embedded import EmbeddedLoader, embedding_pairs, open_loader, open_loaders
from unclip.training.launch import Run
from unclip.training.losses import (
    ARPriorLoss,
    ConditionDropout,
    OneShotLossConfig,
    OneShotPriorLoss,
)

SIZES = (EMB_DIM, TEXT_WIDTH, CONTEXT, 32, 2, 2)
K, V = 4, 8


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return tiny_clip().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shape_images(folder, size=16)
    return folder


def data(path: Path, **changes) -> DataConfig:
    return DataConfig(**{"path": str(path), "image_size": 16, "batch_size": 4, **changes})


@pytest.fixture
def batch(clip, images):
    return next(iter(EmbeddedLoader(Loader(data(images, batch_size=12)), clip)))


def ar_prior(clip, batch) -> ARPrior:
    torch.manual_seed(0)
    prior = ARPrior(ARPriorConfig(*SIZES, components=K, buckets=V))
    prior.fit(batch["image_emb"], clip.encode_text(batch["caption"]).emb)
    return prior


def one_shot_prior(batch, query: str = "learned") -> OneShotPrior:
    torch.manual_seed(0)
    prior = OneShotPrior(OneShotPriorConfig(*SIZES, query=query))
    prior.set_stats(batch["image_emb"].mean(0), batch["image_emb"].std(0))
    return prior


def train(model, loss_fn, batch, steps: int = 150) -> tuple[float, float]:
    """Train on one batch and return the first loss and the mean of the last ten."""
    torch.manual_seed(0)
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(steps):
        loss = loss_fn(model, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10


def test_the_autoregressive_prior_learns_the_codes_of_captions(clip, batch):
    prior = ar_prior(clip, batch)
    first, last = train(prior, ARPriorLoss(prior, clip, ConditionDropout(text=0.0)), batch)
    assert first == pytest.approx(torch.tensor(V).log().item(), abs=1e-4) and last < 0.3 * first
    prior.eval()
    with torch.no_grad():
        prefix = prior.condition(clip.encode_text(batch["caption"]))
    generators = [torch.Generator().manual_seed(k) for k in range(12)]
    emb = prior.sample(
        prefix, generators, lambda x: x, temperature=0
    )  # conditioned on sampled dot products
    distances = torch.cdist(emb, batch["image_emb"])
    assert distances.diagonal().mean() < 0.9 * distances.mean()  # 0.62 to 0.83 for six seeds


def test_the_autoregressive_loss_passes_codes_dot_product_and_drops(clip, batch):
    prior, calls = ar_prior(clip, batch), []

    def model(codes, dot, text, drop):
        calls.append((codes, dot, text, drop))
        return torch.zeros(*codes.shape, V)

    loss = ARPriorLoss(prior, clip, ConditionDropout(text=0.5))
    torch.manual_seed(0)
    assert loss(model, batch)["loss"].item() == pytest.approx(torch.tensor(V).log().item())
    codes, dot, text, drop = calls[0]
    assert (
        torch.equal(codes, prior.codes.encode(batch["image_emb"])) and drop.any() and not drop.all()
    )
    assert torch.equal(dot, prior.codes.encode_dot(batch["image_emb"], text.emb))


def test_the_dot_product_uses_the_caption_even_if_it_is_dropped(clip, batch):
    prior, calls = (
        ARPrior(ARPriorConfig(*SIZES, null_text="empty_prompt", components=K, buckets=V)),
        [],
    )
    prior.fit(batch["image_emb"], clip.encode_text(batch["caption"]).emb)

    def model(codes, dot, text, drop):
        calls.append((dot, text))
        return torch.zeros(*codes.shape, V)

    ARPriorLoss(prior, clip, ConditionDropout(text=0.9999))(model, batch)
    dot, text = calls[0]
    torch.testing.assert_close(text.emb, clip.encode_text([""] * 12).emb)
    assert torch.equal(
        dot, prior.codes.encode_dot(batch["image_emb"], clip.encode_text(batch["caption"]).emb)
    )


@pytest.mark.parametrize("query", ["learned", "noise"])
def test_the_one_shot_prior_learns_the_embedding_of_a_caption(clip, batch, query):
    prior = one_shot_prior(batch, query)
    first, last = train(
        prior,
        OneShotPriorLoss(prior, clip, ConditionDropout(text=0.0), OneShotLossConfig(0.0)),
        batch,
    )
    assert last < 0.3 * first


def test_the_contrastive_loss_excludes_dropped_captions(clip, batch):
    prior = one_shot_prior(batch)
    predicted, dropped = torch.randn(12, EMB_DIM), []

    def model(text, noise, drop):
        dropped.append(drop)
        return predicted

    torch.manual_seed(0)
    terms = OneShotPriorLoss(prior, clip, ConditionDropout(text=0.5), OneShotLossConfig(0.2))(
        model, batch
    )
    text_emb = clip.encode_text(batch["caption"]).emb
    image_emb = normalise(predicted * prior.emb_std + prior.emb_mean)
    logits = clip.logit_scale.exp() * image_emb @ normalise(text_emb).T
    kept = [row for row in range(12) if not dropped[0][row]]
    expected = -torch.stack(
        [logits[row, kept].log_softmax(dim=0)[i] for i, row in enumerate(kept)]
    ).mean()
    mse = F.mse_loss(predicted, (batch["image_emb"] - prior.emb_mean) / prior.emb_std)
    torch.testing.assert_close(terms["contrastive"], expected)
    torch.testing.assert_close(terms["loss"], mse + 0.2 * expected)
    assert 0 < len(kept) < 12

    prior = OneShotPrior(replace(prior.config, null_text="empty_prompt"))
    prior.set_stats(batch["image_emb"].mean(0), batch["image_emb"].std(0))
    torch.manual_seed(0)
    others = OneShotPriorLoss(prior, clip, ConditionDropout(text=0.5), OneShotLossConfig(0.2))(
        model, batch
    )
    assert dropped[1] is None
    torch.testing.assert_close(others["contrastive"], expected)
    with pytest.raises(ValueError, match="contrastive is -1"):
        OneShotLossConfig(-1)


# -- embeddings computed once


def test_embedded_batches_equal_those_of_the_loader(clip, images):
    loader, embedded = Loader(data(images)), EmbeddedLoader(Loader(data(images)), clip)
    assert len(loader) == len(embedded) == 3
    for _ in range(2):
        for expected, batch in zip(loader, embedded, strict=True):
            assert (expected["key"], expected["caption"]) == (batch["key"], batch["caption"])
            torch.testing.assert_close(
                batch["image_emb"], clip.encode_image(expected["image"]), rtol=0, atol=1e-5
            )


def test_a_resumed_embedded_loader_gives_the_same_bits(clip, images):
    whole = EmbeddedLoader(Loader(data(images)), clip)
    batches = list(whole)
    resumed = EmbeddedLoader(Loader(data(images)), clip)
    resumed.load_state_dict({"epoch": 0, "batch": 2})
    (last,) = list(resumed)
    assert (
        torch.equal(last["image_emb"], batches[2]["image_emb"])
        and resumed.state_dict() == whole.state_dict()
    )


def test_embedding_pairs_keep_the_position_of_the_loader(clip, images):
    for loader in (Loader(data(images)), EmbeddedLoader(Loader(data(images)), clip)):
        image_emb, text_emb = embedding_pairs(clip, loader, 2)
        assert image_emb.shape == text_emb.shape == (8, EMB_DIM)
        first = next(iter(loader))
        torch.testing.assert_close(text_emb[:4], clip.encode_text(first["caption"]).emb)


def test_a_non_finite_embedding_is_reported(clip, images):
    embedded = EmbeddedLoader(Loader(data(images)), clip)
    embedded.image_emb["7"][3] = torch.nan
    with pytest.raises(ValueError, match="the image embedding of 7 is not finite"):
        embedding_pairs(clip, embedded, 3)


def test_augmented_images_cannot_be_embedded_once(clip, images):
    with pytest.raises(ValueError, match="images are augmented or cropped"):
        open_loader(data(images, augment=Augment(shift=0.1)), clip, embed_once=True)
    assert isinstance(
        open_loader(data(images, augment=Augment(shift=0.1)), clip, embed_once=False), Loader
    )


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_dry_run_embeds_neither_training_nor_validation_images(clip, images, dry_run):
    config = SimpleNamespace(data=data(images), val_data=data(images), embed_once=True)
    loaders = open_loaders(Run(config, dry_run=dry_run), clip)
    assert [isinstance(loader, EmbeddedLoader) for loader in loaders] == [not dry_run] * 2


def test_duplicate_keys_are_rejected(clip, images, monkeypatch):
    loader = Loader(data(images))
    sample = type(loader.dataset).__getitem__
    monkeypatch.setattr(
        type(loader.dataset), "__getitem__", lambda self, i: _renamed(sample(self, i))
    )
    with pytest.raises(ValueError, match="several images have the same key"):
        EmbeddedLoader(loader, clip)


def _renamed(sample):
    return replace(sample, key="same")
