"""MLPPrior: independent of padding and batch, saved, loaded and trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_clip
from parity import randomize
from scripts import ROOT, load_script

from unclip.checkpoints.store import load_component, save_component
from unclip.config import load_config
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.layers import DenoiserCache
from unclip.models.unclip.mlp_prior import MLPPrior, MLPPriorConfig, embedding_only
from unclip.training.losses import ConditionDropout, PriorLoss
from unclip.types import TextEncoding

CONFIG = MLPPriorConfig(16, 16, 9, 32, 2, 4, kind="mlp", mlp_width=24, mlp_depth=2)
B, D, L = 3, 16, 9


@pytest.fixture
def prior() -> MLPPrior:
    torch.manual_seed(0)
    return randomize(MLPPrior(CONFIG)).double().eval()


@pytest.fixture
def text() -> TextEncoding:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(L) < torch.tensor([9, 4, 1])[:, None]
    emb, states = (torch.randn(*s, generator=generator).double() for s in ((B, D), (B, L, 16)))
    return TextEncoding(emb, states, mask)


def noisy(rows: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, D, generator=generator).double(), torch.arange(rows) * 100


def test_padding_has_no_effect(prior, text):
    x_t, t = noisy()
    other = torch.where(text.mask[..., None], text.states, torch.ones_like(text.states))
    torch.testing.assert_close(
        prior(x_t, t, replace(text, states=other)), prior(x_t, t, text), rtol=0, atol=1e-12
    )
    short = TextEncoding(text.emb[1:2], text.states[1:2, :4], text.mask[1:2, :4])
    torch.testing.assert_close(
        prior(x_t[1:2], t[1:2], short), prior(x_t, t, text)[1:2], rtol=0, atol=1e-12
    )


def test_a_row_of_the_context_serves_several_embeddings(prior, text):
    x_t, t = noisy(2 * B)
    shared = prior.denoise(x_t, t, prior.condition(text))
    each = prior.denoise(x_t, t, prior.condition(text).repeat_interleave(2))
    torch.testing.assert_close(shared, each)


def test_the_null_replaces_a_dropped_text(prior, text):
    x_t, t = noisy()
    dropped = prior(x_t, t, text, torch.tensor([True, False, False]))
    null = prior.denoise(x_t, t, prior.condition(prior.null_text(B)))
    torch.testing.assert_close(dropped[0], null[0])
    torch.testing.assert_close(dropped[1:], prior(x_t, t, text)[1:])


def test_a_cached_step_equals_the_forward_pass(prior, text):
    x_t, _ = noisy()
    cached = prior.denoise(x_t, 700, prior.condition(text), DenoiserCache([900, 700]))
    torch.testing.assert_close(cached, prior(x_t, torch.full((B,), 700), text))


def test_it_is_saved_and_loaded(prior, text, tmp_path):
    save_component(prior.float(), tmp_path / "prior", schedule=ScheduleConfig())
    loaded = load_component(tmp_path / "prior")
    assert isinstance(loaded, MLPPrior) and loaded.config == CONFIG
    x_t, t = noisy()
    text = text.to(dtype=torch.float32)
    torch.testing.assert_close(loaded(x_t.float(), t, text), prior(x_t.float(), t, text))


def test_it_fits_a_batch_with_several_noises_per_embedding():
    torch.manual_seed(0)
    clip = tiny_clip().requires_grad_(False).eval()
    sizes = clip.emb_dim, clip.text_width, clip.context_length
    prior = MLPPrior(MLPPriorConfig(*sizes, 32, 1, 2, kind="mlp", mlp_width=64, mlp_depth=2))
    batch = {"image_emb": torch.randn(2, clip.emb_dim), "caption": ["a red apple", "a fish"]}
    prior.set_stats(torch.zeros(clip.emb_dim), torch.ones(clip.emb_dim))
    loss_fn = PriorLoss(prior, clip, Schedule(), ConditionDropout(0.1), LossConfig(), noises=16)
    optimizer, losses = torch.optim.Adam(prior.parameters(), 3e-3), []
    for _ in range(150):
        losses.append(loss_fn(prior, batch)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.4 * losses[0]


def test_embedding_noise_is_added_in_training_only():
    torch.manual_seed(0)
    clip = tiny_clip().requires_grad_(False).eval()
    sizes = clip.emb_dim, clip.text_width, clip.context_length
    prior = MLPPrior(MLPPriorConfig(*sizes, 32, 1, 2, kind="mlp"))
    prior.set_stats(torch.zeros(clip.emb_dim), torch.ones(clip.emb_dim))
    batch = {"image_emb": torch.zeros(64, clip.emb_dim), "caption": ["a fish"] * 64}
    loss_fn = PriorLoss(prior, clip, Schedule(), ConditionDropout(0.0), LossConfig(), emb_noise=0.5)
    assert loss_fn(prior, batch)["mse"].item() == pytest.approx(0.25, rel=0.2)  # its output is zero
    prior.eval()
    assert loss_fn(prior, batch)["mse"].item() == 0


def test_text_states_can_be_ignored(text):
    prior = randomize(MLPPrior(replace(CONFIG, text_states=False))).double().eval()
    x_t, t = noisy()
    expected, drop = prior(x_t, t, text), torch.tensor([True, False, False])
    others = replace(text, states=text.states + 1, mask=~text.mask)
    torch.testing.assert_close(prior(x_t, t, others), expected, rtol=0, atol=0)
    torch.testing.assert_close(prior(x_t, t, embedding_only(text.emb, 16)), expected)
    null = prior.denoise(x_t, t, prior.condition(prior.null_text(B)))
    torch.testing.assert_close(prior(x_t, t, text, drop)[0], null[0])
    assert (prior(x_t, t, replace(text, emb=text.emb + 1)) - expected).abs().min() > 1e-6


def test_precomputed_text_embeddings_replace_the_text_tower(monkeypatch):
    torch.manual_seed(0)
    clip = tiny_clip().requires_grad_(False).eval()
    sizes, captions = (
        (clip.emb_dim, clip.text_width, clip.context_length),
        ["a fish", "a red apple"],
    )
    config = MLPPriorConfig(*sizes, 32, 1, 2, kind="mlp", text_states=False)
    prior = randomize(MLPPrior(config))
    loss_fn = PriorLoss(
        prior, clip, Schedule(), ConditionDropout(0.5), LossConfig(), text_noise=0.1
    )
    batch = {"image_emb": torch.randn(2, clip.emb_dim), "caption": captions}

    def loss(batch):
        torch.manual_seed(0)
        return loss_fn(prior, batch)["mse"].item()

    expected = loss(batch)
    batch["text_emb"] = clip.encode_text(captions).emb
    monkeypatch.setattr(clip, "encode_text", None)
    assert loss(batch) == pytest.approx(expected, rel=1e-5)
    assert loss(batch | {"text_emb": batch["text_emb"] + 1}) != pytest.approx(expected, rel=1e-3)
    unused = {name for name, p in prior.named_parameters() if not p.requires_grad}
    assert unused == {"state_proj.weight", "state_proj.bias", "null_state"}


def test_invalid_sizes_are_errors():
    with pytest.raises(ValueError, match="mlp_depth is 0; expected at least 1"):
        replace(CONFIG, mlp_depth=0)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.mlp_depth=0", "--set model.mlp_depth=0: model.mlp_depth is 0; expected at least 1"),
        ("model.kind=other", "--set model.kind=other: model.kind is 'other'; expected 'mlp'"),
    ],
)
def test_config_errors_are_those_of_the_kind(setting, expected):
    schema = load_script("prior").PriorTraining
    with pytest.raises(ValueError) as error:
        load_config(ROOT / "configs/emoji/prior.yaml", schema, [setting])
    assert str(error.value) == expected
