"""Training, encoding, truncation, dropout and saving of the tokenizers."""

import os

import pytest
import torch

from unclip.tokenizer import BPETokenizer, GPT2Tokenizer, load_tokenizer

CAPTIONS = ["a red apple", "a green apple", "red heart, noto emoji", "Ça va? 100%"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=12)


def test_the_mask_covers_the_start_and_end_tokens(tokenizer):
    ids, mask = tokenizer(["a red apple", ""])
    assert ids.shape == mask.shape == (2, 12)
    assert ids[0, 0] == tokenizer.start_id and ids[0, mask[0].sum() - 1] == tokenizer.end_id
    assert ids[1, :3].tolist() == [tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id]
    assert mask[1].sum() == 2
    assert torch.equal(mask, ids != tokenizer.pad_id)


@pytest.mark.parametrize("text", ["a red apple", "ça va? 100%", "snow ☃ 日本 🍎", "x!y"])
def test_decoding_returns_the_lower_cased_text(text):
    tokenizer = BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=64)
    assert tokenizer.decode(tokenizer([text.upper()])[0][0].tolist()) == text.upper().lower()


def test_whitespace_and_case_are_normalised(tokenizer):
    a, b = tokenizer(["  A  red\napple "])[0], tokenizer(["a red apple"])[0]
    assert torch.equal(a, b)


def test_long_prompts_are_truncated_with_a_warning_that_shows_the_cut(tokenizer):
    with pytest.warns(UserWarning, match=r"more than 10 tokens.*green apple'$"):
        ids, mask = tokenizer(["a red apple " * 4 + "and a green apple"])
    assert mask.all() and ids[0, -1] == tokenizer.end_id


def test_a_saved_tokenizer_loads_unchanged(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = BPETokenizer.load(tmp_path / "tokenizer.json", context_length=12)
    assert again.vocab_size == tokenizer.vocab_size <= 320
    assert torch.equal(again(CAPTIONS)[0], tokenizer(CAPTIONS)[0])


def test_missing_files_and_foreign_tokenizers_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        BPETokenizer.load(tmp_path / "tokenizer.json", 12)
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="no <pad> and no <start> and no <end>"):
        BPETokenizer(Tokenizer(models.BPE()), 12)


@pytest.mark.parametrize("load", [BPETokenizer.load, GPT2Tokenizer.load])
@pytest.mark.parametrize("content", ["{", "[]", "[" * 10_000, "\0\x1b[31m", " " * (17 * 2**20)])
def test_damaged_and_absurd_files_are_errors_of_one_line(load, content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json") as error:
        load(tmp_path / "tokenizer.json", 12)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("load", [BPETokenizer.load, GPT2Tokenizer.load])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_is_not_a_tokenizer(load, tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        load(tmp_path / "tokenizer.json", 12)


def test_unmarked_texts_have_no_start_and_end_tokens():
    tokenizer = BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=12, marked=False)
    with pytest.warns(UserWarning, match="more than 12 tokens"):
        ids, mask = tokenizer(["a red apple", "", "☃ " * 40])
    assert not {tokenizer.start_id, tokenizer.end_id} & set(ids.flatten().tolist())
    assert mask.sum(1).tolist() == [len(tokenizer.tokenizer.encode("a red apple").ids), 0, 12]
    assert tokenizer.decode(ids[0].tolist()) == "a red apple"


@pytest.fixture(scope="module")
def long_tokenizer():
    return BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=64)


@pytest.mark.parametrize("text", ["A red apple", "ça va? 100%", "snow ☃ 日本 🍎", ""])
def test_bpe_dropout_changes_the_tokens_but_not_the_text(long_tokenizer, text):
    plain = long_tokenizer([text])[0]
    assert torch.equal(
        long_tokenizer([text], dropout=1e-12)[0], plain
    )  # our merging equals the library's
    letters = long_tokenizer([text], dropout=1.0)[1].sum() - 2
    assert letters == len(f" {text.lower()}".encode()) * (text != "")
    for seed in range(5):
        torch.manual_seed(seed)
        ids = long_tokenizer([text], dropout=0.5)[0]
        assert long_tokenizer.decode(ids[0].tolist()) == text.lower()
        torch.manual_seed(seed)
        assert torch.equal(long_tokenizer([text], dropout=0.5)[0], ids)


def test_bpe_dropout_skips_merges_with_the_given_probability(long_tokenizer):
    first = next(iter(long_tokenizer._ranks))
    torch.manual_seed(0)
    merged = sum(len(long_tokenizer._merge(list(first), 0.3)) == 1 for _ in range(2000))
    assert abs(merged / 2000 - 0.7) < 4 * (0.3 * 0.7 / 2000) ** 0.5


def test_dropout_never_truncates_a_text_that_fits(recwarn):
    tokenizer = BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=5, marked=False)
    assert torch.equal(tokenizer(["a red apple"], dropout=1.0)[0], tokenizer(["a red apple"])[0])
    assert not recwarn.list


def test_tokenizers_are_loaded_by_type(tokenizer, tmp_path):
    for marked in (True, False):
        BPETokenizer(tokenizer.tokenizer, 7, marked).save_pretrained(tmp_path)
        again = load_tokenizer(tmp_path)
        assert (type(again), again.context_length, again.marked) == (BPETokenizer, 7, marked)
        assert torch.equal(
            again(["a red apple"])[0],
            BPETokenizer(tokenizer.tokenizer, 7, marked)(["a red apple"])[0],
        )


@pytest.mark.parametrize(
    "config, facts",
    [
        ('{"type": "Words", "context_length": 7}', "'Words'; expected .*BPETok.* or 'GPT2Tok"),
        ('{"type": "BPETokenizer", "marked": true}', "context_length is missing"),
        ('{"type": "GPT2Tokenizer", "context_length": "7"}', "context_length is '7'; expected"),
    ],
)
def test_the_error_of_a_damaged_tokenizer_config_names_file_and_key(tmp_path, config, facts):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"config.json: .*{facts}"):
        load_tokenizer(tmp_path)
