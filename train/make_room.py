"""Prepare a trained CLIP for training with a reconstruction head.

python train/make_room.py --clip CLIP --data 'data/emoji/train-*.tar' --out runs/emoji/clip_room
accelerate launch train/clip.py --config configs/emoji/clip_reconstruct.yaml --init runs/emoji/clip_room

A contrastive embedding of a small dataset varies in few directions: 128 of the 256 of the bundled
CLIP contain 99.95 % of the variance. `make_room` keeps these, and uses the others for a linear
prediction of the small, blurred image. The similarities of images and captions hardly change. The
input of this prediction must depend on positions: `pool_by_attention` gives an image tower that
averages over positions a pooling whose heads attend to one quadrant each.
"""  # noqa: E501

# N images, C channels of the image tower, P positions, D embedding width, H heads

from __future__ import annotations

import argparse
import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip import CLIP, CLIPConfig
from unclip.data.loader import DataConfig, open_data
from unclip.files import check_folder, exit_on_error

BATCH = 600  # the pooling is fitted to one batch
CHUNK = 128  # images that CLIP encodes together
QUADRANTS = 4
SHARPNESS = 6.0  # approximate difference of attention logits inside and outside of a quadrant


@torch.no_grad()
def pool_by_attention(clip: CLIP, images: Tensor) -> CLIP:
    """Copy a CLIP whose timm tower averages over positions, with attention pooling instead.

    images: some hundreds, (N, 3, S, S) in [-1, 1]. The projection is fitted to them, so that their
    embeddings are nearly unchanged. ValueError for another image tower or pooling.
    """
    vision = clip.config.model_cfg.get("vision_cfg") or {}
    if not vision.get("timm_model_name") or vision.get("timm_pool") != "avg":
        raise ValueError(
            f"the image tower's timm_pool is {vision.get('timm_pool')!r}; "
            "expected a timm model with 'avg'"
        )
    model_cfg = copy.deepcopy(clip.config.model_cfg)
    model_cfg["vision_cfg"].update(timm_pool="abs_attn", timm_proj="")
    pooled = CLIP(CLIPConfig(model_cfg, clip.config.preprocess_cfg), clip.tokenizer).eval()
    state, names = clip.model.state_dict(), set(pooled.model.state_dict())
    pooled.model.load_state_dict({k: v for k, v in state.items() if k in names}, strict=False)
    features = torch.cat([_feature_map(clip, part) for part in images.split(CHUNK)])  # (N, P, C)
    pool = attention_pool(pooled)
    _attend_to_quadrants(pool, features)
    values = pooled_values(pooled, images)  # (N, C)
    _set_linear(pool.proj, *ridge(values, _embed(clip, images), 3.0 * len(values) ** 0.5))
    return pooled


@torch.no_grad()
def make_room(clip: CLIP, images: Tensor, keep: int, size: int = 16) -> None:
    """Use all but `keep` directions of the image embeddings for a small image, in place.

    images: some thousands, (N, 3, S, S) in [-1, 1], sampled as in training. size: side of the small
    image. Text embeddings are projected to the kept directions, and the inverse temperature grows
    by the square root of 2, about as much as cosines shrink. ValueError if `keep` is not less than
    the embedding width, or if the image tower does not end in attention pooling.
    """
    D = clip.emb_dim
    if not 0 < keep < D:
        raise ValueError(f"keep is {keep}; expected 1 to {D - 1} of the {D} directions")
    pool = attention_pool(clip)
    emb, values = _embed(clip, images), pooled_values(clip, images)
    mean = emb.mean(dim=0)
    directions = torch.linalg.eigh((emb - mean).T @ (emb - mean))[1]  # columns, rising variance
    free, kept = directions[:, : D - keep], directions[:, D - keep :]
    small = F.adaptive_avg_pool2d(images, size).flatten(1)  # (N, 3 size size)
    components = _components(small, D - keep)
    weight, bias = ridge(values, components, 0.02 * len(values))
    spread = ((emb - mean) @ kept).square().sum(dim=1).mean().sqrt()
    scale = spread / components.square().sum(dim=1).mean().sqrt()
    projection = kept @ kept.T
    weight = projection @ pool.proj.weight + scale * free @ weight
    bias = projection @ pool.proj.bias + scale * free @ bias
    _set_linear(pool.proj, weight, bias)
    text: Any = clip.model.text
    text.text_projection.copy_(text.text_projection @ projection)
    clip.logit_scale.add_(torch.tensor(2.0).sqrt().log())


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Fit a linear map from x (N, I), scaled to unit variance, to y (N, J).

    Returns the weight (J, I) and the bias (J,).
    """
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-5
    scaled = (x - mean) / std
    gram = scaled.T @ scaled + penalty * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, scaled.T @ (y - y.mean(dim=0))) / std[:, None]
    return weight.T, y.mean(dim=0) - mean @ weight


def attention_pool(clip: CLIP) -> Any:
    """Return the attention pooling of a timm tower; ValueError if there is none."""
    vision = clip.config.model_cfg.get("vision_cfg") or {}
    if vision.get("timm_pool") != "abs_attn":
        raise ValueError("the image tower has no attention pooling; expected timm_pool: abs_attn")
    visual: Any = clip.model.visual
    return visual.head.pool


@torch.no_grad()
def pooled_values(clip: CLIP, images: Tensor) -> Tensor:
    """Return the input of the attention pooling's projection, (N, C)."""
    found: list[Tensor] = []
    hook = attention_pool(clip).proj.register_forward_pre_hook(
        lambda _, args: found.append(args[0][:, 0].float())
    )
    try:
        _embed(clip, images)
    finally:
        hook.remove()
    return torch.cat(found)


def _embed(clip: CLIP, images: Tensor) -> Tensor:
    return torch.cat([clip.encode_image(part).float() for part in images.split(CHUNK)])


def _feature_map(clip: CLIP, images: Tensor) -> Tensor:
    """Return the image tower's output before pooling, (N, P, C)."""
    visual: Any = clip.model.visual
    features = visual.trunk.forward_features(clip.prepare(images))  # (N, C, h, w)
    return features.flatten(2).transpose(1, 2).float()


def _components(small: Tensor, count: int) -> Tensor:
    """Return principal components (N, count), divided by the fourth root of their variance."""
    centred = small - small.mean(dim=0)
    variance, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    variance, directions = variance[-count:].clamp(min=1e-6), directions[:, -count:]
    components = centred @ directions / variance.pow(0.25)
    return components / components.std()


def _attend_to_quadrants(pool: Any, features: Tensor) -> None:
    """Set queries, keys, values and positions: each quadrant is read by a quarter of the heads.

    features (N, P, C) give the values, and the directions in which features vary least, which mark
    the positions of a quadrant.
    """
    flat = features.flatten(0, 1)
    C, H = flat.shape[1], pool.num_heads
    width, mean = C // H, flat.mean(dim=0)
    variance, axes = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    random = torch.randn(C // 2, QUADRANTS, generator=torch.Generator().manual_seed(0))
    marks = torch.linalg.qr(axes[:, : C // 2] @ random)[0].T  # (4, C)
    heads = H // QUADRANTS  # of a quadrant
    n = heads * width
    values = (axes[:, -n:] / variance[-n:].clamp(min=1e-6).sqrt()).T  # (n, C)
    side_y, side_x = pool.feat_size
    halves_y, halves_x = (
        (slice(None, side // 2), slice(side // 2, None)) for side in (side_y, side_x)
    )
    grid = torch.zeros(side_y, side_x, C)
    weight, bias = torch.randn_like(pool.qkv.weight) * 0.2 * C**-0.5, torch.zeros(3 * C)
    weight[2 * C :] = 0
    for q, mark in enumerate(marks):
        grid[halves_y[q // 2], halves_x[q % 2]] = SHARPNESS * mark
        # One channel of the query is constant, and the mark is the same channel of the key.
        for head in range(q * heads, (q + 1) * heads):
            first = head * width
            read = values[first - q * n : first - q * n + width]
            weight[first], weight[C + first], bias[first] = 0, mark, width**0.5
            weight[2 * C + first : 2 * C + first + width] = read
            bias[2 * C + first : 2 * C + first + width] = -read @ (mean + SHARPNESS * mark)
    pool.pos_embed.copy_(torch.cat([torch.zeros(1, C), grid.flatten(0, 1)]))
    _set_linear(pool.qkv, weight, bias)


def _set_linear(linear: Any, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def main(clip_folder: str, data: str, out: str, images: int, keep: int) -> None:
    if images < 2:
        raise ValueError(f"--images is {images}; expected at least 2")
    check_folder(Path(out))
    clip = CLIP.from_pretrained(clip_folder)
    data_config = DataConfig(data, clip.image_size, min(images, BATCH))
    loader = open_data(data_config, captions_needed=False)
    needed = max(1, images // BATCH)
    batches = [batch["image"] for batch in islice(loader, needed)]
    if len(batches) < needed:
        raise ValueError(f"{data} has fewer than {images} images per epoch; set a lower --images")
    if clip.config.model_cfg["vision_cfg"].get("timm_pool") == "avg":
        clip = pool_by_attention(clip, batches[0])
    make_room(clip, torch.cat(batches), keep)
    clip.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", required=True, metavar="FOLDER", help="a trained CLIP")
    parser.add_argument("--data", required=True, metavar="DATA", help="its training images")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the new CLIP")
    parser.add_argument(
        "--images", type=int, default=6000, metavar="N", help="images to use (default: %(default)s)"
    )
    parser.add_argument(
        "--keep",
        type=int,
        default=128,
        metavar="K",
        help="directions of the embedding to keep (default: %(default)s)",
    )
    args = parser.parse_args()
    with exit_on_error():
        main(args.clip, args.data, args.out, args.images, args.keep)
