"""One network in memory at a time, and the same pictures."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import scrambled, tiny_prior, tiny_unet, tiny_upsampler
from torch import nn

import unclip
from unclip.models.unclip.prior import DiffusionPrior
from unclip.pipelines.offload import Offloader, OnDisk, parts
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import CodeOptions, StageOptions

CPU = torch.device("cpu")


@pytest.fixture
def pipe(tiny_pipe) -> UnCLIPPipeline:
    """With two networks in its upsampler; to be changed."""
    torch.manual_seed(0)
    networks = [
        copy.deepcopy(module) for module in (tiny_pipe.clip, tiny_pipe.prior, tiny_pipe.decoder)
    ]
    upsampler = scrambled(tiny_upsampler(last_unet=tiny_unet(6, 3)))
    pipe = UnCLIPPipeline(*networks, [upsampler], name="two")
    pipe.options = type(pipe.options)(
        StageOptions(3, 2.0), StageOptions(3, 3.0), (StageOptions(3),)
    )
    return pipe


def draw(pipe, prompts=("a red apple", "a blue fish"), **changes) -> list[bytes]:
    return [
        image.tobytes() for image in pipe(list(prompts), seed=3, progress=False, **changes).images
    ]


def in_memory(modules: list[nn.Module]) -> list[str]:
    return [
        type(module).__name__
        for module in modules
        if not any(p.is_meta for p in module.parameters())
    ]


def watched(pipe) -> list[list[str]]:
    """What of the pipeline is in memory after each change of the network that computes."""
    modules, seen, use = (
        parts([pipe.clip, *pipe.networks().values()]),
        [],
        pipe.runtime.offloader.use,
    )

    def watching(module: nn.Module) -> None:
        use(module)
        if (here := in_memory(modules)) not in seen[-1:]:
            seen.append(here)

    pipe.runtime.offloader.use = watching
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pictures_are_the_same_and_one_network_is_in_memory(pipe, dtype):
    expected = draw(pipe.to(dtype=dtype))
    assert pipe.offload() is pipe and pipe.offloaded
    assert (pipe.device, pipe.dtype) == (CPU, dtype)
    seen = watched(pipe)
    assert draw(pipe) == expected
    first_call = [
        "CLIP",
        "DiffusionPrior",
        "Decoder",
        "CLIP",
        "Decoder",
        "UNet",
        "UNet",
    ]  # "" is encoded once
    assert seen == [[name] for name in first_call[:-1]]  # the U-Nets are alike
    assert draw(pipe) == expected and draw(pipe) == expected
    assert seen[6:10] == [["CLIP"], ["DiffusionPrior"], ["Decoder"], ["UNet"]]


def test_pictures_are_inverted_and_varied_too(pipe, invertible_pipe):
    still = copy.deepcopy(invertible_pipe)
    picture = still("a red apple", seed=0, progress=False).images[0]
    expected = still.reconstruct(still.invert(picture, progress=False), progress=False).images[0]
    still.offload()
    assert (
        still.reconstruct(still.invert(picture, progress=False), progress=False).images[0]
        == expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_offloaded_from_the_beginning(pipe, tmp_path, dtype, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    expected = draw(unclip.load(tmp_path / "model", "cpu", dtype))
    loaded, add = [], Offloader.add

    def watch(self: Offloader, module: nn.Module) -> None:
        mapped = [p for p in module.parameters() if not p.is_meta]
        loaded.append({p.dtype for p in mapped})
        add(self, module)
        assert all(p.is_meta for p in module.parameters())

    monkeypatch.setattr(Offloader, "add", watch)
    offloaded = unclip.load(tmp_path / "model", "cpu", dtype, offload=True)
    assert loaded == [{torch.float32}] * 5  # cast on their way to the disk, tensor by tensor
    assert offloaded.offloaded and offloaded.dtype == dtype
    assert draw(offloaded) == expected


def test_dalle_is_offloaded_too(tiny_dalle, tiny_dalle_folder):
    options = CodeOptions(guidance=2.0)
    expected = draw(tiny_dalle, options=options, num_images=2, batch_size=2)
    best = tiny_dalle("a red apple", num_candidates=3, seed=0, progress=False)
    pipe = unclip.load(tiny_dalle_folder, "cpu", offload=True)
    seen = watched(pipe)
    assert draw(pipe, options=options, num_images=2, batch_size=2) == expected
    assert [names[0] for names in seen] == ["DALLE", "DVAE"] * 2 and {
        len(names) for names in seen
    } == {1}
    chosen = pipe("a red apple", num_candidates=3, seed=0, progress=False)
    assert (chosen.images, chosen.scores) == (best.images, best.scores)
    with pytest.raises(ValueError, match="the bound needs both in memory"):
        pipe.elbo(best.images, ["a red apple"])


def test_another_prior_and_back_again(pipe):
    torch.manual_seed(7)
    other = scrambled(tiny_prior())
    first, before = pipe.prior, draw(pipe)
    pipe.prior = copy.deepcopy(other)
    expected = draw(pipe)
    assert expected != before
    pipe.prior = first
    pipe.offload()
    assert draw(pipe) == before
    pipe.prior = other
    assert in_memory([first, other]) == []
    assert draw(pipe) == expected
    pipe.prior = first
    assert draw(pipe) == before


def test_files_go_with_the_pipeline(tiny_pipe):
    pipe = copy.deepcopy(tiny_pipe)
    folder = Path(pipe.offload().runtime.offloader._folder.name)
    sizes = {file.stat().st_size for file in folder.iterdir()}
    modules = parts([pipe.clip, *pipe.networks().values()])
    assert sizes == {
        sum(tensor.nbytes for tensor in module.state_dict().values()) for module in modules
    }
    del pipe
    assert not folder.exists()


def test_a_file_that_was_cut_off_is_told(tmp_path):
    module = nn.Linear(4, 4)
    waiting = OnDisk(module, tmp_path / "0", lambda x: x)
    (tmp_path / "0").write_bytes(b"\0" * 70)
    with pytest.raises(
        OSError, match="0 has been cut off while the model was in use; load it again"
    ):
        waiting.fetch()


def test_what_an_offloaded_model_cannot_do_is_told(pipe, tmp_path):
    pipe.offload()
    assert pipe.offload("cpu") is pipe
    for call, message in {
        lambda: pipe.to(
            dtype=torch.bfloat16
        ): r"the networks are offloaded; call to\(\) before offload\(\)",
        lambda: (
            pipe.quantize()
        ): r"the networks are offloaded; call quantize\(\) before offload\(\)",
        lambda: unclip.compile(pipe): "the networks are offloaded",
        lambda: pipe.save_pretrained(
            tmp_path / "model"
        ): r"the networks are offloaded; save a model before offload\(\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "model").exists()


def test_what_is_kept_on_the_disk_is_what_was_there():
    """Layout and dtype of every tensor, whatever the order of its numbers in memory."""
    module = DiffusionPrior(tiny_prior().config).bfloat16()
    module.register_parameter(
        "picture", nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    )
    module.register_buffer("count", torch.tensor(7))
    before = {
        name: (tensor.clone(), tensor.stride()) for name, tensor in module.state_dict().items()
    }
    residency = Offloader(CPU)
    residency.add(module)
    residency.use(module)
    for name, tensor in module.state_dict().items():
        expected, stride = before[name]
        assert torch.equal(tensor, expected) and (tensor.dtype, tensor.stride()) == (
            expected.dtype,
            stride,
        )
