import pytest
import torch
import torch.nn.functional as F
from conftest import EMB_DIM, tiny_clip, tiny_decoder, tiny_prior, tiny_upsampler

from unclip.data.corruption import CorruptionConfig
from unclip.diffusion.losses import LossConfig
from unclip.diffusion.schedules import Schedule
from unclip.models.unclip.prior import EmbeddingStats
from unclip.training.losses import CLIPLoss, ConditionDropout, DecoderLoss, PriorLoss, UpsamplerLoss

CAPTIONS = ["a red apple", "a blue fish", "a red fish", "a blue apple"]


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return tiny_clip().requires_grad_(False).eval()


def batch(size: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.rand(4, 3, size, size, generator=generator) * 2 - 1, "caption": CAPTIONS}


class Recorder(torch.nn.Module):
    """A network that records its inputs and returns zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.calls = channels, []

    def forward(self, x_t, t, *conditions):
        self.calls.append((x_t, t, *conditions))
        return x_t.new_zeros(x_t.shape[0], self.channels, *x_t.shape[2:])


def train(
    model: torch.nn.Module, loss_fn, data: dict, steps: int = 60, lr: float = 3e-3
) -> tuple[float, float]:
    """Train on one batch and return the mean losses of the first and last ten steps."""
    torch.manual_seed(0)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr), []
    for _ in range(steps):
        loss = loss_fn(model, data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


def test_clip_learns_to_match_four_pairs():
    torch.manual_seed(0)
    clip = tiny_clip()
    first, last = train(clip, CLIPLoss(clip), batch(16), steps=40)
    assert last < 0.3 * first


def test_prior_decoder_and_upsampler_learn_one_batch(clip):
    torch.manual_seed(0)
    prior, decoder, upsampler = tiny_prior(), tiny_decoder(), tiny_upsampler()
    prior.set_stats(torch.zeros(EMB_DIM), clip.encode_image(batch(8)["image"]).std(0))
    drop, loss, schedule = ConditionDropout(), LossConfig(), Schedule()
    first, last = train(prior, PriorLoss(prior, clip, schedule, drop, loss), batch(8))
    assert last < 0.5 * first
    first, last = train(decoder, DecoderLoss(decoder, clip, schedule, drop, loss), batch(8))
    assert last < 0.8 * first
    first, last = train(
        upsampler, UpsamplerLoss(upsampler, schedule, CorruptionConfig(), loss), batch(16)
    )
    assert last < 0.8 * first


def test_the_prior_predicts_the_normalised_embedding(clip):
    prior, recorder = tiny_prior(), Recorder(EMB_DIM)
    prior.set_stats(torch.full((EMB_DIM,), 0.5), torch.full((EMB_DIM,), 2.0))
    loss = PriorLoss(prior, clip, Schedule(), ConditionDropout(), LossConfig())(
        recorder, batch(16)
    )["loss"]
    x_0 = (clip.encode_image(batch(16)["image"]) - 0.5) / 2  # the recorder returns 0
    torch.testing.assert_close(loss, x_0.square().mean())


def test_precomputed_embeddings_give_the_same_loss(clip):
    prior, recorder = tiny_prior(), Recorder(EMB_DIM)
    loss_fn = PriorLoss(prior, clip, Schedule(), ConditionDropout(), LossConfig())
    emb = clip.encode_image(batch(16)["image"])
    a = loss_fn(recorder, batch(16))["loss"]
    b = loss_fn(recorder, {"image_emb": emb, "caption": CAPTIONS})["loss"]
    torch.testing.assert_close(a, b)


def test_images_and_captions_are_dropped_independently(clip):
    decoder, recorder = tiny_decoder(), Recorder(6)
    loss_fn = DecoderLoss(
        decoder, clip, Schedule(), ConditionDropout(text=0.5, image=0.1), LossConfig()
    )
    data = {"image": torch.zeros(512, 3, 8, 8), "caption": CAPTIONS * 128}
    torch.manual_seed(0)
    for _ in range(4):
        loss_fn(recorder, data)
    image = torch.cat([call[4] for call in recorder.calls]).float()
    text = torch.cat([call[5] for call in recorder.calls]).float()
    assert len(image) == 2048
    assert abs(image.mean() - 0.1) < 0.03 and abs(text.mean() - 0.5) < 0.05
    assert abs((image * text).mean() - 0.05) < 0.02  # unCLIP 2.1: both at once 5 % of the time


def test_noise_on_embeddings_has_the_given_deviation_in_each_dimension(clip):
    decoder, recorder, stats = tiny_decoder(), Recorder(6), EmbeddingStats(EMB_DIM)
    stats.set_stats(torch.zeros(EMB_DIM), torch.linspace(1, 4, EMB_DIM))
    schedule, drop = Schedule(), ConditionDropout(image=0.0)
    loss_fn = DecoderLoss(decoder, clip, schedule, drop, LossConfig(), emb_noise=0.5, stats=stats)
    emb, captions = torch.randn(4, EMB_DIM).repeat(500, 1), CAPTIONS * 500
    torch.manual_seed(0)
    loss_fn(recorder, {"image": torch.zeros(2000, 3, 8, 8), "image_emb": emb, "caption": captions})
    noise = recorder.calls[0][2] - emb
    expected = 0.5 * 3**-0.5 * stats.emb_std  # of a scale that is uniform in [0, 0.5]
    torch.testing.assert_close(noise.std(dim=0), expected, rtol=0.1, atol=0)


def test_the_empty_prompt_replaces_dropped_captions(clip):
    prior, recorder = tiny_prior(null_text="empty_prompt"), Recorder(EMB_DIM)
    PriorLoss(prior, clip, Schedule(), ConditionDropout(text=0.9999), LossConfig())(
        recorder, batch(16)
    )
    _, _, text, drop = recorder.calls[0]
    assert drop is None
    torch.testing.assert_close(text.emb, clip.encode_text([""] * 4).emb)


def test_the_upsampler_input_is_downsampled_and_corrupted(clip):
    upsampler, recorder, data = tiny_upsampler(low=8), Recorder(3), batch(16)
    UpsamplerLoss(upsampler, Schedule(), CorruptionConfig(kind="none"), LossConfig())(
        recorder, data
    )
    UpsamplerLoss(upsampler, Schedule(), CorruptionConfig(kind="blur"), LossConfig())(
        recorder, data
    )
    (_, _, plain), (_, _, blurred) = recorder.calls
    expected = F.interpolate(data["image"], (8, 8), mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(plain, expected)
    assert blurred.shape == plain.shape and blurred.std() < plain.std()


def test_frozen_networks_have_no_gradient(clip):
    decoder = tiny_decoder()
    DecoderLoss(decoder, clip, Schedule(), ConditionDropout(), LossConfig())(decoder, batch(8))[
        "loss"
    ].backward()
    assert all(p.grad is None for p in clip.parameters())
    assert decoder.unet.head.weight.grad.abs().sum() > 0


def test_invalid_drop_rates_are_rejected():
    with pytest.raises(ValueError, match="text is 1.5; expected at least 0 and less than 1"):
        ConditionDropout(text=1.5)


def test_trimmed_padding_does_not_change_the_output(clip):
    text = clip.encode_text(["a red apple", "fish"])
    short = text.trim()
    assert (
        short.states.shape[1]
        == short.mask.shape[1]
        == short.ids.shape[1]
        == int(text.mask.sum(1).max())
    )
    prior, decoder = tiny_prior(), tiny_decoder()
    for p in [*prior.parameters(), *decoder.parameters()]:
        torch.nn.init.normal_(
            p, std=0.2
        )  # heads are initialised to zero, which would hide a difference
    t, drop = torch.tensor([10, 900]), torch.tensor([True, False])
    x, emb = torch.randn(2, EMB_DIM), torch.randn(2, EMB_DIM)
    torch.testing.assert_close(prior(x, t, short, drop), prior(x, t, text, drop))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(
        decoder(x, t, emb, short, drop, drop), decoder(x, t, emb, text, drop, drop)
    )
