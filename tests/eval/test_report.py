"""The page: whole, offline, escaped, readable without colour, written at once or not at all."""

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vlm.eval import chart, report
from vlm.eval.report import (
    Card,
    Curves,
    Entry,
    Gallery,
    Match,
    Matches,
    Page,
    Recalls,
    Score,
    Table,
    render,
    retrieval_tables,
    write_page,
)

EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br", "link", "input", "hr"}


def picture(kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, kind)
    return stream.getvalue()


def full_page(text: str = "plain") -> Page:
    losses = [(step, 4.0 / (step + 1)) for step in range(1000)]
    queries = [Entry(text, note=text), Entry(text, picture(), text)]
    found = Entry(text, picture(), text, right=True, place="1,000")
    return Page(
        title=text,
        intro=f"{text}\n\nSecond paragraph.",
        facts=[(f"fact {text}", f"value {text}")],
        sections=[
            Table(f"table {text}", ["", "Chance", "ITC"], [[text, "0.2 %", Score(63.4, 0.2)]], note=text),
            Curves(f"curves {text}", {text: losses, "few": [(0, 1.5), (10, 0.5)]}, {text: 4.85}, note=text),
            Gallery(f"gallery {text}", [Card(picture(), text, text, ok) for ok in (True, False, None)], note=text),
            Recalls(f"recalls {text}", {text: {text: [(1, 20.0), (10, 90.0)]}}, {text: [(1, 1.0), (10, 10.0)]}, text),
            Matches(f"matches {text}", [Match(query, [found, replace(found, image=None)]) for query in queries], text),
        ],
        credits=[text],
    )


class Reader(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.seen if name == tag]


def test_well_formed_and_complete() -> None:
    page = Reader(render(full_page()))
    for expected in (
        "fact plain",
        "value plain",
        "Second paragraph.",
        "63.4 %",
        "0.2 %",
        "chance 4.85",
        "right",
        "wrong",
    ):
        assert expected in page.text
    headings = [int(tag[1]) for tag, _ in page.seen if re.fullmatch(r"h\d", tag)]
    assert headings == [1, 2, 2, 2, 2, 2]


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = render(full_page())
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript:", html)
    page = Reader(html)
    assert not [tag for tag, _ in page.seen if tag in {"script", "link", "iframe", "object", "embed", "base"}]
    assert {str(img["src"])[:22] for img in page.all("img")} == {"data:image/png;base64,"}
    assert "default-src 'none'" in html


def test_everything_is_escaped() -> None:
    html = render(full_page(EVIL))
    assert "<script" not in html and "alert('x')" not in html
    page = Reader(html)
    assert page.text.count(EVIL) >= 12
    assert EVIL in [img["alt"] for img in page.all("img")]
    assert not [attrs for _, attrs in page.seen if any(name.startswith("on") for name in attrs)]


def test_readable_without_seeing() -> None:
    page = Reader(render(full_page("cat")))
    assert all(img["alt"] for img in page.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert "cat: from 1.03 to 0.004, chance is 4.85" in [svg.get("aria-label") for svg in page.all("svg")]
    assert {"63.4 %, chance 0.2 %"} == {div["aria-label"] for div in page.all("div") if div.get("class") == "meter"}
    assert [th["scope"] for th in page.all("th")] == ["col", "col", "row"]
    assert page.all("html")[0]["lang"] == "en"


def test_a_right_card_does_not_repeat_itself() -> None:
    html = render(
        Page("t", "", [], [Gallery("g", [Card(picture(), "a cat", "a cat", True), Card(picture(), "", "dog", False)])])
    )
    text = Reader(html).text
    assert text.count("a cat") == 1 and "(nothing)" in text and "is: dog" in text


@pytest.mark.parametrize(
    ("score", "text", "bar", "mark"),
    [
        (Score(25, 10), "25.0 %", 25, 10),
        (Score(1.5, best=3, unit="", digits=2), "1.50", 50, None),
        (Score(130), "130.0 %", 100, None),
        (Score(math.nan), "not finite", None, None),
    ],
)
def test_bars(score: Score, text: str, bar: float | None, mark: float | None) -> None:
    cell = report._cell(score)
    assert (cell["text"], cell["bar"], cell.get("mark")) == (text, bar, mark)


def test_chart_geometry_by_hand() -> None:
    drawn = chart.chart("loss", [(0, 2.0), (10, 1.0)], chance=4.0)
    x, y = chart.Axis(0, 10, 44, 348), chart.Axis(0, 4.24, 184, 14)
    assert drawn["line"] == f"44.0,{y(2)} 348.0,{y(1)}"
    assert drawn["chance_y"] == y(4) and drawn["dot"] == (348, y(1))
    assert (drawn["first"], drawn["last"], drawn["raw"]) == ("2.00", "1.00", "")
    assert drawn["x_ticks"] == [(x(n), str(n)) for n in (0, 2, 4, 6, 8, 10)]
    assert drawn["y_ticks"] == [(y(n), str(n)) for n in (0, 1, 2, 3, 4)]


def test_thinning_keeps_spikes_and_smoothing_keeps_the_mean() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = [p for bucket in chart.buckets(points, chart.RAW) for p in chart.extremes(bucket)]
    assert (4321.0, 99.0) in kept and len(kept) <= 2 * chart.RAW
    means = chart.means([(float(step), float(step % 7)) for step in range(700)])
    assert len(means) <= chart.SMOOTH
    assert sum(value for _, value in means) / len(means) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize(
    "values", [[], [math.nan], [2.0], [3.0, 3.0], [0.0, 0.0], [1e-5, 2e-5], [-1.0, 1.0], [1e6, 1e3]]
)
def test_odd_curves_still_draw(values: list[float]) -> None:
    html = render(Page("t", "", [], [Curves("c", {"loss": list(enumerate(values))}, {"loss": 1.0})]))
    Reader(html)
    assert "nan" not in html.lower()


def test_values_that_are_not_finite_are_counted_not_hidden() -> None:
    text = Reader(render(Page("t", "", [], [Curves("c", {"loss": [(0, 1.0), (1, math.nan), (2, math.inf)]})]))).text
    assert "2 values were not finite" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.254, "0.25"), (1500, "1.5k"), (2000, "2k"), (450, "450"), (0, "0"), (-3, "-3.00"), (0.00424, "0.0042")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert chart.number(value) == text


def test_retrieval_tables() -> None:
    chance = {way: {"R@1": 0.2, "R@10": 2.0, "median_rank": 252.0} for way in ("t2i", "i2t")}
    one = {
        "t2i": {"R@1": 63.4, "R@10": 82.5, "median_rank": 1.0},
        "i2t": {"R@1": 60.2, "R@10": 80.0, "median_rank": 2.0},
    }
    first, second = retrieval_tables({"ITC": one}, chance, note="n")
    assert first.header == ["", "Chance", "ITC"]
    assert first.rows[0] == ["Recall@1", "0.2 %", Score(63.4, 0.2)]
    assert second.rows[2] == ["Median rank", "252.0", "2.0"]
    assert (first.note, second.note) == ("", "n")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "GIF"])
def test_pictures_are_embedded_as_what_they_are(kind: str) -> None:
    assert report._data_uri(picture(kind)).startswith(f"data:image/{kind.lower()};base64,")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes is no PNG"):
        render(Page("t", "", [], [Gallery("g", [Card(b"abc", "a")])]))
    with pytest.raises(ValueError, match="table 'x': a row of 1 cells under 2 headings"):
        render(Page("t", "", [], [Table("x", ["a", "b"], [["a"]])]))


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "page.html"
    write_page(path, full_page("first"))
    before = path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_page(path, full_page("second"))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    monkeypatch.undo()
    write_page(path, full_page("second"))
    assert b"second" in path.read_bytes()


def test_recall_curves_by_hand() -> None:
    drawn = chart.shares("t2i", {"ITC": [(1, 50.0), (100, 100.0)]}, [(1, 1.0), (100, 100.0)])
    x, y = chart.Axis(0, 2, 44, 348), chart.Axis(0, 100, 184, 14)
    assert drawn["lines"] == [("ITC", f"{x(0)},{y(50)} {x(2)},{y(100)}")]
    assert drawn["chance"] == f"{x(0)},{y(1)} {x(2)},{y(100)}"
    assert [label for _, label in drawn["x_ticks"]] == ["1", "2", "5", "10", "20", "50", "100"]
    assert drawn["label"] == "t2i: ITC 50.0 to 100.0 percent; chance 1.0 to 100.0 percent"
    chart.shares("one candidate", {"ITC": [(1, 100.0)]}, [(1, 100.0)])


def test_a_score_with_its_interval() -> None:
    cell = report._cell(Score(63.4, 0.2, interval=(60.0, 66.8)))
    assert (cell["within"], cell["start"], cell["wide"]) == ("60.0–66.8", 60, 6.8)
    assert cell["label"] == "63.4 %, chance 0.2 %, 95 % interval 60.0–66.8"


def test_a_card_without_its_picture() -> None:
    page = Reader(render(Page("t", "", [], [Gallery("g", [Card(None, "a cat", note="rank 9 → 1")])])))
    assert not page.all("img") and "a cat" in page.text and "rank 9 → 1" in page.text


def test_what_fits_is_said_in_words() -> None:
    rows = [Match(Entry("cat"), [Entry("dog", picture()), Entry("cat", picture(), right=True)])]
    page = Reader(render(Page("t", "", [], [Matches("m", rows)])))
    assert page.text.count("right") == 1 and [img["alt"] for img in page.all("img")] == ["dog", "cat"]
