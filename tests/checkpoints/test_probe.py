"""`unclip info` of foreign files: format, components and sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import unclip
from unclip.checkpoints.registry import CODECS, MODELS, PRIORS, load_codec
from unclip.checkpoints.summary import summary
from unclip.cli.main import main

HALF = torch.zeros(3, 5, dtype=torch.float16)


def tensors(*names: str) -> dict[str, torch.Tensor]:
    """15 numbers each, 60 bytes."""
    return {name: torch.zeros(3, 5) for name in names}


def dalle2_pytorch(part: str, *names: str) -> dict[str, Any]:
    return {
        "version": "1.15.6",
        "config": {part: {}},
        "model": tensors(*names),
        "optimizer": tensors("not wanted"),
    }


def karlo(folder: Path) -> Path:
    for name in (
        "ViT-L-14.pt",
        "prior-ckpt-step=1.ckpt",
        "decoder-ckpt-step=1.ckpt",
        "improved-sr-ckpt-step=1.ckpt",
    ):
        torch.save({"state_dict": tensors("a", "b")}, folder / name)
    return folder


def glide(folder: Path) -> Path:
    torch.save({"a": HALF}, folder / "base.pt")
    torch.save({"a": HALF, "b": HALF}, folder / "upsample.pt")
    return folder


def laion(folder: Path) -> Path:
    for part in ("prior", "decoder"):
        (folder / part).mkdir()
    torch.save(
        dalle2_pytorch("prior", "net.a", "clip.a", "noise_scheduler.a"),
        folder / "prior" / "latest.pth",
    )
    unets = dalle2_pytorch("decoder", "unets.0.a", "unets.0.b", "unets.1.a", "clip.a")
    torch.save(unets, folder / "decoder" / "latest.pth")
    return folder


def min_dalle(folder: Path) -> Path:
    torch.save({"embed_tokens.weight": HALF}, folder / "encoder.pt")
    torch.save({"lm_head.weight": HALF}, folder / "decoder.pt")
    torch.save(tensors("embedding.weight"), folder / "detoker.pt")
    return folder


def dalle_pytorch(folder: Path) -> Path:
    state = tensors("vae.a", "text_emb.weight", "image_emb.weight")
    torch.save(
        {"hparams": {}, "vae_params": {}, "weights": state, "opt_state": tensors("a")},
        folder / "dalle.pt",
    )
    return folder / "dalle.pt"


def openai_dvae(folder: Path) -> Path:
    for name in ("encoder", "decoder"):
        torch.save(tensors("blocks.input.w"), folder / f"{name}.pkl")
    return folder


def taming(folder: Path) -> Path:
    torch.save(
        {"state_dict": tensors("quantize.embedding.weight", "decoder.a", "loss.a")},
        folder / "last.ckpt",
    )
    return folder / "last.ckpt"


def kandinsky(folder: Path) -> Path:
    (folder / "prior").mkdir()
    save_file(tensors("a", "b"), folder / "prior" / "model.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "KandinskyV22PriorPipeline"}')
    return folder


def original_prior(folder: Path) -> Path:
    torch.save({"state_dict": tensors("model.a")}, folder / "prior_fp16.ckpt")
    return folder / "prior_fp16.ckpt"


def laion_prior(folder: Path) -> Path:
    torch.save(dalle2_pytorch("prior", "net.a", "clip.a"), folder / "best.pth")
    return folder / "best.pth"


@pytest.mark.parametrize(
    ("make", "kind", "format", "parts", "dtype"),
    [
        (
            karlo,
            "unclip",
            "Karlo's own",
            {"clip": 30, "prior": 30, "decoder": 30, "upsampler_0": 30},
            "F32",
        ),
        (glide, "glide", "GLIDE", {"decoder": 15, "upsampler_0": 30}, "F16"),
        (laion, "unclip", "DALLE2-pytorch", {"prior": 15, "decoder": 30, "upsampler_0": 15}, "F32"),
        (min_dalle, "dalle", "min-dalle", {"codec": 15, "dalle": 30}, "F16"),
        (dalle_pytorch, "dalle", "DALLE-pytorch", {"codec": 15, "dalle": 30}, "F32"),
        (openai_dvae, "codec", "OpenAI's dVAE", {"codec": 30}, "F32"),
        (taming, "codec", "taming-transformers", {"codec": 30}, "F32"),
        (kandinsky, "prior", "diffusers", {"prior": 30}, "F32"),
        (original_prior, "prior", "Karlo's and Kandinsky's own", {"prior": 15}, "F32"),
        (laion_prior, "prior", "DALLE2-pytorch", {"prior": 15}, "F32"),
    ],
)
def test_info_describes_foreign_formats(make, kind, format, parts, dtype, tmp_path, capsys):
    path = make(tmp_path)
    info = summary(path)
    assert (info.kind, info.format, info.options) == (kind, format, {})
    assert {part.name: part.parameters for part in info.components} == parts
    last = info.components[-1]
    assert last.dtypes == (dtype,) and last.size == last.parameters * (2 if dtype == "F16" else 4)

    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path.name}: {kind} in {path} (format: {format})\nlicence: unknown\n")
    assert [line.split()[0] for line in out.splitlines()[3:]] == [*parts, "all"]


def test_info_describes_our_components(tiny_dalle_folder, capsys):
    assert main(["info", str(tiny_dalle_folder / "codec")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("codec: component in ") and "format" not in out
    codec = load_codec(tiny_dalle_folder / "codec")
    info = summary(tiny_dalle_folder / "codec").components[0]
    assert info.parameters == sum(x.numel() for x in codec.state_dict().values())


def test_every_format_can_be_summarised():
    """Whole models in our own or diffusers' layout are described from their headers."""
    unprobed = [known for known in (*MODELS, *CODECS, *PRIORS) if known.probe is None]
    assert [(known.name, known.kind) for known in unprobed] == [
        ("unclip", "model"),
        ("diffusers", "unclip"),
        ("unclip", "prior"),
    ]


def test_an_upsampler_in_a_separate_file_is_counted_once(tmp_path):
    folder = laion(tmp_path)
    (folder / "upsampler").mkdir()
    unets = dalle2_pytorch("decoder", "unets.0.a", "unets.1.a", "unets.1.b", "unets.1.c")
    torch.save(unets, folder / "upsampler" / "latest.pth")
    info = {part.name: part.parameters for part in summary(folder).components}
    assert info == {"prior": 15, "decoder": 30, "upsampler_0": 45}


def test_the_licence_is_read_from_the_model_card(tmp_path):
    folder = min_dalle(tmp_path)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert summary(folder).licence == "mit"


def test_unknown_files_are_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("nothing")
    assert main(["info", str(tmp_path)]) == 2
    assert (
        "not a model, codec or prior of a known format (Karlo's own, GLIDE, "
        in capsys.readouterr().err
    )
    (tmp_path / "model.pt").write_bytes(b"nothing")
    assert main(["info", str(tmp_path / "model.pt")]) == 2
    assert "model.pt is truncated or not a PyTorch checkpoint" in capsys.readouterr().err
    shutil.copy(tmp_path / "notes.txt", tmp_path / "a.png")
    assert main(["info", str(tmp_path / "a.png")]) == 2 and "a.png" in capsys.readouterr().err
    index = {"_class_name": "StableDiffusionPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="_class_name is 'StableDiffusionPipeline'; expected UnCLIPPipeline"
    ):
        unclip.load(tmp_path, "cpu")
    assert (
        main(["info", str(tmp_path)]) == 2 and "StableDiffusionPipeline" in capsys.readouterr().err
    )
