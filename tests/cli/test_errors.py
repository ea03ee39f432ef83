"""Bad input: one clear line each, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_OPTIONS, tiny_decoder, tiny_upsampler
from PIL import Image

import unclip
from unclip.checkpoints import folders
from unclip.cli.main import main
from unclip.diffusion.schedules import ScheduleConfig
from unclip.image_io import open_image, read_metadata
from unclip.pipelines.base import redraw
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import CodeOptions, StageOptions


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "list of prompts is empty"),
        (None, {}, "prompt is a NoneType; expected a string"),
        (7, {}, "prompt is a int; expected a string"),
        (["a", 7], {}, "prompt 1 is 7, a int; expected a string"),
        ("caf\udce9", {}, r"prompt 0 is 'caf\\udce9', which is no valid Unicode; expected UTF-8"),
        (
            "a",
            {"options": replace(TINY_OPTIONS, prior=StageOptions(1, temperature=0.2))},
            "temperature is 0.2, but a diffusion prior has none; leave it at 1",
        ),
        ("a", {"num_images": 0}, "num_images is 0; expected a whole number of at least 1"),
        ("a", {"num_images": 1.5}, "num_images is 1.5"),
        ("a", {"batch_size": 0}, "batch_size is 0"),
        ("a", {"seed": -1}, "seed is -1; expected a whole number from 0"),
        ("a", {"seed": "one"}, "seed is 'one'"),
        ("a", {"options": StageOptions(3)}, "options is a StageOptions; expected UnCLIPOptions"),
        ("a", {"options": replace(TINY_OPTIONS, prior_candidates=0)}, "prior_candidates is 0"),
        (
            "a",
            {"options": replace(TINY_OPTIONS, upsamplers=(StageOptions(1),) * 2)},
            "2 upsamplers, but the model has 1",
        ),
        (
            "a",
            {"options": replace(TINY_OPTIONS, decoder=StageOptions(1, sampler="euler"))},
            "sampler is 'euler'",
        ),
        (
            "a",
            {"options": replace(TINY_OPTIONS, decoder=StageOptions(1001))},
            "only 1000 timesteps",
        ),
    ],
)
def test_a_bad_call_is_refused(tiny_pipe, prompt, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipe(prompt, progress=False, **changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either an image or image_emb"),
        ({"image": "a.png", "image_emb": torch.ones(1, 16)}, "either an image or image_emb"),
        ({"image": []}, "list of images is empty"),
        ({"image": torch.zeros(1, 4, 8, 8)}, r"image is of shape \(1, 4, 8, 8\); expected"),
        ({"image": torch.zeros(0, 3, 8, 8)}, r"image is of shape \(0, 3, 8, 8\); expected"),
        (
            {"image": torch.zeros(3, 8, 8, dtype=torch.uint8)},
            r"a tensor of torch.uint8; expected floating-point",
        ),
        (
            {"image": torch.full((3, 8, 8), 255.0)},
            r"image is of values from 255 to 255; expected them in \[-1, 1\]",
        ),
        ({"image": [torch.full((3, 8, 8), torch.nan)]}, r"image is of values from nan to nan"),
        (
            {"image": np.zeros((8, 8, 3))},
            "ndarray; expected a path or a PIL image",
        ),
        ({"image_emb": torch.ones(16)}, r"image_emb is of shape \(16,\); expected \(N, 16\)"),
        ({"image_emb": torch.ones(2, 8)}, r"image_emb is of shape \(2, 8\); expected \(N, 16\)"),
        (
            {"image_emb": torch.full((1, 16), torch.nan)},
            "image_emb holds infinite numbers or nan; expected CLIP",
        ),
    ],
)
def test_bad_variations_are_refused(tiny_pipe, given, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipe.variations(**given, progress=False)


def test_an_unknown_embedding_is_refused():
    with pytest.raises(ValueError, match="embedding is 'imge'; expected 'prior', 'text' or 'none'"):
        replace(TINY_OPTIONS, embedding="imge")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_options_that_would_overflow_are_refused(value):
    for make, name in [
        *(
            (partial(StageOptions, 3), name)
            for name in ("guidance", "eta", "guidance_rescale", "temperature")
        ),
        *((CodeOptions, name) for name in ("guidance", "temperature")),
    ]:
        with pytest.raises(
            ValueError, match=rf"{name} is {re.escape(str(value))}; expected a number of at most"
        ):
            make(**{name: value})


def test_stages_check_what_they_are_given(tiny_pipe):
    text = tiny_pipe.encode_text(["a", "b"])
    with pytest.raises(ValueError, match="2 texts for 3 image embeddings"):
        tiny_pipe.decode(torch.ones(3, 16), text)
    for emb in (torch.ones(16), torch.ones(2, 8)):
        with pytest.raises(
            ValueError,
            match=rf"image_emb is of shape {re.escape(str(tuple(emb.shape)))}; expected \(B, 16",
        ):
            tiny_pipe.decode(emb)
    for candidates in (0, -1):
        with pytest.raises(
            ValueError, match=f"candidates is {candidates}; expected a whole number of at least 1"
        ):
            tiny_pipe.sample_prior(text, candidates=candidates)
        with pytest.raises(ValueError, match=f"candidates is {candidates}"):
            tiny_pipe.imagine(
                "a", options=replace(TINY_OPTIONS, prior_candidates=candidates), progress=False
            )
    bright = torch.full((1, 3, 16, 16), 255.0)
    for draw in (tiny_pipe.reconstruct, tiny_pipe.image_to_image):
        with pytest.raises(ValueError, match="image is of values from 255 to 255"):
            draw(bright)
    with pytest.raises(ValueError, match="cannot open an image from a Tensor"):
        tiny_pipe.inpaint(Image.new("RGB", (16, 16)), torch.zeros(16, 16))
    with pytest.raises(ValueError, match=r"expected \(B, 3, 8, 8\)"):
        tiny_pipe.upsample(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        tiny_pipe.decode(torch.ones(2, 16), text, generators=[torch.Generator()])


def test_a_pipeline_moves_to_devices_that_there_are_alone(tiny_pipe, tiny_folder):
    there_is_no = "there is no device cuda:99 here; available: .*cpu"
    for device, message in {
        "cuda:99": there_is_no,
        "gpu": "unknown device 'gpu'",
        torch.half: "device torch",
    }.items():
        with pytest.raises(ValueError, match=message):
            tiny_pipe.to(device)
    with pytest.raises(ValueError, match=there_is_no):
        UnCLIPPipeline.from_pretrained(tiny_folder, device="cuda:99")


def test_networks_that_were_not_made_for_one_another_are_refused(tiny_pipe):
    clip, prior, decoder = tiny_pipe.clip, tiny_pipe.prior, tiny_pipe.decoder
    with pytest.raises(ValueError, match="decoder has emb_dim 20, but CLIP has 16"):
        UnCLIPPipeline(clip, prior, tiny_decoder(emb_dim=20))
    with pytest.raises(ValueError, match="upsampler_0 takes pictures of 16 px, but gets 8 px"):
        UnCLIPPipeline(clip, prior, decoder, [tiny_upsampler(low=16)])
    with pytest.raises(ValueError, match="schedules of decodr; the model has prior, decoder"):
        UnCLIPPipeline(clip, prior, decoder, schedules={"decodr": ScheduleConfig()})


def test_a_picture_that_is_no_picture_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png: not a readable image"):
        open_image(tmp_path / "text.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png: .*truncated"):
        open_image(tmp_path / "half.png")
    with pytest.raises(ValueError, match=r"whole\.png holds no metadata"):
        read_metadata(tmp_path / "whole.png")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"prompt": "a"}, "lacks options and seed"),
        ({"seed": 1, "options": {}}, "neither a prompt nor an image embedding"),
        (
            {"seed": 1, "options": {"decoder": {"steps": "x"}}, "prompt": "a"},
            "options in the metadata: decoder.steps",
        ),
    ],
)
def test_metadata_that_says_too_little_is_refused(tiny_pipe, metadata, message):
    with pytest.raises(ValueError, match=message):
        redraw(tiny_pipe, metadata)


@pytest.fixture
def here(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A working folder in which a broken model and some broken files lie."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "assets" / "emoji")
    monkeypatch.setattr(folders, "_PACKAGE", tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "broken")
    weights = tmp_path / "broken" / "prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    shutil.copytree(tiny_folder, tmp_path / "partial")
    (tmp_path / "partial" / "decoder" / "schedule.json").unlink()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1"))
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("paint apple", "invalid choice: 'paint'"),
        ("generate", "no prompt; give at least one"),
        ("generate a -n 0", "'0' is not a whole number of at least 1"),
        ("generate a -n x", "'x' is not a whole number"),
        ("generate a --steps 0", "steps is 0"),
        ("generate a --sampler euler", "invalid choice: 'euler'"),
        ("generate a --seed -3", "seed is -3"),
        ("generate a --guidance nan", "guidance is nan; expected a number of at most"),
        ("generate a --temperature 0.2", "temperature is 0.2, but a diffusion prior has none"),
        ("generate caf\udce9", "which is no valid Unicode"),
        ("generate a --model emojis", "unknown model 'emojis'; bundled models: emoji"),
        ("generate a --model ./nowhere", "unknown model './nowhere'; bundled models: emoji"),
        ("generate a --model broken", "broken/prior/model.safetensors is truncated"),
        ("generate a --model partial", "partial/decoder/schedule.json is missing"),
        ("generate a --device abacus", "unknown device 'abacus'"),
        ("generate a --device cuda:99", "there is no device cuda:99 here"),
        ("generate a --device xpu", "there is no device xpu here"),
        ("generate a --device meta", "there is no device meta here"),
        ("generate a -n 2 -o a.png", "a.png is one file, but 2 pictures will be drawn"),
        ("generate a -o a.jpg", "a.jpg: pictures are written as .png"),
        ("generate a -o empty.txt", "empty.txt is a file"),
        ("generate --prompts-file empty.txt", "empty.txt holds no prompt"),
        ("generate --prompts-file latin.txt", "latin.txt is not UTF-8"),
        ("generate --prompts-file none.txt", "none.txt"),
        ("generate a --from plain.png", "cannot be given with it"),
        ("generate --from plain.png --seed 1", "cannot be given with it"),
        ("generate --from plain.png", "plain.png holds no metadata"),
        ("variations none.png", "none.png does not exist"),
        ("variations empty.txt", "empty.txt: not a readable image"),
        ("variations plain.png --candidates 2", "unrecognized arguments: --candidates 2"),
        ("info nothing", "unknown model 'nothing'; bundled models: emoji"),
        ("info plain.png", "plain.png holds no metadata"),
        ("info assets", "assets is not a model, codec or prior of a known format"),
    ],
)
def test_the_command_line_tells_what_is_wrong(here, capsys, command, message):
    before = set(here.rglob("*"))
    assert (
        main(
            [
                *command.split(),
                *(["--quiet"] if command.startswith(("generate", "variations")) else []),
            ]
        )
        == 2
    )
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert set(here.rglob("*")) == before


def test_faults_of_a_model_folder_are_told(here):
    folder = here / "assets" / "emoji"
    (folder / "options.json").write_text(json.dumps({"prior": {"steps": 3, "guidence": 1.0}}))
    with pytest.raises(
        ValueError, match=r"options\.json: prior\.guidence is unknown; did you mean 'guidance'"
    ):
        unclip.load("emoji")
    (folder / "options.json").write_text("{")
    with pytest.raises(ValueError, match=r"options\.json is not valid JSON"):
        unclip.load("emoji")
    (folder / "model.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.json has format None version None"):
        unclip.load("emoji")
