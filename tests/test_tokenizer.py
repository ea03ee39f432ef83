import pytest
import torch

from unclip.tokenizer import BPETokenizer, load_tokenizer

CAPTIONS = ["a red apple", "a green apple", "red heart, noto emoji", "Ça va? 100%"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=12)


def test_ids_start_and_end_and_the_mask_covers_both(tokenizer):
    ids, mask = tokenizer(["a red apple", ""])
    assert ids.shape == mask.shape == (2, 12)
    assert ids[0, 0] == tokenizer.start_id and ids[0, mask[0].sum() - 1] == tokenizer.end_id
    assert (
        ids[1, :3].tolist() == [tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id]
        and mask[1].sum() == 2
    )
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

    with pytest.raises(ValueError, match="no <pad> and no <start> and no <end>"):
        BPETokenizer(Tokenizer(models.BPE()), 12)


def test_without_marks_a_text_fills_its_context_from_the_first_place():
    tokenizer = BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=12, marked=False)
    with pytest.warns(UserWarning, match="more than 12 tokens"):
        ids, mask = tokenizer(["a red apple", "", "☃ " * 40])
    assert not {tokenizer.start_id, tokenizer.end_id} & set(ids.flatten().tolist())
    assert mask.sum(1).tolist() == [len(tokenizer.tokenizer.encode("a red apple").ids), 0, 12]
    assert tokenizer.decode(ids[0].tolist()) == "a red apple"


@pytest.fixture(scope="module")
def wide():
    return BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=64)


@pytest.mark.parametrize("text", ["A red apple", "ça va? 100%", "snow ☃ 日本 🍎", ""])
def test_bpe_dropout_changes_the_tokens_but_not_the_text(wide, text):
    plain = wide([text])[0]
    assert torch.equal(
        wide([text], dropout=1e-12)[0], plain
    )  # its own merging is that of the library
    letters = wide([text], dropout=1.0)[1].sum() - 2
    assert letters == len(f" {text.lower()}".encode()) * (text != "")
    for seed in range(5):
        torch.manual_seed(seed)
        ids = wide([text], dropout=0.5)[0]
        assert wide.decode(ids[0].tolist()) == text.lower()
        torch.manual_seed(seed)
        assert torch.equal(wide([text], dropout=0.5)[0], ids)


def test_bpe_dropout_keeps_the_right_share_of_merges(wide):
    first = next(iter(wide._ranks))
    torch.manual_seed(0)
    merged = sum(len(wide._merge(list(first), 0.3)) == 1 for _ in range(2000))
    assert abs(merged / 2000 - 0.7) < 4 * (0.3 * 0.7 / 2000) ** 0.5


def test_dropout_never_cuts_a_text_that_fits(recwarn):
    tokenizer = BPETokenizer.train(CAPTIONS, vocab_size=320, context_length=5, marked=False)
    assert torch.equal(tokenizer(["a red apple"], dropout=1.0)[0], tokenizer(["a red apple"])[0])
    assert not recwarn.list


def test_it_comes_back_from_its_folder_and_no_other_kind_does(tokenizer, tmp_path):
    for marked in (True, False):
        BPETokenizer(tokenizer.tokenizer, 7, marked).save_pretrained(tmp_path)
        again = load_tokenizer(tmp_path)
        assert (type(again), again.context_length, again.marked) == (BPETokenizer, 7, marked)
        assert torch.equal(
            again(["a red apple"])[0],
            BPETokenizer(tokenizer.tokenizer, 7, marked)(["a red apple"])[0],
        )
    (tmp_path / "config.json").write_text('{"type": "Words"}')
    with pytest.raises(
        ValueError, match="type is 'Words'; expected one of BPETokenizer, GPT2Tokenizer"
    ):
        load_tokenizer(tmp_path)
