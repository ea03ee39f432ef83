"""DALLE2-pytorch's files load, and outputs match recordings of the original code."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from laion import (
    CLIP_NAMED,
    MASK,
    RECORDED,
    D,
    T,
    decoder_section,
    prior_section,
    state_of,
    write,
    write_clip,
)
from packaging.version import Version
from recorded import numbers, sampled
from torch import Tensor

import unclip
from unclip.checkpoints.dalle2_pytorch import load as dalle2_pytorch
from unclip.checkpoints.dalle2_pytorch.files import read_file, release_by_names, release_of
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.published.relative_prior import RelativePrior
from unclip.types import StageOptions, TextEncoding


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def close(output: Tensor, record: list[float]) -> None:
    torch.testing.assert_close(
        torch.tensor(sampled(output)), torch.tensor(record), atol=1e-5, rtol=1e-5
    )


# -- outputs of the original


@pytest.mark.parametrize("release", list(RECORDED["priors"]))
@pytest.mark.parametrize("has_version", [True, False])
def test_priors_match_the_original(release, has_version, tmp_path):
    has_version = (
        has_version or release == "1.8.4"
    )  # same tensor names as 1.0.2, another computation
    record = RECORDED["priors"][release]
    version, section = release if has_version else None, prior_section(record["net"])
    prior = unclip.load_prior(
        write(tmp_path / "prior.pth", state_of(record), version, prior=section)
    )
    assert prior.schedule == ScheduleConfig("cosine", 100)
    prior = prior.network
    assert isinstance(prior, RelativePrior)
    C = record["net"]["dim"]
    text = TextEncoding(numbers("emb", (2, C)), numbers("states", (2, 6, C)), MASK)
    x_t = numbers("x", (2, C))
    with torch.no_grad():
        close(prior(x_t, T, text), record["output"])
        if "null" in record:
            close(prior.denoise(x_t, T, prior.condition(prior.null_text(1))), record["null"])
        else:
            with pytest.raises(ValueError, match="cannot be guided"):
                prior.null_text(1)


@pytest.mark.parametrize("release", list(RECORDED["decoders"]))
@pytest.mark.parametrize("has_version", [True, False])
def test_decoders_match_the_original(release, has_version, tmp_path, clip_folder):
    record = RECORDED["decoders"][release]
    folder = tmp_path / "model"
    section = decoder_section(record["unet"], sample_timesteps=[20], use_dynamic_thres=True)
    write(
        folder / "decoder/latest.pth",
        state_of(record),
        release if has_version else None,
        decoder=section,
    )
    (folder / "clip").symlink_to(clip_folder)
    bundle = dalle2_pytorch.load_bundle(folder)
    assert list(bundle.components) == ["clip", "decoder"]
    assert bundle.schedules == {"decoder": ScheduleConfig("cosine", 100)}
    assert (
        bundle.options.decoder == StageOptions(20, 1.7, dynamic_threshold=0.95)
        and bundle.options.upsamplers == ()
    )
    decoder, drop = bundle.components["decoder"], torch.ones(2, dtype=torch.bool)
    text = TextEncoding(numbers("emb", (2, D)), numbers("states", (2, 6, D)), MASK)
    x_t, emb = numbers("picture", (2, 3, 8, 8)), numbers("image", (2, D))
    with torch.no_grad():
        close(decoder(x_t, T, emb, text), record["output"])
        close(decoder(x_t, T, emb, text, drop, drop), record["null"])


@pytest.mark.parametrize("release", list(RECORDED["upsamplers"]))
@pytest.mark.parametrize("has_version", [True, False])
def test_upsamplers_match_the_original(release, has_version, tmp_path, clip_folder):
    decoder, record = RECORDED["decoders"]["1.0.2"], RECORDED["upsamplers"][release]
    folder = tmp_path / "model"
    write(
        folder / "decoder/latest.pth",
        state_of(decoder),
        "1.0.2",
        decoder=decoder_section(decoder["unet"]),
    )
    section = decoder_section({"dim": 8}, record["unet"], learned_variance=[True, False])
    # Unused: the original creates nulls for every U-Net.
    spare = {"unets.1.null_text_embed": torch.zeros(1, 256, 12)}
    write(
        folder / "upsampler/x.pth",
        {**state_of(record), **spare},
        release if has_version else None,
        decoder=section,
    )
    (folder / "clip").symlink_to(clip_folder)
    bundle = dalle2_pytorch.load_bundle(folder)
    assert bundle.schedules["upsampler_0"] == ScheduleConfig("linear", 100)
    assert bundle.options.upsamplers == (StageOptions(64),)
    x_t, low_res = numbers("picture", (2, 3, 16, 16)), numbers("low", (2, 3, 8, 8))
    with torch.no_grad():
        close(bundle.components["upsampler_0"].denoise(x_t, T, low_res), record["output"])


# -- files


ALPHAS = "noise_scheduler.alphas_cumprod"


@pytest.fixture
def prior() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state and the configuration of a prior of release 1.15.6."""
    record = RECORDED["priors"]["1.15.6"]
    return state_of(record), prior_section(record["net"])


def test_ema_weights_of_the_trainer_are_loaded(prior, tmp_path):
    state, section = prior
    worse = {name: x + 1 for name, x in state.items()}
    averages = {
        "initted": torch.tensor(True),
        **{f"ema_model.{name}": x for name, x in state.items()},
    }
    averages |= {f"online_model.{name}": x for name, x in worse.items()}
    rest = {
        "optimizer": {"state": {}, "param_groups": []},
        "version": Version("1.15.6"),
        "step": torch.tensor([5]),
    }
    (tmp_path / "prior_config.json").write_text(json.dumps({"prior": section}))
    expected = write(tmp_path / "plain/prior.pth", state, "1.15.6", prior=section)
    for content in (
        {"model": worse, "ema_model": state},
        {"model": worse, "ema_model": {f"module.{name}": x for name, x in state.items()}},
        {"model": worse, "ema": averages},
        {"model": state},
    ):
        torch.save({**rest, **content}, tmp_path / "prior.pth")
        given, wanted = (
            unclip.load_prior(file).network.state_dict()
            for file in (tmp_path / "prior.pth", expected)
        )
        assert all(torch.equal(given[name], wanted[name]) for name in wanted)


def test_ema_unets_of_the_trainer_are_loaded(tmp_path):
    record = RECORDED["decoders"]["1.0.2"]
    state = state_of(record)
    averages = {name.replace("unets.0.", "0.ema_model."): x for name, x in state.items()}
    content = {
        "model": {name: x + 1 for name, x in state.items()},
        "ema": {"0.step": torch.tensor(3), **averages},
    }
    config = {"decoder": decoder_section(record["unet"])}
    torch.save(
        {**content, "version": "1.0.2", "config": config, "steps": torch.tensor([3])},
        tmp_path / "decoder.pth",
    )
    found = read_file(tmp_path / "decoder.pth", "decoder")
    assert found.release == (1, 0, 2)
    assert found.state.keys() == state.keys() and all(
        torch.equal(found.state[name], state[name]) for name in state
    )


def test_releases_are_parsed_and_inferred():
    assert release_of("1.15.6") == (1, 15, 6) and release_of("0.16.2rc1") == (0, 16, 2)
    assert release_of(None) is None and release_of("unknown") is None and release_of(7) is None
    found = {
        r: release_by_names(record["shapes"], "prior") for r, record in RECORDED["priors"].items()
    }
    earlier = {"0.15.4": (0, 15, 4), "0.16.2": (0, 22, 1), "1.0.2": (0, 26, 1), "1.8.4": (0, 26, 1)}
    assert found == {**earlier, "1.15.6": (1, 15, 6)}
    found = {
        r: release_by_names(record["shapes"], "decoder")
        for r, record in RECORDED["decoders"].items()
    }
    assert found == {"0.15.4": (0, 15, 4), "1.0.2": (0, 26, 1), "1.15.6": (1, 15, 6)}


def test_the_best_checkpoint_of_a_folder_is_selected(prior, tmp_path):
    state, section = prior
    write(
        tmp_path / "prior/latest.pth",
        {name: x + 1 for name, x in state.items()},
        None,
        prior=section,
    )
    best = write(tmp_path / "prior/best.pth", state, None, prior=section)
    for path in (tmp_path, tmp_path / "prior", best):
        assert torch.equal(unclip.load_prior(path).network.query, state["net.learned_query"])
    best.rename(tmp_path / "prior/a.pth")
    (tmp_path / "prior/latest.pth").rename(tmp_path / "prior/b.pth")
    with pytest.raises(ValueError, match=r"prior: expected one .pth file, found a.pth, b.pth"):
        unclip.load_prior(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.pop("net.learned_query"),
            r"prior.pth does not fit: missing: net.learned_query$",
        ),
        (
            lambda s: s.update({"net.more.weight": torch.ones(2)}),
            r"does not fit: unexpected: net.more.weight$",
        ),
        (
            lambda s: s.update({"net.learned_query": torch.ones(25)}),
            r"of another shape: net.learned_query is \(25,\), expected \(24,\)$",
        ),
        (
            lambda s: s.update({ALPHAS: Schedule(ScheduleConfig("linear", 100)).alpha_bar}),
            "noise_scheduler.* is not the configured cosine schedule with 100 timesteps",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(prior, tmp_path, change, message):
    state, section = prior
    table = {ALPHAS: Schedule(ScheduleConfig("cosine", 100)).alpha_bar.float()}
    extra = {
        **table,
        "clip.clip.visual.proj": torch.ones(3),
        "net.null_image_embed": torch.ones(1, 24),
    }
    file = write(tmp_path / "prior.pth", {**state, **extra}, None, prior=section)
    unclip.load_prior(file)
    change(state)
    write(file, {**table, **state}, None, prior=section)
    with pytest.raises(ValueError, match=message):
        unclip.load_prior(file)


def test_a_missing_configuration_is_an_error(prior, tmp_path):
    state, section = prior
    file = write(tmp_path / "prior.pth", state, None, prior=section)
    (tmp_path / "prior_config.json").rename(tmp_path / "x.json")
    with pytest.raises(
        FileNotFoundError, match="holds no configuration; put the model's prior_config.json"
    ):
        unclip.load_prior(file)
    (tmp_path / "prior_config.json").write_text(json.dumps(section))
    with pytest.raises(ValueError, match="prior_config.json has no section 'prior'"):
        unclip.load_prior(file)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"predict_v": True},
            "predict_v is True; expected False",
        ),
        ({"net.num_time_embeds": 2}, "net.num_time_embeds is 2; expected 1"),
        ({"net.self_cond": True}, "net.self_cond is True; expected False"),
        ({"beta_schedule": "jsd"}, "beta_schedule is jsd; expected cosine or linear"),
        ({"sampling_clamp_l2norm": True}, "sampling_clamp_l2norm is True; expected False"),
        ({"image_embed_dim": 32}, "net.dim is 24, but image_embed_dim is 32"),
        ({"timesteps": 200}, "net.num_timesteps is 100; expected at least 200"),
        ({"net.surprise": 1}, "net.surprise is unknown"),
        ({"image_embed_dim": "24"}, "image_embed_dim is '24'; expected"),
    ],
)
def test_unsupported_prior_settings_are_named(prior, tmp_path, changes, message):
    state, section = copy.deepcopy(prior)
    for name, value in changes.items():
        *parents, last = name.split(".")
        (section["net"] if parents else section)[last] = value
    with pytest.raises(ValueError, match=f"prior.pth: prior.*{message}"):
        unclip.load_prior(write(tmp_path / "prior.pth", state, "1.15.6", prior=section))


@pytest.mark.parametrize("release", ["0.16.1", "0.22.3", "0.23.2"])
def test_unsupported_releases_are_refused(prior, tmp_path, release):
    state, section = prior
    with pytest.raises(ValueError, match=f"is of release {release}, which is not supported"):
        unclip.load_prior(write(tmp_path / "prior.pth", state, release, prior=section))


@pytest.mark.parametrize(
    "changes, release, message",
    [
        (
            {"cross_embed_downsample": True},
            "1.0.2",
            "cross_embed_downsample is True; expected False",
        ),
        ({"lowres_noise_cond": True}, "1.0.2", "lowres_noise_cond is True"),
        (
            {"image_embed_dim": 12},
            "1.0.2",
            "image_embed_dim is 12; expected the width of CLIP's embeddings",
        ),
        ({"resnet_groups": [8]}, "1.0.2", "has 1 values for 2 levels"),
        ({"anything": "else"}, "1.2.0", "sparse_attn of releases 1.2 and 1.3 is not supported"),
        ({"text_embed_dim": None}, "1.0.2", "text_embed_dim is missing"),
        ({"cond_on_text_encodings": False}, "1.0.2", "unexpected: unets.0.text_to_cond.weight"),
        ({"dim": 16}, "1.0.2", "of another shape"),
    ],
)
def test_unsupported_unet_settings_are_named(changes, release, message, tmp_path, clip_folder):
    record = RECORDED["decoders"]["1.0.2"]
    section = decoder_section({**record["unet"], **changes})
    write(tmp_path / "decoder/latest.pth", state_of(record), release, decoder=section)
    with pytest.raises(ValueError, match=message):
        dalle2_pytorch.load_bundle(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"learned_variance_constrain_frac": True},
            "learned_variance_constrain_frac is True; expected False",
        ),
        (
            {"use_noise_for_lowres_cond": [True]},
            r"use_noise_for_lowres_cond is \(True,\); expected False",
        ),
        ({"beta_schedule": ["cosine", "linear"]}, "beta_schedule has 2 values, not 1"),
        ({"clip": None}, "clip is missing.*configurations name none; put the CLIP there"),
        ({"clip": {**CLIP_NAMED, "make": "x-clip"}}, "name x-clip ViT-L/14; put the CLIP there"),
    ],
)
def test_unsupported_decoder_settings_are_named(changes, message, tmp_path):
    record = RECORDED["decoders"]["1.0.2"]
    section = decoder_section(record["unet"], **changes)
    write(tmp_path / "decoder/latest.pth", state_of(record), "1.0.2", decoder=section)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dalle2_pytorch.load_bundle(tmp_path)
