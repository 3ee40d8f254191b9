"""The page of `vlm evaluate`, and `vlm compare`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.command import Commands
from tests.eval.refusals import FILES, refused
from tests.eval.test_protocol import karpathy
from tests.eval.test_report import Reader
from tests.tiny import COLOURS, pack, picture, squares
from vlm.eval import record as record_module
from vlm.eval.compare import Difference, compare, gain
from vlm.eval.data import open_evaluation_data
from vlm.eval.interval import Comparison
from vlm.eval.protocol import PROTOCOLS
from vlm.eval.ranking import rank
from vlm.eval.record import read
from vlm.eval.run import evaluate
from vlm.eval.show import FOUND, WAYS, Gallery, Order, matches, surest, worst
from vlm.eval.tasks import Request
from vlm.restore import restore

# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_offline_and_complete(place: Path) -> None:
    html = (place / "of-qformer" / "report.html").read_text(encoding="utf-8")
    page = Reader(html)
    references = [value for _, attrs in page.seen for name, value in attrs.items() if name in ("src", "href")]
    assert references and all(str(value).startswith("data:image/") for value in references)
    outside = re.sub(r'src="data:[^"]*"', "", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript:|<script|<link", outside)
    assert all(img["alt"] for img in page.all("img"))
    for words in (
        "Retrieval",
        "Recall against k",
        "The worst, text → image",
        "Where the Q-Former's queries look",
        "How this was measured",
        "top 4 re-ranked by ITM",
    ):
        assert words in page.text
    assert len(html) < 1_000_000


def test_a_model_without_a_qformer_has_no_such_pictures(place: Path) -> None:
    assert "queries look" not in (place / "of-clip" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("side", list(WAYS))
@pytest.mark.parametrize("way", ["itc", "itm"])
def test_what_is_shown_is_what_was_ranked(place: Path, side: Any, way: str) -> None:
    trained = restore(place / "qformer")
    data = open_evaluation_data([str(place / "test.tar")], trained.data)
    ranked = rank(trained, data, 12)
    fold = ranked.folds[0]
    gallery = Gallery.of(data.source, fold.features)
    order = Order("", fold.ranks[way], 12, fold.match if way == "itm" else None)
    features, ranks = fold.features, ranked.ranks(way, side)
    cosines = torch.einsum("nqe,me->nmq", features.image, features.text).amax(2)
    cosines = cosines.T if side == "t2i" else cosines
    torch.testing.assert_close(gallery.scores(side, torch.arange(12)), cosines)
    assert gallery.right(side, torch.arange(12)).equal(torch.eye(12, dtype=torch.bool))
    lowest = worst(gallery, order, side)
    assert [int(ranks[query]) for query in lowest] == sorted(ranks[ranks > 1].tolist(), reverse=True)[: len(lowest)]
    for query in range(12):
        best, _ = order.best(gallery, side, query, FOUND)
        wanted: Tensor = cosines[query]
        if way == "itm":
            other, same = torch.arange(12), torch.full((12,), query)
            wanted = fold.match(*((other, same) if side == "t2i" else (same, other)))
        torch.testing.assert_close(wanted[best], wanted.topk(FOUND).values)
    first = surest(gallery, order, side)
    assert set(first) <= set((ranks == 1).nonzero().flatten().tolist())
    for section in matches(gallery, order):
        for row in section.rows:
            assert sum(entry.right is True for entry in row.found) == 1 and FOUND <= len(row.found) <= FOUND + 1


def test_the_surest_are_furthest_ahead(place: Path) -> None:
    trained = restore(place / "clip")
    data = open_evaluation_data([str(place / "test.tar")], trained.data)
    features = rank(trained, data).folds[0].features
    angles = torch.tensor([0.0, 0.3, 1.2] + [2 + i / 100 for i in range(9)])
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    made = replace(features, image=vectors[:, None], text=vectors)
    ranks = replace(rank(trained, data).folds[0].ranks["itc"], t2i=torch.ones(12, dtype=torch.int64))
    chosen = surest(Gallery.of(data.source, made), Order("", ranks), "t2i")
    assert chosen[:3] == [2, 0, 1] or chosen[:3] == [2, 1, 0]  # the two share their margin


# --- compare ---------------------------------------------------------------------------------------------------------


def test_differences_are_second_less_first(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(place / "of-clip", place / "of-qformer", tmp_path / "both", json=True)
    told = json.loads(capsys.readouterr().out)
    values = [
        load_file(place / name / "values.safetensors")["retrieval/itc/t2i/rank"] for name in ("of-clip", "of-qformer")
    ]
    found = told["differences"]["retrieval/itc/t2i/mean_rank"]
    first, second = (float(value.double().mean()) for value in values)
    assert (found["first"], found["second"]) == pytest.approx((first, second))
    assert found["difference"] == pytest.approx(second - first)
    assert found["low"] <= found["difference"] <= found["high"] and 0 < found["p"] <= 1
    assert not any("itm" in name for name in told["differences"])  # the first has none
    page = Reader((tmp_path / "both" / "report.html").read_text(encoding="utf-8"))
    assert "Differences" in page.text and "Gained most" in page.text
    assert page.all("img") and all(str(img["src"]).startswith("data:image/webp") for img in page.all("img"))
    compare(place / "of-clip", place / "of-qformer", tmp_path / "both")
    assert "95 % interval" in capsys.readouterr().out


def test_a_model_is_no_better_than_itself(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(place / "of-clip", place / "of-clip", tmp_path / "same", json=True)
    told = json.loads(capsys.readouterr().out)["differences"]
    assert all((one["difference"], one["low"], one["high"], one["p"]) == (0, 0, 0, 1) for one in told.values())


@pytest.mark.parametrize(
    ("name", "difference", "p", "better"),
    [
        ("retrieval/itc/t2i/R@1", 2.0, 0.01, "second"),
        ("retrieval/itc/t2i/R@1", -2.0, 0.01, "first"),
        ("retrieval/itc/t2i/mean_rank", 2.0, 0.01, "first"),
        ("retrieval/itc/t2i/mean_rank", -2.0, 0.01, "second"),
        ("retrieval/itc/t2i/R@1", 2.0, 0.05, ""),
    ],
)
def test_what_is_better(name: str, difference: float, p: float, better: str) -> None:
    found = Difference(name, 10.0, 10 + difference, Comparison(difference, 0.0, 4.0, p))
    assert found.better == found.row[-1] == better
    assert found.row[0] == name.removeprefix("retrieval/").replace("/", " ").replace("_", " ")


def test_gain() -> None:
    ranks = torch.tensor([1, 10, 4]), torch.tensor([2, 1, 4])
    torch.testing.assert_close(gain("a/rank", *ranks), torch.tensor([-0.5, 0.9, 0.0], dtype=torch.float64))
    torch.testing.assert_close(gain("a/cider", *ranks), torch.tensor([1.0, -9.0, 0.0], dtype=torch.float64))


def test_pictures_that_have_gone_are_left_out(place: Path, tmp_path: Path) -> None:
    tar = squares(tmp_path / "gone.tar", 12, "t")
    for kind in ("clip", "qformer"):
        evaluate(str(place / kind), Request([str(tar)]), ["retrieval"], out=tmp_path / kind)
    tar.unlink()
    compare(tmp_path / "clip", tmp_path / "qformer", tmp_path / "both")
    page = Reader((tmp_path / "both" / "report.html").read_text(encoding="utf-8"))
    assert "Gained most" in page.text and not page.all("img")


# --- bad input


def test_bad_comparisons(vlm: Commands, place: Path) -> None:
    evaluate(str(place / "clip"), Request([str(place / "other.tar")]), out=place / "of-other")
    assert refused(vlm, place, "compare", "of-clip", "clip") == (
        "vlm: clip holds no evaluation (no metrics.json): vlm evaluate SHARDS --model M --out clip"
    )
    assert refused(vlm, place, "compare", "of-clip", "of-other") == (
        "vlm: of-clip and of-other differ in retrieval/itc/i2t/rank: 12 queries and 10; evaluate both on the same data"
    )
    compare(place / "of-clip", place / "of-qformer", place / "compared")
    assert refused(vlm, place, "compare", "of-clip", "compared").startswith(
        "vlm: compared/metrics.json is not of vlm evaluate, or damaged (FileNotFoundError("
    )
    evaluate(str(place / "clip"), Request([str(place / "test.tar")], labels="txt"), out=place / "of-classes")
    assert refused(vlm, place, "compare", "of-clip", "of-classes") == (
        "vlm: of-clip and of-classes have nothing in common (retrieval and classification): evaluate both with the "
        "same --task"
    )
    assert refused(vlm, place, "compare", "of-clip", "of-qformer", "--out", "of-clip").startswith(
        "vlm: of-clip holds another evaluation ("
    )


def test_other_protocols_and_classes_are_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {name: replace(one, images=10, captions=50) for name, one in PROTOCOLS.items()}
    monkeypatch.setattr("vlm.eval.protocol.PROTOCOLS", tiny)
    data = karpathy(tmp_path / "coco")
    for name in ("coco-5k", "coco-1k"):
        evaluate(str(place / "clip"), Request([str(data)], protocol=name), ["retrieval"], out=tmp_path / name)
    match = "differ in protocol, coco-5k and coco-1k: their figures are not of the same task"
    with pytest.raises(ValueError, match=match):
        compare(tmp_path / "coco-5k", tmp_path / "coco-1k", tmp_path / "both")
    labels = Request([str(place / "test.tar")], labels="txt")
    evaluate(str(place / "clip"), labels, out=tmp_path / "eight")
    (tmp_path / "names.txt").write_text("\n".join([*(f"a {name} square" for name in COLOURS), "a dog"]))
    more = replace(labels, classes=str(tmp_path / "names.txt"))
    evaluate(str(place / "clip"), more, out=tmp_path / "nine")
    with pytest.raises(ValueError, match="differ in classes, 8 and 9"):
        compare(tmp_path / "eight", tmp_path / "nine", tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_what_differs_beside_the_model_is_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other pictures under the same names, another k."""
    members = [(f"t{i:04d}.{e}", d) for i in range(12) for e, d in _member(i)]
    evaluate(
        str(place / "qformer"), Request([str(pack(tmp_path / "same.tar", members))], rerank=3), out=tmp_path / "one"
    )
    capsys.readouterr()
    compare(place / "of-qformer", tmp_path / "one", tmp_path / "both")
    told = [
        "the data differs in more than its queries: pictures, or what was left out",
        "rerank is 4 in the first, 3 in the second",
        "retrieval: rerank k is 4 in the first, 3 in the second",
    ]
    assert capsys.readouterr().err.splitlines() == [f"vlm: {line}" for line in told]
    assert json.loads((tmp_path / "both" / "metrics.json").read_text())["differs"] == told
    assert "Rerank is 4 in the first, 3 in the second." in (tmp_path / "both" / "report.html").read_text()


def _member(number: int) -> list[tuple[str, bytes]]:
    colour = COLOURS[number % 8]
    return [("png", picture("white")), ("txt", f"a {colour} square".encode())]


def test_recalls_are_told_at_k_that_say_something(place: Path, tmp_path: Path) -> None:
    shard = pack(tmp_path / "two.tar", [(f"{i}.{e}", d) for i in range(6) for e, d in _two(i)])
    evaluate(str(place / "clip"), Request([str(shard)], labels="txt"), out=tmp_path / "two")
    task = read(tmp_path / "two").record["tasks"]["classification"]
    assert task["metrics"]["top5"] is None
    assert sorted(task["intervals"]) == [f"zeroshot/{name}" for name in ("R@1", "margin", "mean_rank")]
    low, high = task["intervals"]["zeroshot/R@1"]
    assert low <= task["metrics"]["top1"] <= high
    compare(tmp_path / "two", tmp_path / "two", tmp_path / "both")
    found = json.loads((tmp_path / "both" / "metrics.json").read_text())["differences"]
    assert sorted(found) == [f"classification/{name}" for name in sorted(task["intervals"])]


def _two(number: int) -> list[tuple[str, bytes]]:
    return [("png", picture(COLOURS[number % 2])), ("txt", COLOURS[number % 2].encode())]


def test_a_damaged_evaluation(vlm: Commands, place: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((place / "of-clip" / name).read_bytes())
    (tmp_path / "queries.json").write_bytes(b"{}")
    said = refused(vlm, tmp_path, "compare", ".", place / "of-clip")
    assert said == "vlm: queries.json is not the file that was written with metrics.json: evaluate again"
    (tmp_path / "metrics.json").write_bytes(b"{")
    assert refused(vlm, tmp_path, "compare", ".", place / "of-clip").startswith(
        "vlm: metrics.json is not of vlm evaluate, or damaged ("
    )
    (tmp_path / "metrics.json").write_bytes(b'{"format": 99}')
    assert refused(vlm, tmp_path, "compare", ".", place / "of-clip") == (
        f"vlm: metrics.json: format 99, this version reads {record_module.FORMAT}"
    )


def test_other_queries_of_the_same_number(vlm: Commands, place: Path) -> None:
    pack(
        place / "reds.tar",
        [(f"t{i:04d}.{e}", d) for i in range(12) for e, d in (("png", picture("red")), ("txt", b"x"))],
    )
    evaluate(str(place / "clip"), Request([str(place / "reds.tar")]), out=place / "of-reds")
    assert refused(vlm, place, "compare", "of-clip", "of-reds") == (
        "vlm: of-clip and of-reds differ in retrieval/itc/t2i/rank: query 1 is 'a red square' in the first, 'x' in the "
        "second; evaluate both on the same data"
    )
