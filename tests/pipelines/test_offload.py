"""Offloading: one network in memory at a time, and the same images."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
    """A pipeline to modify, with two networks in its upsampler."""
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


def generate(pipe, prompts=("a red apple", "a blue fish"), **changes) -> list[bytes]:
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
    """Record which networks are in memory after each change of the active one."""
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
def test_offloading_keeps_one_network_in_memory_and_the_images(pipe, dtype):
    expected = generate(pipe.to(dtype=dtype))
    assert pipe.offload() is pipe and pipe.offloaded
    assert (pipe.device, pipe.dtype) == (CPU, dtype)
    seen = watched(pipe)
    assert generate(pipe) == expected
    first_call = [
        "CLIP",
        "DiffusionPrior",
        "Decoder",
        "CLIP",
        "Decoder",
        "UNet",
        "UNet",
    ]  # "" is encoded once
    assert seen == [[name] for name in first_call[:-1]]  # the U-Nets have equal names
    assert generate(pipe) == expected and generate(pipe) == expected
    assert seen[6:10] == [["CLIP"], ["DiffusionPrior"], ["Decoder"], ["UNet"]]


def test_threads_may_call_an_offloaded_pipeline(pipe):
    def call(seed: int) -> bytes:
        return pipe("a red apple", seed=seed, progress=False).images[0].tobytes()

    expected = [call(seed) for seed in range(8)]
    pipe.offload()
    with ThreadPoolExecutor(4) as pool:
        images = pool.map(call, range(8))
        encoded = pool.map(lambda text: pipe.encode_text(text).emb, ["a red apple"] * 4)
        assert [*images] == expected
        assert all(len(emb) == 1 for emb in encoded)


def test_copies_of_an_offloaded_pipeline_share_its_files(pipe):
    expected = generate(pipe)
    copied = copy.deepcopy(pipe.offload())
    with pytest.raises(ValueError, match="an offloaded pipeline cannot be pickled"):
        pickle.dumps(copied)
    folder = Path(pipe.runtime.offloader._folder.name)
    del pipe.runtime.offloader
    gc.collect()
    assert folder.exists() and generate(copied) == expected


def test_offloaded_inversion_and_variation(pipe, invertible_pipe):
    still = copy.deepcopy(invertible_pipe)
    photo = still("a red apple", seed=0, progress=False).images[0]
    expected = still.reconstruct(still.invert(photo, progress=False), progress=False).images[0]
    still.offload()
    assert (
        still.reconstruct(still.invert(photo, progress=False), progress=False).images[0] == expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_with_offload(pipe, tmp_path, dtype, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    expected = generate(unclip.load(tmp_path / "model", "cpu", dtype))
    loaded, add = [], Offloader.add

    def watch(self: Offloader, module: nn.Module) -> None:
        mapped = [p for p in module.parameters() if not p.is_meta]
        loaded.append({p.dtype for p in mapped})
        add(self, module)
        assert all(p.is_meta for p in module.parameters())

    monkeypatch.setattr(Offloader, "add", watch)
    offloaded = unclip.load(tmp_path / "model", "cpu", dtype, offload=True)
    assert loaded == [{torch.float32}] * 5  # tensors are cast one by one while written
    assert offloaded.offloaded and offloaded.dtype == dtype
    assert generate(offloaded) == expected


def test_offloaded_dalle(tiny_dalle, tiny_dalle_folder):
    options = CodeOptions(guidance=2.0)
    expected = generate(tiny_dalle, options=options, num_images=2, batch_size=2)
    best = tiny_dalle("a red apple", num_candidates=3, seed=0, progress=False)
    pipe = unclip.load(tiny_dalle_folder, "cpu", offload=True)
    seen = watched(pipe)
    assert generate(pipe, options=options, num_images=2, batch_size=2) == expected
    assert [names[0] for names in seen] == ["DALLE", "DVAE"] * 2 and {
        len(names) for names in seen
    } == {1}
    chosen = pipe("a red apple", num_candidates=3, seed=0, progress=False)
    assert (chosen.images, chosen.scores) == (best.images, best.scores)
    with pytest.raises(ValueError, match="offloaded; compute the bound"):
        pipe.elbo(best.images, ["a red apple"])


@pytest.mark.parametrize("embedding", ["text", "none"])
def test_images_of_text_embeddings_are_the_same_while_offloaded(pipe, embedding):
    options = replace(pipe.options, embedding=embedding)
    expected = generate(pipe, options=options)
    pipe.offload()
    assert generate(pipe, options=options) == expected


def test_priors_are_exchanged_while_offloaded(pipe):
    torch.manual_seed(7)
    other = scrambled(tiny_prior())
    first, before = pipe.prior, generate(pipe)
    pipe.prior = copy.deepcopy(other)
    expected = generate(pipe)
    assert expected != before
    pipe.prior = first
    pipe.offload()
    assert generate(pipe) == before
    pipe.prior = other
    assert in_memory([first, other]) == []
    assert generate(pipe) == expected
    pipe.prior = first
    assert generate(pipe) == before


def test_offload_files_are_deleted_with_the_pipeline(tiny_pipe):
    pipe = copy.deepcopy(tiny_pipe)
    folder = Path(pipe.offload().runtime.offloader._folder.name)
    sizes = {file.stat().st_size for file in folder.iterdir()}
    modules = parts([pipe.clip, *pipe.networks().values()])
    assert sizes == {
        sum(tensor.nbytes for tensor in module.state_dict().values()) for module in modules
    }
    del pipe
    assert not folder.exists()


def test_a_truncated_offload_file_is_an_error(tmp_path):
    module = nn.Linear(4, 4)
    waiting = OnDisk(module, tmp_path / "0", lambda x: x)
    (tmp_path / "0").write_bytes(b"\0" * 70)
    with pytest.raises(OSError, match="0 was truncated while in use; load the model again"):
        waiting.fetch()


def test_unsupported_calls_on_offloaded_models_are_rejected(pipe, tmp_path):
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


def test_modules_on_disk_keep_layout_and_dtype():
    """Every tensor keeps its memory format and dtype."""
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
