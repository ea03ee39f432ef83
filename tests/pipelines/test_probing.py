"""Images of principal components, and typographic attacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data.shards import ShardWriter
from unclip.embeddings import PCA, normalise
from unclip.pipelines.unclip.probing import (
    class_probabilities,
    components_figure,
    draw_components,
    read_embeddings,
    shown_components,
    typographic_attack,
    write_word,
)

COLOURS = ("red", "blue", "green", "white", "black", "orange")


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.new("RGB", (20, 16), colour) for colour in COLOURS]


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for colour, photo in zip(COLOURS, photos, strict=True):
        photo.save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(colour)
    return folder


def test_embeddings_of_a_dataset(tiny_pipe, photos, folder, tmp_path):
    expected = tiny_pipe.encode_image(photos)
    found = read_embeddings(tiny_pipe, folder, batch_size=4, progress=False)
    torch.testing.assert_close(found[np.argsort(np.argsort(COLOURS))], expected, rtol=0, atol=1e-5)
    with ShardWriter(tmp_path, "train", 4) as shards:
        for colour in COLOURS:
            shards.write(
                colour, {"png": (folder / f"{colour}.png").read_bytes(), "txt": colour.encode()}
            )
        shards.write("broken", {"png": b"no picture", "txt": b"broken"})
    tars = sorted(tmp_path.glob("*.tar"))
    assert len(tars) == 2
    torch.testing.assert_close(
        read_embeddings(tiny_pipe, tars, progress=False), expected, rtol=0, atol=1e-5
    )


def test_components_share_seeds(tiny_pipe, photos):
    pca = PCA.fit(tiny_pipe.encode_image(photos))
    assert shown_components(pca) == [5]  # six images span five dimensions; the paper starts at 20
    whole = tiny_pipe.encode_image(photos[:2])
    results = draw_components(tiny_pipe, photos[:2], pca, [1, 5], seed=7, progress=False)
    assert [result.seeds for result in results] == [[7, 8], [7, 8]]
    torch.testing.assert_close(results[0].image_emb, pca.truncate(whole, 1))
    torch.testing.assert_close(
        results[1].image_emb, whole, rtol=0, atol=1e-4
    )  # all components reconstruct the embedding
    figure = components_figure(photos[:2], [1, 5], results, size=40)
    assert figure.width == 3 * 44 - 4
    with pytest.raises(ValueError, match="k is 6; expected 0 to 5"):
        draw_components(tiny_pipe, photos, pca, [6])


@pytest.mark.parametrize(
    ("size", "word"),
    [
        ((256, 256), "pizza"),
        ((256, 256), '$3: it\'s "A-1"!'),
        ((64, 40), "a long piece of writing"),
        ((16, 16), "i"),
    ],
)
def test_a_word_is_written_across_the_middle(size, word):
    image = Image.new("RGB", size, "green")
    written = write_word(image, word)
    changed = (np.asarray(written) != np.asarray(image)).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert changed.any() and not changed.all() and written.size == size
    assert (
        abs(rows.mean() - size[1] / 2) < size[1] / 8
        and abs(columns.mean() - size[0] / 2) < size[0] / 8
    )
    assert image.getpixel((size[0] // 2, size[1] // 2)) == (0, 128, 0)  # the original is unchanged


@pytest.mark.parametrize(
    ("word", "lacking"), [("日本", "'日', '本'"), ("café", "'é'"), ("a\nb", r"'\n'")]
)
def test_words_with_missing_glyphs_are_rejected(word, lacking):
    with pytest.raises(ValueError) as error:
        write_word(Image.new("RGB", (64, 64)), word)
    assert f"the font has no {lacking} of" in str(error.value)
    assert "\n" not in str(error.value)


def test_class_probabilities_are_those_of_zero_shot_clip(tiny_pipe, photos):
    classes = ["a red apple", "a blue fish", "a cat"]
    found = class_probabilities(tiny_pipe, tiny_pipe.encode_image(photos), classes)
    ids, mask = tiny_pipe.clip.tokenizer(classes)
    with torch.no_grad():
        image_emb, text_emb, scale = tiny_pipe.clip(photos, ids, mask)
    torch.testing.assert_close(found, (scale * image_emb @ text_emb.T).softmax(dim=1))
    with pytest.raises(ValueError, match="got 1 class; expected at least 2"):
        class_probabilities(tiny_pipe, image_emb, ["a"])


def test_typographic_attack_figure(tiny_pipe, photos):
    classes = ["a red apple", "a blue fish"]
    figure, metadata, probabilities = typographic_attack(
        tiny_pipe, photos[0], "fish", classes, num_images=2, seed=3, size=48, progress=False
    )
    assert figure.width == 3 * 52 - 4
    assert [entry["seed"] for entry in metadata] == [3, 4, 5, 6]
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2))
    written = normalise(tiny_pipe.encode_image([photos[0], write_word(photos[0], "fish")]))
    assert not torch.allclose(written[0], written[1])
    assert not torch.allclose(probabilities[0], probabilities[1], atol=1e-6)
