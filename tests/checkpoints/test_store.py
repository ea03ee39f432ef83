"""Our own format: lossless, written atomically, loaded strictly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import scrambled, tiny_decoder, tiny_prior, tiny_upsampler
from safetensors.torch import load_file, save_file

import unclip
from unclip.checkpoints import folders, store, summary
from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.registry import load_any
from unclip.cli.main import main
from unclip.diffusion.schedules import ScheduleConfig
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.weights import save_tensors


@pytest.mark.parametrize("make", [tiny_prior, tiny_decoder, tiny_upsampler])
def test_a_component_is_saved_and_loaded_unchanged(make, tmp_path):
    module = scrambled(make())
    schedule = ScheduleConfig("linear", num_timesteps=200)
    store.save_component(module, tmp_path / "net", schedule=schedule)
    again = store.load_component(tmp_path / "net")

    assert type(again) is type(module) and again.config == module.config
    assert store.load_schedule(tmp_path / "net") == schedule
    assert not again.training
    expected = module.state_dict()
    assert list(again.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_parameters_are_cast_but_statistics_stay_float32(tmp_path):
    prior = tiny_prior()
    store.save_component(prior, tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {
        torch.float16
    }

    wide, narrow = store.load_component(tmp_path), store.load_component(tmp_path, torch.bfloat16)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.query, prior.query.half().float())
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert narrow.emb_std.dtype == torch.float32


def test_loading_initialises_nothing(tmp_path):
    store.save_component(tiny_prior(), tmp_path)
    before = torch.get_rng_state()
    store.load_component(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_independent_of_their_file(tmp_path):
    prior = tiny_prior()
    store.save_component(prior, tmp_path)
    loaded = store.load_component(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(loaded.positions, prior.positions)


def test_file_permissions_follow_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    store.save_component(tiny_prior(), tmp_path)
    save_tensors({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    for name in ("model.safetensors", "x.safetensors"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tensors_that_do_not_fit_are_named(tmp_path):
    store.save_component(tiny_prior(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["head.weight"]
    tensors["surplus"] = torch.zeros(1)
    tensors["query"] = torch.zeros(5)
    save_file(tensors, file)
    with pytest.raises(ValueError) as caught:
        store.load_component(tmp_path)
    for part in (
        str(file),
        "missing: head.weight",
        "unexpected: surplus",
        "query is (5,), expected (32,)",
    ):
        assert part in str(caught.value)


def test_a_truncated_file_is_named(tiny_folder, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    file = folder / "decoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"decoder.model\.safetensors is truncated"):
        unclip.load(folder)
    with pytest.raises(ValueError, match=r"decoder.model\.safetensors is truncated"):
        summary.describe(folder)


def test_an_unknown_config_key_is_named(tmp_path):
    store.save_component(tiny_prior(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hedas": 4}))
    with pytest.raises(ValueError, match="hedas is unknown; did you mean 'heads'"):
        store.load_component(tmp_path)


def test_a_saved_model_gives_the_same_images(tiny_pipe, tiny_folder):
    loaded = unclip.load(tiny_folder, "cpu")
    assert (loaded.name, loaded.licence, loaded.options) == ("tiny", "MIT", tiny_pipe.options)
    assert loaded.schedules["upsampler_0"].config.kind == "linear"
    images = [
        pipe("a red apple", seed=3, progress=False).images[0].tobytes()
        for pipe in (tiny_pipe, loaded)
    ]
    assert images[0] == images[1]


def test_a_model_without_prior_or_upsampler_is_saved(tiny_pipe, tmp_path):
    pipe = UnCLIPPipeline(tiny_pipe.clip, None, tiny_pipe.decoder)
    pipe.save_pretrained(tmp_path / "bare")
    loaded = UnCLIPPipeline.from_pretrained(tmp_path / "bare")
    assert loaded.prior is None and loaded.upsamplers == ()


def test_a_failed_write_leaves_the_old_model_unchanged(tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    before = {
        file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }
    pipe = unclip.load(folder)

    def full(module, file, dtype=None):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_tensors", full)
    with pytest.raises(OSError, match="No space left on device.*untouched"):
        pipe.save_pretrained(folder)
    assert {
        file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    } == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_model_can_be_saved_over_itself(tiny_folder, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    (folder / "README.md").write_text("its card")
    (folder / "decoder" / "old.json").write_text("{}")
    pipe = unclip.load(folder)
    UnCLIPPipeline(pipe.clip, pipe.prior, pipe.decoder, name="renamed").save_pretrained(folder)
    assert unclip.load(folder).name == "renamed"
    assert (folder / "README.md").read_text() == "its card"
    assert not (folder / "upsampler_0").exists()  # a component is replaced as a whole
    assert not (folder / "decoder" / "old.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_other_files_in_a_model_folder_are_kept(tiny_pipe, tiny_folder, tmp_path):
    folder = tmp_path / "tiny"
    bare = UnCLIPPipeline(tiny_pipe.clip, None, tiny_pipe.decoder)
    bare.save_pretrained(folder)
    (folder / "images" / "best").mkdir(parents=True)
    image, link = folder / "images" / "best" / "apple.png", folder / "images" / "link"
    image.write_bytes(b"apple")
    image.chmod(0o444)
    link.symlink_to("nowhere")
    bare.save_pretrained(folder)
    assert main(["convert", str(tiny_folder), str(folder)]) == 0
    assert image.read_bytes() == b"apple" and str(link.readlink()) == "nowhere"

    bare.save_pretrained(folder)
    (folder / "prior").mkdir()
    with pytest.raises(ValueError, match=r"tiny.prior would be overwritten .*; move it away"):
        tiny_pipe.save_pretrained(folder)
    assert unclip.load(folder).prior is None and image.is_file() and (folder / "prior").is_dir()


def test_a_model_card_may_exist_before_the_model(tiny_pipe, tmp_path):
    (tmp_path / "README.md").write_text("its card")
    tiny_pipe.save_pretrained(tmp_path)
    assert (
        unclip.load(tmp_path).name == tiny_pipe.name
        and (tmp_path / "README.md").read_text() == "its card"
    )


def test_a_folder_with_other_content_is_not_replaced(tiny_pipe, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not a model folder"):
        tiny_pipe.save_pretrained(tmp_path)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "dear"
    tiny_pipe.clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="is not a model folder"):
        tiny_pipe.save_pretrained(tmp_path / "clip")


def test_a_newer_version_is_refused(tiny_folder, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    model = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**model, "version": 2}))
    with pytest.raises(ValueError, match="version 2; expected 'unclip' version 1"):
        load_any(folder)
    (folder / "model.json").write_text(json.dumps({**model, "components": [1, None]}))
    with pytest.raises(ValueError, match=r"components are \[1, None\]; expected names"):
        load_any(folder)


def test_a_folder_of_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a model of a known format"):
        unclip.load(tmp_path)


def test_descriptions_count_stored_parameters(tiny_pipe, tiny_folder):
    described = {part.name: part for part in summary.describe(tiny_folder)}
    assert list(described) == ["clip", "prior", "decoder", "upsampler_0"]
    for name, network in tiny_pipe.networks().items():
        assert described[name].parameters == sum(
            tensor.numel() for tensor in network.state_dict().values()
        )
        assert described[name].dtypes == ("F32",)


def test_bundled_models_are_found_in_a_checkout_and_in_a_wheel(tiny_folder, tmp_path, monkeypatch):
    for package, assets in (
        (tmp_path / "a/unclip", tmp_path / "a/assets"),
        (tmp_path / "b", tmp_path / "b/assets"),
    ):
        shutil.copytree(tiny_folder, assets / "emoji")
        (assets / "images").mkdir()
        monkeypatch.setattr(folders, "_PACKAGE", package)
        assert folders.bundled_models() == {"emoji": assets / "emoji"}
        assert folders.locate("emoji") == assets / "emoji"


def test_a_component_can_be_shared_with_a_bundled_model(
    tiny_folder, tiny_dalle, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(folders, "_PACKAGE", tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "assets" / "emoji")
    parts = {"tokenizer": tiny_dalle.tokenizer, **tiny_dalle.networks()}
    bundle = Bundle("dalle", parts, {}, tiny_dalle.options, "second", "MIT")
    folder = tmp_path / "assets" / "second"
    store.save_bundle(bundle, folder, shared_from={"clip": "emoji"})
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "tokenizer",
        "codec",
        "dalle",
    }
    borrowing = unclip.load("second")
    lent = unclip.load("emoji").clip
    assert all(
        torch.equal(a, b)
        for a, b in zip(borrowing.clip.parameters(), lent.parameters(), strict=True)
    )
    assert borrowing("a fish", num_candidates=2, progress=False).scores is not None

    described = {part.name: part for part in summary.describe(folder)}
    assert {name: part.shared_from for name, part in described.items()} == {
        "clip": "emoji",
        "codec": None,
        "dalle": None,
    }
    assert main(["info", "second"]) == main(["models"]) == 0
    output = capsys.readouterr().out
    assert "F32, from emoji" in output and output.count("from emoji") == 1
    borrowing.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "clip").is_dir() and not folders.shared_from(tmp_path / "whole")

    shutil.rmtree(tmp_path / "assets" / "emoji")
    for ask in (unclip.load, summary.describe):
        with pytest.raises(
            ValueError,
            match=r"takes clip from 'emoji'; expected a bundled model with it \(bundled: second\)$",
        ):
            ask(folder)
    model = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**model, "borrowed": ["clip"]}))
    with pytest.raises(ValueError, match="borrowed is .*; expected a mapping"):
        unclip.load(folder)


def test_an_unknown_name_lists_the_bundled_models(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "assets" / "emoji")
    monkeypatch.setattr(folders, "_PACKAGE", tmp_path)
    with pytest.raises(ValueError, match="unknown model 'emojis'; bundled models: emoji; or give"):
        unclip.load("emojis")


def test_a_hub_id_without_a_network_is_an_error(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match="'someone/unclip-test' is not a local folder.*cannot be reached"
    ):
        unclip.load("someone/unclip-test")


@pytest.mark.parametrize("name", ["../decoder", "/decoder", "a/b", "", "."])
def test_a_component_is_a_folder_of_the_model(name, tiny_folder, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    model = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**model, "components": ["clip", name]}))
    with pytest.raises(ValueError, match="expected names"):
        load_any(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", 1, [], None])
def test_a_shard_is_a_file_of_the_component(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="expected a file in the same folder"):
        folders.weight_files(tmp_path)


def test_a_network_that_would_fill_the_memory_is_refused(tmp_path):
    for file, key in (("config.json", "depth"), ("schedule.json", "num_timesteps")):
        store.save_component(tiny_prior(), tmp_path, schedule=ScheduleConfig())
        data = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps({**data, key: 10**9}))
        with pytest.raises(ValueError, match=f"{file} .*too many layers|expected at most"):
            store.load_prior(tmp_path)
