import pytest
import torch

from unclip.tokenizer import BPETokenizer

CAPTIONS = ["a red apple", "a green apple", "red heart, noto emoji", "Ça va? 100%"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=12)


def test_ids_start_and_end_and_the_mask_covers_both(tokenizer):
    ids, mask = tokenizer(["a red apple", ""])
    assert ids.shape == mask.shape == (2, 12)
    assert ids[0, 0] == tokenizer.start_id and ids[0, mask[0].sum() - 1] == tokenizer.end_id
    assert ids[1, :3].tolist() == [tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id] and mask[1].sum() == 2
    assert torch.equal(mask, ids != tokenizer.pad_id)


@pytest.mark.parametrize("text", ["a red apple", "ça va? 100%", "snow ☃ 日本 🍎", "x!y"])
def test_any_text_comes_back_in_lower_case(text):
    tokenizer = BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=64)
    assert tokenizer.decode(tokenizer([text.upper()])[0][0].tolist()) == text.upper().lower()


def test_spacing_and_case_do_not_matter(tokenizer):
    a, b = tokenizer(["  A  red\napple "])[0], tokenizer(["a red apple"])[0]
    assert torch.equal(a, b)


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_lost(tokenizer):
    with pytest.warns(UserWarning, match=r"more than 12 tokens.*green apple'$"):
        ids, mask = tokenizer(["a red apple " * 4 + "and a green apple"])
    assert mask.all() and ids[0, -1] == tokenizer.end_id


def test_it_is_the_same_after_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = BPETokenizer.load(tmp_path / "tokenizer.json", context_length=12)
    assert again.vocab_size == tokenizer.vocab_size <= 320
    assert torch.equal(again(CAPTIONS)[0], tokenizer(CAPTIONS)[0])


def test_a_missing_file_and_a_foreign_tokenizer_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        BPETokenizer.load(tmp_path / "tokenizer.json", 12)
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="<pad> as id 0"):
        BPETokenizer(Tokenizer(models.BPE()), 12)
