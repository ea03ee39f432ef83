"""The CLIP wrapper against open_clip itself."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forks import fork, wait
from PIL import Image

from unclip.clip import CLIP, CLIPConfig, contrastive_loss, open_clip
from unclip.tokenizer import BPETokenizer
from unclip.weights import load_strictly

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"width": 32, "heads": 2, "layers": 2}


def make(**model_cfg) -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        CLIPConfig({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, **model_cfg})
    ).eval()


@pytest.fixture(scope="module")
def clip():
    return make()


@pytest.fixture(scope="module")
def custom():
    """A CustomTextCLIP with a BPETokenizer, which pools at the end token."""
    tokenizer = BPETokenizer.train(
        ["a red apple", "a green pear"], vocab_size=300, context_length=10
    )
    text = {
        **TEXT,
        "context_length": 10,
        "vocab_size": 300,
        "pool_type": "eos",
        "eos_id": tokenizer.end_id,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        {"embed_dim": 16, "custom_text": True, "vision_cfg": VISION, "text_cfg": text}
    )
    return CLIP(config, tokenizer).eval()


def test_embeddings_equal_open_clips(clip, custom):
    with torch.no_grad():
        for model in (clip, custom):
            text = model.encode_text(["a red apple", "!"])
            theirs = model.model.encode_text(text.ids)
            torch.testing.assert_close(text.emb, theirs[0] if isinstance(theirs, tuple) else theirs)
            images = torch.rand(2, 3, 32, 32) * 2 - 1
            mean, std = torch.tensor(model.preprocess.mean), torch.tensor(model.preprocess.std)
            pixels = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
            torch.testing.assert_close(model.encode_image(images), model.model.encode_image(pixels))


def test_the_embedding_is_pooled_from_the_states(clip, custom):
    with torch.no_grad():
        for model, projection in (
            (clip, clip.model.text_projection),
            (custom, custom.model.text.text_projection),
        ):
            text = model.encode_text(["a red apple", "pear"])
            assert text.states.shape == (2, model.context_length, model.text_width)
            # After the final LayerNorm, at the end token.
            last = text.states[torch.arange(2), text.mask.sum(1) - 1]
            torch.testing.assert_close(text.emb, last @ projection)


def test_the_mask_includes_an_exclamation_mark_with_the_pad_id(clip):
    text = clip.encode_text(["!~", "a", ""])
    assert text.ids[0, 1] == 0  # "!" is token 0, which is also the pad token
    assert text.mask.sum(1).tolist() == [4, 3, 2]


@pytest.mark.filterwarnings("ignore:.*have more than 8 tokens")  # the context of "custom"
@pytest.mark.parametrize("which", ["clip", "custom"])
def test_captions_of_different_lengths_are_encoded_as_alone(which, request):
    clip = request.getfixturevalue(which)
    texts = ["a red apple", "x", "", "a red apple and a blue fish", "two fish"]
    encoding, whole = clip.encode_captions(texts, batch_size=2), clip.encode_text(texts).trim()
    assert torch.equal(encoding.mask, whole.mask)
    torch.testing.assert_close(encoding.emb, whole.emb, atol=1e-5, rtol=1e-5)
    real = whole.mask
    torch.testing.assert_close(encoding.states[real], whole.states[real], atol=1e-5, rtol=1e-5)


def test_only_the_tokens_of_captions_are_computed(custom):
    lengths = []
    hook = custom.model.text.transformer.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    custom.encode_captions(["a red apple", "x"], batch_size=1)
    hook.remove()
    assert lengths[0] < lengths[1] < custom.context_length
    assert custom.model.text.attn_mask.shape[0] == custom.context_length


def test_long_prompts_are_truncated_with_a_warning_that_shows_the_cut(clip):
    with pytest.warns(UserWarning, match="more than 75 tokens.*the end'"):
        clip.encode_text(["apple " * 80 + "the end"])


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (20, 30)])
def test_pil_images_and_tensors_are_prepared_alike(clip, size):
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    tensor = torch.from_numpy(ramp).permute(2, 0, 1)[None] / 127.5 - 1
    a, b = clip.prepare([Image.fromarray(ramp)]), clip.prepare(tensor)
    assert a.shape == b.shape == (1, 3, 32, 32)
    assert (a - b).abs().mean() < 0.02  # PIL rounds to 8 bits between its two passes


def test_a_saved_model_loads_unchanged(custom, clip, tmp_path):
    for model in (custom, clip):
        model.save_pretrained(tmp_path / "clip")
        again = CLIP.from_pretrained(tmp_path / "clip")
        with torch.no_grad():
            torch.testing.assert_close(
                again.encode_text(["a pear"]).emb, model.encode_text(["a pear"]).emb
            )
        assert again.emb_dim == 16 and again.image_size == 32
        (tmp_path / "clip" / "tokenizer.json").unlink(missing_ok=True)


def test_half_precision_files_are_half_the_size_and_load_as_float32(custom, tmp_path):
    custom.save_pretrained(tmp_path / "full")
    custom.save_pretrained(tmp_path / "half", torch.float16)
    full, half = (
        (tmp_path / n / "open_clip_model.safetensors").stat().st_size for n in ("full", "half")
    )
    assert half < 0.6 * full
    assert CLIP.from_pretrained(tmp_path / "half").logit_scale.dtype == torch.float32


def test_open_clip_loads_a_saved_folder(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    ids, _ = clip.tokenizer(["a red apple"])
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_text(ids), clip.model.encode_text(ids))


def test_incomplete_and_truncated_folders_are_errors(custom, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"open_clip_config.json is missing"):
        CLIP.from_pretrained(tmp_path)
    custom.save_pretrained(tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "config.json: model_cfg.text_cfg is None; expected a mapping"),
        ('{"model_cfg": [2]}', r"model_cfg is \[2\]; expected a mapping"),
        ('{"model_cfg": {"text_cfg": 1}}', "model_cfg.text_cfg is 1; expected a mapping"),
        ('{"model_cfg": {"text_cfg": {}}, "preprocess_cfg": 1}', "preprocess_cfg is 1; expected"),
        (" " * (5 * 2**20), "is too large"),
    ],
)
def test_other_configs_are_errors(custom, tmp_path, content, message):
    custom.save_pretrained(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(tmp_path)


def edit_config(folder, tower, **changes):
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][tower].update(changes)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "tower, changes, message",
    [
        ("text_cfg", {"context_length": 10**10}, "its model_cfg cannot be built"),
        ("text_cfg", {"heads": 3}, "its model_cfg cannot be built: .*divisible"),
        ("vision_cfg", {"patch_size": 0}, "its model_cfg cannot be built"),
        ("text_cfg", {"layers": 10**7}, "describes a network of too many layers"),
        ("vision_cfg", {"timm_model_name": "hf-hub:org/x"}, "is hf-hub:org/x; expected an arch"),
    ],
)
def test_towers_that_cannot_be_built_are_one_error(clip, tmp_path, tower, changes, message):
    clip.save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", tower, **changes)
    with pytest.raises(ValueError, match=message) as error:
        CLIP.from_pretrained(tmp_path / "model")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "model") in str(error.value)


def test_mismatched_tensors_are_listed(clip):
    tensors = dict(clip.model.state_dict())
    tensors["extra"] = torch.zeros(1)
    del tensors["logit_scale"]
    tensors["ln_final.bias"] = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"missing: logit_scale; unexpected: extra; .*ln_final.bias is \(5,\)"
    ):
        load_strictly(make().model, tensors, "somewhere")


def test_the_activation_follows_the_pretrained_weights(monkeypatch):
    """`ViT-B-32` uses GELU but its weights were trained with QuickGELU; open_clip only warns."""
    model_cfg = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    tag = {"quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(model_cfg))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, pretrained: tag)
    made = []

    def create_model(name, pretrained, force_quick_gelu, weights_only):
        model = open_clip.CLIP(**model_cfg, quick_gelu=force_quick_gelu)
        model.visual.preprocess_cfg = {"mode": "RGB", "size": 32}
        made.append(force_quick_gelu)
        return model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    clip = CLIP.from_open_clip("some-model", "openai")
    assert made == [True] and "QuickGELU" in str(clip.model.transformer.resblocks[0])
    model_cfg["quick_gelu"], tag["quick_gelu"] = True, False
    with pytest.raises(ValueError, match="computes QuickGELU but 'laion' was trained without it"):
        CLIP.from_open_clip("some-model-quickgelu", "laion")


def test_a_text_tower_of_transformers_is_built(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    transformers.BertConfig(**sizes, intermediate_size=32).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "context_length": 8}
    text |= {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    config = CLIPConfig({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text})
    clip = CLIP(config, lambda texts: (torch.ones(len(texts), 8).long(), torch.ones(1, 8) > 0))
    encoding = clip.encode_text(["a red apple", "a green pear"])
    assert encoding.emb.shape == (2, 16) and encoding.states.shape == (2, 8, clip.text_width)

    config.model_cfg["text_cfg"]["hf_model_pretrained"] = True
    with pytest.raises(OSError):
        CLIP(config, clip.tokenizer)  # from weights in `tmp_path`, which has none
    loaded = CLIP.from_tensors(config, clip.model.state_dict(), "the file", clip.tokenizer)
    expected = clip.eval().encode_text(["a red apple"]).emb
    assert torch.equal(loaded.encode_text(["a red apple"]).emb, expected)


def test_a_config_with_models_of_the_hub_downloads_nothing(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    model = {"hf_model_name": "someone/bert", "hf_proj_type": "linear"}
    for key, text in {
        "hf_model_name": {**model, "hf_pooler_type": "mean_pooler"},
        "hf_tokenizer_name": {**TEXT, "hf_tokenizer_name": "someone/bert"},
    }.items():
        config = CLIPConfig({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text})
        with pytest.raises(ValueError, match=f"folder: .*{key} is someone/bert; .*hf download"):
            CLIP.from_tensors(config, {}, "folder")

    # in the cache
    cached = tmp_path / "cache" / "models--someone--bert"
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    transformers.BertConfig(**sizes, intermediate_size=32).save_pretrained(cached / "snapshots/0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    text = {**model, "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
    config = CLIPConfig({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text})
    local = {**text, "hf_model_name": str(cached / "snapshots/0")}
    tensors = CLIP(CLIPConfig({**config.model_cfg, "text_cfg": local}), str).model.state_dict()
    assert CLIP.from_tensors(config, tensors, "folder", str).config == config


def test_a_tokenizer_of_the_hub_executes_no_code(tmp_path):
    pytest.importorskip("transformers")
    auto = {"auto_map": {"AutoTokenizer": ["code.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto))
    (tmp_path / "code.py").write_text("raise SystemExit('executed')\n")
    trust = {"hf_tokenizer_name": str(tmp_path), "tokenizer_kwargs": {"trust_remote_code": True}}
    config = CLIPConfig({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": {**TEXT, **trust}})
    with pytest.raises(ValueError, match="trust_remote_code"):
        CLIP.from_tensors(config, {}, "folder")


def test_unknown_architectures_and_tags_are_errors():
    with pytest.raises(ValueError, match="unknown open_clip architecture 'ViT-X'"):
        CLIP.from_open_clip("ViT-X")
    with pytest.raises(ValueError, match="no weights 'nowhere'; its tags: openai"):
        CLIP.from_open_clip("ViT-B-32", "nowhere")


def test_a_captioner_is_an_error():
    with pytest.raises(ValueError, match="captioner"):
        make(multimodal_cfg={})


def test_the_contrastive_loss_is_symmetric_cross_entropy():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    scale, rows = torch.tensor(7.0), torch.arange(5)
    logits = scale * image @ text.T
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, scale), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrastive_loss(image, text, scale), expected)


def test_the_inverse_temperature_is_clamped_to_100(custom):
    ids, mask = custom.tokenizer(["a red apple"])
    with torch.no_grad():
        custom.logit_scale.fill_(math.log(1e4))
        image_emb, text_emb, scale = custom(torch.zeros(1, 3, 32, 32), ids, mask)
    torch.testing.assert_close(scale, torch.tensor(100.0))
    custom(torch.zeros(1, 3, 32, 32), ids, mask)[2].backward()
    assert custom.logit_scale.grad > 0  # a clamp inside the graph would stop the gradient
    for emb in (image_emb, text_emb):
        torch.testing.assert_close(emb.norm(dim=-1), torch.ones(1))


def embedding_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(6, 8, generator=generator, requires_grad=True) for _ in range(2))


def loss_of(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return contrastive_loss(
        F.normalize(image, dim=-1), F.normalize(text, dim=-1), torch.tensor(7.0)
    )


def one_of_two_processes(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    image, text = embedding_pairs()
    rows = slice(3 * rank, 3 * rank + 3)
    loss = loss_of(image[rows], text[rows])
    loss.backward()
    torch.save(
        {"loss": loss.detach(), "image": image.grad, "text": text.grad}, folder / f"{rank}.pt"
    )
    torch.distributed.destroy_process_group()


def test_the_contrastive_loss_spans_all_processes(tmp_path):
    assert wait(fork(lambda rank: one_of_two_processes(rank, tmp_path), 2), 60) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    image, text = embedding_pairs()
    loss = loss_of(image, text)
    loss.backward()
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, loss.detach())
    # DistributedDataParallel averages gradients over processes.
    for name, whole in (("image", image.grad), ("text", text.grad)):
        torch.testing.assert_close((first[name] + second[name]) / 2, whole)


@pytest.mark.parametrize(
    ("model_cfg", "message"),
    [
        ({"text_cfg": {**TEXT, "widht": 32}}, r"text_cfg\.widht is unknown; did you mean 'width'"),
        ({"vision_cfg": {**VISION, "layer": 2}}, r"vision_cfg\.layer is .* did you mean 'layers'"),
        ({"vison_cfg": VISION}, r"model_cfg\.vison_cfg is unknown; did you mean 'vision_cfg'"),
        ({"text_cfg": 3}, "text_cfg is 3; expected a mapping"),
        ({"text_cfg": {**TEXT, "xyz": 1}}, r"xyz is unknown; expected one of: context_length, .*"),
    ],
)
def test_unknown_keys_of_a_config_are_errors(model_cfg, message):
    with pytest.raises(ValueError, match=message):
        make(**model_cfg)


def test_a_folder_with_an_unknown_key_is_named(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    file = tmp_path / "open_clip_config.json"
    file.write_text(file.read_text().replace('"heads"', '"haeds"'))
    with pytest.raises(ValueError, match=rf"{file.name}: model_cfg\.text_cfg\.haeds is unknown"):
        CLIP.from_pretrained(tmp_path)


def test_the_configs_of_open_clip_are_accepted():
    for name in open_clip.list_models():
        CLIPConfig(open_clip.get_model_config(name))
