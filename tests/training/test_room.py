"""make_room and pool_by_attention: embeddings gain positions and keep their similarities."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_clip
from scripts import ROOT, load_script, run_script

from unclip.clip import CLIP, CLIPConfig
from unclip.tokenizer import BPETokenizer

script = load_script("make_room")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("--out file", "cannot write file: file is not a directory"),
        ("--out new --images -4", "--images is -4; expected at least 2"),
        ("--out new", "none is not a CLIP folder"),
    ],
)
def test_wrong_arguments_are_reported_first(tmp_path, monkeypatch, arguments, facts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=facts):
        run_script(
            ROOT / "train/make_room.py", "--clip", "none", "--data", "none", *arguments.split()
        )


@pytest.fixture(scope="module")
def images():
    """Return images (64, 3, 64, 64) of a coloured square in one of four quadrants."""
    generator = torch.Generator().manual_seed(0)
    images = torch.ones(64, 3, 64, 64)
    for i, colour in enumerate(torch.rand(64, 3, generator=generator) * 2 - 1):
        top, left = 32 * (i % 2), 32 * (i // 2 % 2)
        images[i, :, top + 4 : top + 28, left + 4 : left + 28] = colour[:, None, None]
    return images


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(["a red apple", "a pear"], vocab_size=300, context_length=10)
    vision = {
        "timm_model_name": "resnet10t",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    }
    text = {"width": 32, "heads": 2, "layers": 1, "context_length": 10, "vocab_size": 300}
    text |= {"pool_type": "eos", "eos_id": tokenizer.end_id}
    model = {"embed_dim": 16, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    return CLIP(CLIPConfig(model), tokenizer).eval()


@torch.no_grad()
def test_attention_pooling_keeps_the_embeddings(clip, images):
    pooled = script.pool_by_attention(clip, images)
    cosine = F.cosine_similarity(pooled.encode_image(images), clip.encode_image(images))
    assert cosine.mean() > 0.97
    assert pooled.config.model_cfg["vision_cfg"]["timm_pool"] == "abs_attn"
    assert clip.config.model_cfg["vision_cfg"]["timm_pool"] == "avg"


@torch.no_grad()
def test_embeddings_with_room_predict_the_small_image(clip, images):
    small = F.adaptive_avg_pool2d(images, 4).flatten(1)

    def error(clip):
        emb = clip.encode_image(images)
        weight, bias = script.ridge(emb, small, 1e-2)
        return F.mse_loss(emb @ weight.T + bias, small)

    roomy = script.pool_by_attention(clip, images)
    text = roomy.encode_text(["a pear"]).emb
    before = text @ roomy.encode_image(images).T
    script.make_room(roomy, images, keep=8, size=4)
    assert error(roomy) < 0.5 * error(clip)
    after = roomy.encode_text(["a pear"]).emb @ roomy.encode_image(images).T
    assert torch.corrcoef(torch.cat([before, after]))[0, 1] > 0.9


def test_unsuitable_towers_and_sizes_are_errors(clip, images):
    with pytest.raises(ValueError, match="timm_pool is None; expected a timm model with 'avg'"):
        script.pool_by_attention(tiny_clip(), images)
    with pytest.raises(ValueError, match="keep is 16; expected 1 to 15 of the 16 directions"):
        script.make_room(clip, images, keep=16)
    with pytest.raises(ValueError, match="no attention pooling"):
        script.make_room(clip, images, keep=8)
