"""`vlm evaluate` on tiny trained runs: what it prints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import learned, pack, picture, squares
from vlm import build_data
from vlm.data.shards import Shards
from vlm.eval.features import extract, match_pairs
from vlm.eval.run import evaluate, retrieval
from vlm.eval.tasks import Request
from vlm.restore import restore

WAYS, MEASURES = {"t2i", "i2t"}, {"R@1", "R@5", "R@10", "mean_rank", "median_rank"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have learned eight colours."""
    folder = tmp_path_factory.mktemp("runs")
    learned(folder, "clip", "qformer")
    squares(folder / "test.tar", 8, "t")
    return folder


@pytest.mark.parametrize(("kind", "found"), [("clip", {"itc"}), ("qformer", {"itc", "itm"})])
def test_evaluate_prints_json(folder: Path, capsys: pytest.CaptureFixture[str], kind: str, found: set[str]) -> None:
    out = folder / f"of-{kind}"
    evaluate(str(folder / kind), Request([str(folder / "test.tar")]), out=out, json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == str(out)
    result = printed["tasks"]["retrieval"]
    assert set(result["metrics"]) == found
    for summary in (*result["metrics"].values(), result["chance"]):
        assert set(summary) == {*WAYS, "rsum"}
        assert all(set(summary[way]) == MEASURES for way in WAYS)
    assert result["counts"] == {"images": 8, "captions": 8, "unusable": {}}
    assert result["chance"]["t2i"]["R@1"] == pytest.approx(12.5)


@pytest.mark.parametrize("kind", ["clip", "qformer"])
def test_what_was_learned_is_found(folder: Path, kind: str) -> None:
    found = retrieval(restore(folder / kind), [str(folder / "test.tar")])["retrieval"]
    assert found["itc"]["t2i"]["R@1"] >= 75
    assert found["itc"]["i2t"]["R@1"] >= 75


def test_re_ranking_asks_what_was_trained(folder: Path) -> None:
    trained = restore(folder / "qformer")
    model, tokenizer = trained.model, trained.tokenizer
    source = Shards(str(folder / "test.tar"))
    loader = build_data.evaluation_loader(trained.data, source, model.vision.transform, tokenizer, trained.batch_size)
    features = extract(model, loader, keep_tokens=True)
    image, text = torch.cartesian_prod(torch.arange(8), torch.arange(8)).unbind(1)
    (batch,) = loader.once()
    seen = replace(model.see(batch.to("cpu").images), state=None).select(image)
    apart, together = model.match_logits(seen, batch.captions.select(text)).unbind(1)
    assert model.contrast is not None
    itc = model.contrast(model.embed_image(seen), model.embed_text(batch.captions))[torch.arange(64), text]
    expected = (together - apart).sigmoid() + itc
    torch.testing.assert_close(match_pairs(model, features, image, text), expected, atol=1e-4, rtol=1e-4)


def test_k_of_one_leaves_itc_as_it_is(folder: Path) -> None:
    found = retrieval(restore(folder / "qformer"), [str(folder / "test.tar")], k=1)["retrieval"]
    assert found["itm"] == found["itc"]


def test_any_of_several_captions(folder: Path) -> None:
    text = b"a red square\na crimson square\na scarlet square"
    samples = [("a.png", picture("red")), ("a.txt", text), ("b.png", picture("blue")), ("b.txt", b"a blue square")]
    result = retrieval(restore(folder / "clip"), [str(pack(folder / "several.tar", samples))])
    assert result["counts"]["captions"] == 4
    # Three of four texts belong to the first image: text to image 1 of 2; image to text 3 of 4, and 1 of 4.
    assert result["chance"]["t2i"]["R@1"] == pytest.approx(50)
    assert result["chance"]["i2t"]["R@1"] == pytest.approx(50)


def test_unusable_samples_are_counted(folder: Path) -> None:
    samples = [
        *(("a.png", picture("red")), ("a.txt", b"a red square")),
        *(("b.png", b"no"), ("b.txt", b"b")),
        *(("c.txt", b"alone"),),
    ]
    result = retrieval(restore(folder / "clip"), [str(pack(folder / "holes.tar", samples))])
    assert result["counts"]["unusable"] == {"no image": 1, "not an image": 1}
    assert result["counts"]["images"] == 1


def test_evaluate_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(str(folder / "qformer"), Request([str(folder / "test.tar")]), out=folder / "table")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Chance", "ITC", "top", "16", "re-ranked", "by", "ITM"]
    assert lines[1].split()[:6] == ["text", "→", "image", "R@1", "12.5", "%"]
    assert lines[11].split()[0] == "rSum" and lines[12] == "8 images, 8 captions"
    assert lines[-1] == f"open {folder / 'table' / 'report.html'}"
