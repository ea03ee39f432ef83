"""assets/build_cards.py fills in the model cards."""

from __future__ import annotations

import builtins
import json

import build_cards
import pytest
from PIL import Image
from scripts import ROOT
from styled import write_pairs

BLOCKS = ("runs", "figures", "summary")
pytestmark = pytest.mark.filterwarnings("ignore:the prompt")  # the tiny CLIP has a short context


@pytest.fixture
def card(tmp_path):
    """A folder with an empty card of two pages."""
    blocks = {name: f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in BLOCKS}
    (tmp_path / "README.md").write_text(f"# A card\n{blocks['summary']}the end\n")
    (tmp_path / "more.md").write_text(f"# Runs\n{blocks['runs']}\n{blocks['figures']}the end\n")
    return tmp_path


def write_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_card_gets_runs_curves_and_results(tiny_folder, card, tmp_path_factory):
    data = write_pairs(tmp_path_factory.mktemp("data"))
    rows = [{"step": 10 * i, "hours": i / 10, "loss": 1 / i} for i in range(1, 30)]
    for name in ("prior", "clip", "another"):
        write_run(card / "runs" / name, [*rows, {"step": 290, "hours": 2.9, "val_loss": 0.25}])
    write_run(card / "runs" / "started", [])
    arguments = (
        f"--out {card} --runs {card}/runs --model {tiny_folder} --quiet "
        f"--data {data}/heldout-*.tar --parts prior --steps 1"
    )
    build_cards.main(arguments.split())
    text = (card / "more.md").read_text()
    assert text.startswith("# Runs\n<!-- runs -->\n| run |")
    assert text.endswith("<!-- /figures -->\nthe end\n")
    assert "| clip | 290 | 2.9 | 0.0345 | 0.2500 |" in text and "started" not in text
    assert text.index("| clip |") < text.index("| prior |") < text.index("| another |")
    assert "| prior: cosine to the true embedding, gap |" in text
    assert "On 4 held-out pairs, seed 0" in text
    assert Image.open(card / "loss.png").width > 900
    assert {"evaluation.json", "heldout.png"} <= {path.name for path in card.iterdir()}

    build_cards.main(["--out", str(card)])  # from evaluation.json alone
    assert (card / "more.md").read_text() == text


def test_the_summary_has_the_main_rows(card):
    for file in ("evaluation.json", "bench.json"):
        (card / file).write_bytes((ROOT / "assets" / "emoji" / file).read_bytes())
    build_cards.main(["--out", str(card)])
    text = (card / "README.md").read_text()
    assert text.startswith("# A card\n<!-- summary -->\n| figure |") and text.endswith("the end\n")
    for row in ("judge: style", "unclip generate, from cold start", "peak memory of unclip"):
        assert f"\n| {row}" in text
    assert "prior: cosine" not in text and "prior: cosine" in (card / "more.md").read_text()


def test_runs_can_be_named_one_by_one(card):
    for name in ("codec", "dalle", "clip"):
        row = {"step": 7, "hours": 0.25, "loss": 2.5, "val_loss": 3.5}
        write_run(card / "runs" / name, [row])
    runs = [str(card / "runs" / name) for name in ("dalle", "codec")]
    build_cards.main(["--out", str(card), "--runs", *runs])
    text = (card / "more.md").read_text()
    assert "| codec | 7 | 0.2 | 2.5000 | 3.5000 |\n| dalle |" in text and "clip" not in text


def test_a_comparison_of_priors_is_added(card):
    evaluation = {"held_out": {"pairs": 4}, "seed": 0, "options": {"temperature": 0.9, "top_p": 1}}
    (card / "evaluation.json").write_text(json.dumps(evaluation))
    row = {"name": "one-shot", "parameters": 2_340_000, "guidance": 1.0, "cosine": 0.7}
    results = {"pairs": 128, "rows": [{**row, "recall@1": 0.25}]}
    (card / "priors.json").write_text(json.dumps(results))
    build_cards.main(["--out", str(card)])
    text = (card / "more.md").read_text()
    assert "seed 0; temperature 0.9, top-p 1." in text and "on 128 held-out captions" in text
    assert "| one-shot | 2.3 M | 1 | 0.700 |  | 25.0% |  |  |" in text


def test_markers_must_exist(card):
    (card / "more.md").write_text("# A page without markers\n")
    evaluation = {"held_out": {"pairs": 4}, "seed": 0, "options": {}}
    (card / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(SystemExit, match="<!-- figures -->"):
        build_cards.main(["--out", str(card)])


@pytest.mark.parametrize("name", ["emoji", "emoji-dalle1"])
def test_bundled_cards_have_the_stored_results(name, tmp_path):
    folder = ROOT / "assets" / name
    pages = {page.name: page.read_bytes() for page in folder.glob("*.md")}
    for file in (*folder.glob("*.json"), *folder.glob("*.md")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    build_cards.build_card(tmp_path)
    assert {page.name: page.read_bytes() for page in tmp_path.glob("*.md")} == pages
    build_cards.fill(tmp_path, "runs", "new")
    assert "new" in (tmp_path / "training.md").read_text(encoding="utf-8")


def test_plots_need_matplotlib(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    runs = {"clip": [{"step": 1, "hours": 0.1, "loss": 1.0}]}
    with pytest.raises(ValueError, match="pip install matplotlib"):
        build_cards.plot_losses(runs, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_smoothing_averages_over_a_twentieth():
    assert build_cards.smooth([2.0] * 100) == [2.0] * 100
    assert build_cards.smooth([0.0] * 50 + [1.0] * 50)[52] == pytest.approx(3 / 5)
