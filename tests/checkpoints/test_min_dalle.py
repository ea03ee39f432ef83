"""DALL-E mini and mega load, and outputs match recordings of min-dalle's own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from recorded import recording, sampled, weights

import unclip
from unclip.checkpoints.min_dalle import load_bundle, recognise
from unclip.cli.main import main
from unclip.models.dalle.sampling import sample_codes
from unclip.models.published.bart_dalle import BartDALLE, BartDALLEConfig
from unclip.pipelines.dalle.pipeline import DallePipeline
from unclip.types import CodeOptions

RECORDED = recording("min_dalle")
K, N, L = 40, 16, 12
CODES = ((torch.arange(N) * 7 + 3) % K)[None]
TOKENS = torch.tensor([[0, 2, *[1] * 10], [0, 17, 5, 33, 59, 4, 2, *[1] * 5]])


def write(folder: Path, ending: str = "") -> Path:
    """Write a model in min-dalle's layout with the recorded weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, shapes in RECORDED["shapes"].items():
        state = weights({f"{part}.{name}": shape for name, shape in shapes.items()})
        state = {name.removeprefix(f"{part}."): x for name, x in state.items()}
        if part == "decoder":  # the recording starts from row K; the published table ends with it
            rows = state["embed_tokens.weight"]
            rows[[K, -1]] = rows[[-1, K]]
        torch.save(state, folder / ("detoker.pt" if part == "detoker" else f"{part}{ending}.pt"))
    (folder / f"vocab{ending}.json").write_text(json.dumps(RECORDED["vocab"]))
    (folder / f"merges{ending}.txt").write_text(
        "\n".join(["#version: 0.2", *RECORDED["merges"], ""])
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("min-dalle"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> DallePipeline:
    return unclip.load(folder, "cpu")


@pytest.fixture(scope="module")
def dalle(pipe: DallePipeline) -> BartDALLE:
    return pipe.dalle


def close(recorded: list[float]) -> list[float]:
    return pytest.approx(recorded, rel=0, abs=1e-5)


@torch.no_grad()
def test_states_and_logits_match_min_dalle(dalle):
    assert dalle.config == BartDALLEConfig(60, L, K, (4, 4), 128, 2, 2, heads=2, mlp_width=80)
    states = dalle.encode(TOKENS)
    assert sampled(states[:, :2]) == close(RECORDED["states"])
    assert sampled(states[1, :7]) == close(RECORDED["states_text"])
    null, logits = dalle(TOKENS, CODES.expand(2, -1)).codes
    assert sampled(null) == close(RECORDED["null_logits"])
    assert sampled(logits) == close(RECORDED["logits"])
    assert torch.equal(dalle.null_tokens(1)[0], TOKENS[0])


def test_sampled_codes_match_min_dalle(dalle):
    greedy = CodeOptions(temperature=0, guidance=16.0)
    codes = sample_codes(dalle, dalle.condition(TOKENS[1:]), [torch.Generator()], greedy)
    assert codes.flatten().tolist() == RECORDED["greedy"]


def test_decoded_images_match_min_dalle(pipe):
    decoded = pipe.codec.decode(CODES.view(1, 4, 4))  # in [-1, 1]; [0, 1] in min-dalle
    assert sampled((decoded + 1) / 2) == close(RECORDED["picture"])


@pytest.mark.parametrize("text", RECORDED["tokens"])
def test_tokens_match_min_dalle(pipe, text):
    ids, mask = pipe.tokenizer([text])
    assert ids[mask].tolist() == RECORDED["tokens"][text]
    assert (ids[~mask] == pipe.dalle.config.pad_id).all()


def test_accents_are_stripped_and_long_texts_keep_the_end_token(pipe):
    plain, accented = (
        pipe.tokenizer([text])[0] for text in ("a red apple", "\u00e1 R\u00e9d appl\u00e9")
    )
    assert torch.equal(plain, accented)
    with pytest.warns(UserWarning, match="has more than 10 tokens"):
        ids, mask = pipe.tokenizer(["a red apple " * 5])
    assert mask.all() and ids[0, -1] == 2


@torch.no_grad()
@pytest.mark.parametrize("at", [int, torch.tensor])
@pytest.mark.parametrize("given", [0, 1, 5])
def test_cached_logits_equal_uncached_ones(dalle, at: Callable[[int], int | torch.Tensor], given):
    """For two texts, with guidance, from the start or after given codes."""
    codes = (torch.arange(4)[:, None] * 5 + CODES) % K
    prefix = dalle.condition(TOKENS[[1, 0]]).repeat_interleave(2)
    prefix = prefix.cat([prefix, dalle.condition(TOKENS[:1]).repeat_interleave(4)])
    codes = codes.repeat(2, 1)
    whole = dalle(TOKENS[[1, 1, 0, 0, *[0] * 4]], codes).codes
    cache, cached = dalle.start_cache(prefix), [prefix.logits]
    if given:
        cached += [None] * (given - 1) + [dalle.extend(codes[:, :given], cache)]
    for n in range(given, N - 1):
        cached.append(dalle.step(codes[:, n], at(n), cache))
    for n, logits in enumerate(cached):
        assert logits is None or torch.allclose(logits, whole[:, n], rtol=0, atol=1e-5)


def test_attention_is_causal(dalle):
    embedded = dalle.code_emb(CODES).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dalle.code_emb, "forward", lambda codes: embedded[:, : codes.shape[1]])
        logits = dalle(TOKENS[1:], CODES).codes
    for n in range(N):
        (grad,) = torch.autograd.grad(
            logits[:, n].square().sum(), embedded, retain_graph=True, allow_unused=True
        )
        reached = grad[0].abs().sum(dim=1) > 0
        assert reached.tolist() == [k < n for k in range(N)]


@torch.no_grad()
def test_padding_is_masked(dalle):
    longer = TOKENS[1:].clone()
    logits = dalle(longer, CODES).codes
    weight = dalle.text_emb.weight[dalle.config.pad_id]
    before = weight.clone()
    weight.normal_()
    assert torch.equal(dalle(longer, CODES).codes, logits)
    weight.copy_(before)
    other = longer.clone()
    other[0, 6] = 7
    assert not torch.allclose(dalle(other, CODES).codes, logits)


def test_a_folder_generates_images(folder, pipe, tmp_path):
    assert (pipe.kind, pipe.name, pipe.options) == (
        "dalle",
        "dalle-mini",
        CodeOptions(top_k=256, guidance=16.0),
    )
    result = pipe(["a red apple", "blue fish"], num_images=2, seed=3, progress=False)
    assert [image.size for image in result.images] == [(64, 64)] * 4 and result.codes.shape == (
        4,
        4,
        4,
    )
    alone = pipe("blue fish", seed=4, progress=False)
    assert torch.equal(
        alone.codes[0], pipe("blue fish", num_images=2, seed=3, progress=False).codes[1]
    )
    with pytest.raises(ValueError, match="it has only a decoder"):
        pipe.complete(result.images[0], progress=False)

    pipe.save_pretrained(tmp_path / "ours")
    again = unclip.load(tmp_path / "ours", "cpu")("blue fish", seed=4, progress=False)
    assert again.images[0].tobytes() == alone.images[0].tobytes()


def test_the_start_token_is_the_last_row_of_mega_and_mini(folder, dalle, tmp_path):
    """Mega's table has unused rows after its codes; mini's start follows them directly."""
    rows = torch.load(folder / "decoder.pt", weights_only=True)["embed_tokens.weight"]
    assert len(rows) > K + 1 and torch.equal(dalle.start, rows[-1])
    mini = write(tmp_path / "mini")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        change(mini, "decoder.pt", lambda s, name=name: s.update({name: s[name][: K + 1].clone()}))
    assert torch.equal(unclip.load(mini, "cpu").dalle.start, rows[K])


def test_cache_folders_of_min_dalle_are_recognised(folder, tmp_path):
    cache = tmp_path / "pretrained"
    write(cache / "dalle_bart_mini")
    (cache / "vqgan").mkdir()
    with pytest.raises(FileNotFoundError, match=r"detoker\.pt is missing"):
        (cache / "dalle_bart_mini" / "detoker.pt").rename(cache / "kept")
        unclip.load(cache)
    (cache / "kept").rename(cache / "vqgan" / "detoker.pt")
    for path in (cache, cache / "dalle_bart_mini"):
        assert torch.equal(
            unclip.load(path, "cpu").dalle.start, unclip.load(folder, "cpu").dalle.start
        )
    both = write(write(tmp_path / "hub"), "_mini")
    assert load_bundle(both).name == "dalle-mini"
    (both / "encoder.pt").unlink()
    assert recognise(both) and unclip.load(both, "cpu")("a", progress=False).images
    assert not recognise(tmp_path) and not recognise(both / "decoder.pt")


def change(folder: Path, file: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = torch.load(folder / file, weights_only=True)
    edit(state)
    torch.save(state, folder / file)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (
            "encoder.pt",
            lambda s: s.pop("final_ln.bias"),
            "does not fit: missing: encoder.final_ln.weight, encoder.fin",
        ),
        (
            "encoder.pt",
            lambda s: s.pop("embed_tokens.weight"),
            "not a DALL-E of min-dalle: the tensor encoder.embed_tokens.weight",
        ),
        (
            "decoder.pt",
            lambda s: s.update(more=torch.ones(1)),
            "does not fit: unexpected: decoder.more",
        ),
        (
            "decoder.pt",
            lambda s: s.pop("layers.1.self_attn_layer_norm.weight"),
            "missing: decoder.layers.1.self_attn_",
        ),
        (
            "decoder.pt",
            lambda s: s.update({"lm_head.weight": torch.ones(46, 127)}),
            r"of another shape: decoder.lm_head.weight is \(46, 127\), expected \(46, 128\)",
        ),
        (
            "decoder.pt",
            lambda s: s.update({"embed_tokens.weight": torch.ones(31, 128)}),
            "has 30 codes; expected at least the codec's 40",
        ),
        (
            "detoker.pt",
            lambda s: s.pop("embedding.weight"),
            "not a detokenizer of min-dalle: the tensor embedding.w",
        ),
        (
            "detoker.pt",
            lambda s: s.pop("decoder.mid.attn_1.q.bias"),
            "missing: decoder.mid.attn_1.q.bias",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(file, edit, message, tmp_path):
    change(write(tmp_path / "model"), file, edit)
    with pytest.raises(ValueError, match=message):
        unclip.load(tmp_path / "model")


def test_a_missing_or_damaged_vocabulary_is_named(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "merges.txt").write_text("#version: 0.2\nx yz\n")
    with pytest.raises(ValueError, match=r"vocab.json and merges.txt are not a vocabulary"):
        unclip.load(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges.txt is missing"):
        unclip.load(folder)


def test_generate_command(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [
        "generate",
        "a red apple",
        "--model",
        str(folder),
        "--seed",
        "1",
        "-o",
        "a.png",
        "--quiet",
    ]
    assert main([*command, "--device", "cpu", "--top-k", "5", "--guidance", "4"]) == 0
    with Image.open("a.png") as image:
        assert image.size == (64, 64)


def test_parameter_counts_of_the_published_models():
    """Mega has 2.6 billion parameters, mini 0.4."""
    mini = BartDALLEConfig(
        50264, width=1024, encoder_depth=12, decoder_depth=12, heads=16, mlp_width=2730
    )
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in BartDALLE(config).parameters())
            for config in (BartDALLEConfig(), mini)
        ]
    assert [round(size / 1e9, 1) for size in sizes] == [2.6, 0.4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width is 2048; expected a multiple of heads = 3"),
        ({"encoder_depth": 0}, "encoder_depth is 0; expected at least 1"),
        ({"grid": (0, 4)}, r"grid\[0\] is 0; expected at least 1"),
        ({"null": ()}, r"null is \(\); expected 1 to 64 tokens"),
    ],
)
def test_sizes_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        BartDALLEConfig(**changes)


def test_tokens_are_checked(dalle):
    with pytest.raises(
        ValueError, match=r"text ids are of shape \(1, 5\); this transformer expects \(B, 12\)"
    ):
        dalle.tokens(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="text ids are 0 to 60; this transformer expects 0 to 59"):
        dalle.tokens(torch.arange(12)[None] * 60 // 11, torch.ones(1, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="an image has 4 codes; this transformer expects 16"):
        dalle(TOKENS, CODES[:, :4])
