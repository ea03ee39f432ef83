"""VQ-GAN: checkpoints of taming-transformers, and the discriminator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recorded import numbers, recording, sampled, weights
from torch import Tensor

from unclip.checkpoints import taming
from unclip.checkpoints.registry import load_codec
from unclip.checkpoints.renaming import export_state
from unclip.models.codecs.discriminator import DiscriminatorConfig, PatchDiscriminator, hinge_loss
from unclip.models.codecs.quantizers import GumbelConfig, NearestConfig
from unclip.models.codecs.vqgan import VQGAN, VQGANConfig
from unclip.models.unet import LevelSpec

TAMING = recording("taming")
KINDS = {"nearest": NearestConfig, "gumbel": GumbelConfig}


def write(folder: Path, kind: str, state: dict[str, Tensor]) -> Path:
    file = folder / "last.ckpt"
    torch.save(
        {"state_dict": {**state, "loss.discriminator.main.0.weight": torch.zeros(2)}, "epoch": 3},
        file,
    )
    size = TAMING[kind]["ddconfig"]["resolution"]
    (folder / "model.yaml").write_text(
        f"model:\n  params:\n    ddconfig:\n      resolution: {size}\n"
    )
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_taming_checkpoints_give_recorded_outputs(kind, tmp_path):
    recorded = TAMING[kind]
    state = weights(recorded["shapes"])
    vqgan = load_codec(write(tmp_path, kind, state))
    images = numbers("pictures", (2, 3, vqgan.image_size, vqgan.image_size), 0.4).clamp(-1, 1)
    torch.testing.assert_close(
        sampled(vqgan._features(images)), recorded["features"], atol=1e-5, rtol=0
    )
    assert vqgan.encode(images).flatten().tolist() == recorded["codes"]
    codes = torch.tensor(recorded["decoded_codes"]).view(2, *vqgan.grid)
    torch.testing.assert_close(
        sampled(vqgan._decode(codes)), recorded["pictures"], atol=1e-5, rtol=0
    )
    back = export_state(vqgan.state_dict(), taming.rules(vqgan.config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", KINDS)
def test_config_is_inferred_from_tensors(kind, tmp_path):
    recorded, ddconfig = TAMING[kind], TAMING[kind]["ddconfig"]
    config = load_codec(write(tmp_path, kind, weights(recorded["shapes"]))).config
    sides = [ddconfig["resolution"] // 2**i for i in range(len(ddconfig["ch_mult"]))]
    assert [level.channels for level in config.levels] == [
        ddconfig["ch"] * mult for mult in ddconfig["ch_mult"]
    ]
    assert [level.attention for level in config.levels] == [
        side in ddconfig["attn_resolutions"] for side in sides
    ]
    assert {level.blocks for level in config.levels} == {ddconfig["num_res_blocks"]}
    assert (config.image_size, config.vocab_size, type(config.quantizer)) == (
        ddconfig["resolution"],
        40,
        KINDS[kind],
    )


def test_default_image_size_without_yaml(tmp_path):
    file = write(tmp_path, "nearest", weights(TAMING["nearest"]["shapes"]))
    (tmp_path / "model.yaml").write_text("model: 3")
    with pytest.raises(ValueError, match="has no model.params.ddconfig.resolution"):
        taming.load(file)
    (tmp_path / "model.yaml").unlink()
    assert taming.load(file).image_size == 256


def test_invalid_checkpoints_raise(tmp_path):
    state = weights(TAMING["nearest"]["shapes"])
    state.pop("decoder.norm_out.bias")
    state["decoder.extra.weight"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"missing: decoder\.norm_out\.bias; unexpected: decoder\.extra\.weight"
    ):
        load_codec(write(tmp_path, "nearest", state))
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="other.ckpt is not an image codec of a known format"):
        load_codec(tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="list.ckpt is not an image codec of a known format"):
        load_codec(tmp_path / "list.ckpt")


@pytest.mark.parametrize("name", ["vqgan.pt", "vqgan.pth", "vqgan.ckpt"])
def test_a_vqgan_is_loaded_alone_and_as_a_first_stage(name, tmp_path):
    state = weights(TAMING["nearest"]["shapes"])
    torch.save({f"module._orig_mod.{key}": x for key, x in state.items()}, tmp_path / name)
    transformer = {f"first_stage_model.{key}": x for key, x in state.items()}
    transformer |= {
        "transformer.pos_emb": torch.zeros(2),
        "first_stage_model.loss.x": torch.ones(1),
    }
    (tmp_path / "net2net").mkdir()
    torch.save({"state_dict": transformer}, tmp_path / "net2net" / name)
    (tmp_path / "net2net" / "model.yaml").write_text(
        "model: {params: {first_stage_config: {params: {ddconfig: {resolution: 32}}}}}"
    )
    alone, first_stage = (load_codec(path / name) for path in (tmp_path, tmp_path / "net2net"))
    assert (alone.image_size, first_stage.image_size) == (256, 32)
    for codec in (alone, first_stage):
        assert torch.equal(codec.quantizer.codebook, state["quantize.embedding.weight"])


def test_published_sizes():
    f8 = (LevelSpec(128), LevelSpec(128), LevelSpec(256), LevelSpec(512, attention=True))
    with torch.device("meta"):
        codecs = {
            "f16": VQGAN(VQGANConfig()),
            "f16/16384": VQGAN(VQGANConfig(vocab_size=16384)),
            "gumbel f8": VQGAN(VQGANConfig(vocab_size=8192, levels=f8, quantizer=GumbelConfig())),
        }
    assert {name: codec.grid for name, codec in codecs.items()} == {
        "f16": (16, 16),
        "f16/16384": (16, 16),
        "gumbel f8": (32, 32),
    }
    sizes = {name: sum(p.numel() for p in codec.parameters()) for name, codec in codecs.items()}
    assert sizes["f16/16384"] - sizes["f16"] == (16384 - 1024) * 256


def test_downsampling_pads_right_and_below(tmp_path):
    vqgan = VQGAN(VQGANConfig(image_size=16, levels=(LevelSpec(8, 1), LevelSpec(8, 1)), groups=4))
    (down,) = [layer for layer in vqgan.encoder if type(layer).__name__ == "Downsample"]
    x = torch.randn(1, 8, 6, 6)
    padded = torch.zeros(1, 8, 7, 7)
    padded[:, :, :6, :6] = x
    assert torch.equal(down(x), F.conv2d(padded, down.weight, down.bias, stride=2))


def test_decoder_only_codec_cannot_encode():
    config = VQGANConfig(
        image_size=16,
        levels=(LevelSpec(8, 1), LevelSpec(8, 1)),
        groups=4,
        vocab_size=9,
        parts="decoder",
    )
    vqgan = VQGAN(config).eval()
    assert vqgan.decode(torch.arange(8).view(1, 2, 4)).shape == (1, 3, 4, 8)
    assert not any(name.startswith(("encoder", "quant_conv")) for name in vqgan.state_dict())
    with pytest.raises(ValueError, match="cannot encode images"):
        vqgan.encode(torch.zeros(1, 3, 16, 16))


def test_discriminator_has_a_receptive_field_of_70_pixels():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(DiscriminatorConfig(width=4)).eval()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    scores = discriminator(image)
    assert scores.shape == (1, 1, 14, 14)
    scores[0, 0, 7, 7].backward()
    seen = image.grad.abs().sum(dim=(0, 1))
    assert [int((seen.sum(dim=d) > 0).sum()) for d in (0, 1)] == [70, 70]
    assert (
        sum(p.numel() for p in PatchDiscriminator(DiscriminatorConfig()).parameters()) == 2_765_633
    )


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(
        0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    )
