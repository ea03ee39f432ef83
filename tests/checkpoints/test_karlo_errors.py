"""Damaged, incomplete or unsupported folders in diffusers' layout: errors of one line."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import karlo
import pytest
import torch
from safetensors.torch import load_file, save_file

import unclip
from unclip.cli.main import main


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return karlo.write(karlo.text_to_image(), tmp_path_factory.mktemp("text") / "karlo")


@pytest.fixture(scope="module")
def whole_with_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return karlo.write(karlo.image_variation(), tmp_path_factory.mktemp("images") / "karlo")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "karlo"))


@pytest.fixture
def with_images(whole_with_images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_with_images, tmp_path / "karlo"))


def weights(folder: Path, component: str) -> Path:
    return next((folder / component).glob("*.safetensors"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def assert_refused(folder: Path, *message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        unclip.load(folder, "cpu")
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in message), text


NAMES = {
    "prior": "transformer_blocks.1.attn1.to_k.bias",
    "decoder": "mid_block.attentions.0.add_v_proj.weight",
    "text_proj": "learned_classifier_free_guidance_embeddings",
    "super_res_last": "up_blocks.0.upsamplers.0.conv2.weight",
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
}
BAD_TENSORS: dict[str, Callable[[dict[str, torch.Tensor], str], str]] = {
    "missing": lambda state, name: f"missing: {name}" if state.pop(name) is not None else "",
    "extra": lambda state, name: state.update(more=torch.ones(1)) or "unexpected: more",
    "misshaped": lambda state, name: (
        state.update({name: state[name][:-1]}) or f"of another shape: {name} is"
    ),
}


@pytest.mark.parametrize(("component", "name"), NAMES.items())
@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_missing_unexpected_and_misshaped_tensors_are_named(
    folder: Path, component: str, name: str, fault: str
) -> None:
    file = weights(folder, component)
    state = load_file(file)
    message = BAD_TENSORS[fault](state, name)
    save_file(state, file)
    assert_refused(folder, str(file), "does not fit", message)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_truncated_file_is_refused(folder: Path, ending: str) -> None:
    file = weights(folder, "decoder")
    if ending == "bin":
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
        file = file.with_suffix(".bin")
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(folder, str(file), "truncated")


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("place", ["whole", "next to the weights"])
def test_a_malicious_pickle_does_not_run(folder: Path, tmp_path: Path, place: str) -> None:
    safe = weights(folder, "prior")
    file, code = safe.with_suffix(".bin"), Malicious(tmp_path / "mark")
    torch.save(code if place == "whole" else {**load_file(safe), "proj_in.weight": code}, file)
    safe.unlink()
    assert_refused(folder, str(file), "expected a state dict")
    assert main(["info", str(folder)]) == 2
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("text_proj", "text_proj is missing; model_index.json names it"),
        ("tokenizer/merges.txt", "tokenizer/merges.txt is missing"),
        ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer_config.json is missing"),
        ("super_res_last/config.json", "super_res_last/config.json is missing"),
        (
            "prior_scheduler/scheduler_config.json",
            "prior_scheduler/scheduler_config.json is missing",
        ),
        (
            "decoder/diffusion_pytorch_model.safetensors",
            "decoder has no weights; expected a .safetensors or .bin",
        ),
    ],
)
def test_missing_files_are_named(folder: Path, gone: str, message: str) -> None:
    place = folder / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert_refused(folder, message)


def test_missing_shards_are_named(folder: Path) -> None:
    shard = folder / "decoder" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    weights(folder, "decoder").rename(shard)
    index = folder / "decoder" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": "other.safetensors"}}))
    assert_refused(folder, "other.safetensors is missing", index.name)
    index.write_text("{}")
    assert_refused(folder, str(index), "has no weight_map")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "_class_name is 'StableDiffusionPipeline'; expected UnCLIPPipeline",
        ),
        (
            {"prior": ["transformers", "GPT2Model"]},
            "prior is of class 'GPT2Model'; expected PriorTransformer",
        ),
        ({"decoder": "UNet"}, "decoder is of class 'UNet'; expected UNet2DConditionModel"),
        (
            {"safety_checker": ["transformers", "Checker"]},
            "unknown component safety_checker (Checker)",
        ),
        ({"text_proj": [None, None]}, "has no text_proj; UnCLIPPipeline needs it"),
    ],
)
def test_unsupported_indices_are_refused(
    folder: Path, entries: dict[str, Any], message: str
) -> None:
    change(folder / "model_index.json", **entries)
    assert_refused(folder, str(folder / "model_index.json"), message)


@pytest.mark.parametrize(
    ("component", "settings", "message"),
    [
        ("prior", {"norm_in_type": "layer"}, "norm_in_type is 'layer'; only None is supported"),
        ("prior", {"added_emb_type": None}, "added_emb_type is None; only 'prd' is supported"),
        ("prior", {"clip_embed_dim": 20}, "clip_embed_dim is 20; only 16 is supported"),
        (
            "prior",
            {"_class_name": "Transformer2DModel"},
            "_class_name is 'Transformer2DModel'; expected 'PriorTr",
        ),
        (
            "prior",
            {"num_attention_heads": "four"},
            "num_attention_heads is 'four'; expected a number",
        ),
        (
            "decoder",
            {"class_embed_type": "timestep"},
            "class_embed_type is 'timestep'; only 'identity' is supported",
        ),
        (
            "decoder",
            {"only_cross_attention": True},
            "only_cross_attention is True; this setting is not supported",
        ),
        ("decoder", {"norm_eps": 1e-6}, "norm_eps is 1e-06; only 1e-05 is supported"),
        (
            "decoder",
            {"down_block_types": ["DownBlock2D"] * 2},
            "down_block_types has 'DownBlock2D'; only Resnet",
        ),
        ("decoder", {"up_block_types": ["ResnetUpsampleBlock2D"] * 2}, "up_block_types is"),
        (
            "decoder",
            {"block_out_channels": [16]},
            "block_out_channels, layers_per_block and down_block_types",
        ),
        (
            "decoder",
            {"attention_head_dim": [8, 16]},
            "attention_head_dim is [8, 16]; expected equal numbers",
        ),
        (
            "decoder",
            {"resnet_time_scale_shift": "spatial"},
            "resnet_time_scale_shift is 'spatial'; expected",
        ),
        ("decoder", {"out_channels": 3}, "unet has 3 channels in and 3 out"),
        ("decoder", {"norm_num_groups": 7}, "channels is 16; expected a multiple of groups = 7"),
        ("text_proj", {"time_embed_dim": 60}, "time_embed_dim is 60, the decoder has 64"),
        (
            "super_res_first",
            {"add_attention": True},
            "add_attention is True; only False is supported",
        ),
        ("super_res_first", {"sample_size": 48}, "sample_size is 64; expected 48"),
        ("super_res_first", {"in_channels": 3}, "unet has 3 channels in and 3 out"),
        (
            "text_encoder",
            {"hidden_act": "relu"},
            "hidden_act is relu; expected quick_gelu or gelu",
        ),
        ("text_encoder", {"hidden_size": None}, "hidden_size is None; expected an integer"),
        (
            "text_encoder",
            {"vocab_size": 700},
            "has 714 tokens, but the text encoder has 700",
        ),
        (
            "text_encoder",
            {"max_position_embeddings": 20},
            "model_max_length is 16; expected 20",
        ),
        ("prior_scheduler", {"prediction_type": "epsilon"}, "expected prediction_type 'sample'"),
        (
            "decoder_scheduler",
            {"beta_schedule": "linear"},
            "beta_schedule is 'linear'; only 'squaredcos_cap_v2' is",
        ),
        (
            "decoder_scheduler",
            {"prediction_type": "v_prediction"},
            "prediction_type is 'v_prediction'; expected eps",
        ),
        (
            "decoder_scheduler",
            {"variance_type": "fixed_large"},
            "variance_type is 'fixed_large'; expected fixed_small",
        ),
        (
            "super_res_scheduler",
            {"clip_sample": False},
            "clip_sample_range is off; expected 1",
        ),
        ("super_res_scheduler", {"_class_name": "DDPMScheduler"}, "expected 'UnCLIPScheduler'"),
    ],
)
def test_unsupported_settings_are_refused(
    folder: Path, component: str, settings: dict[str, Any], message: str
) -> None:
    change(next((folder / component).glob("*config.json")), **settings)
    assert_refused(folder, str(folder), message)


@pytest.mark.parametrize(
    ("component", "settings", "message"),
    [
        (
            "image_encoder",
            {"hidden_act": "gelu"},
            "do not fit together: embed_dim 16 and 16, quick_gelu False and True",
        ),
        ("image_encoder", {"num_channels": 4}, "num_channels is 4; expected 3"),
        ("feature_extractor", {"size": {"shortest_edge": 40}}, "size is {'shortest_edge': 40}"),
        (
            "feature_extractor",
            {"resample": 1},
            "resample is 1; expected 3 (bicubic) or 2 (bilinear)",
        ),
        (
            "feature_extractor",
            {"do_normalize": False},
            "do_normalize is False, which is not supported",
        ),
    ],
)
def test_unsupported_image_settings_are_refused(
    with_images: Path, component: str, settings: dict[str, Any], message: str
) -> None:
    change(next((with_images / component).glob("*config.json")), **settings)
    assert_refused(with_images, str(with_images), message)


def test_damaged_tokenizers_are_refused(folder: Path) -> None:
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b c\n")
    assert_refused(folder, "tokenizer/merges.txt: 'a b c' is not a merge of two tokens")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nq# x#\n")
    assert_refused(
        folder, str(folder / "tokenizer"), "is not a CLIP tokenizer", "`q#` out of vocabulary"
    )
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    assert_refused(folder, "tokenizer/tokenizer.json is not a tokenizer")


def test_the_command_line_prints_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "prior")
    assert main(["generate", "a", "--model", str(folder), "--quiet"]) == 2
    assert re.fullmatch(
        r"error: \S+prior is missing; model_index.json names it\n", capsys.readouterr().err
    )
