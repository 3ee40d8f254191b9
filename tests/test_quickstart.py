"""The quickstart end to end with a few steps: every stage, every figure, the page."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vlm.quickstart.run import STAGES, quickstart

SHORT = ["train.steps=3", "train.warmup=0", "train.batch_size=8", "train.log_every=1"]


class Images(HTMLParser):
    """Counts pictures and collects every reference."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.slow
def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    experts = ["model.language.mixer.kind=retention", "model.language.ffn.kind=moe"]
    quickstart(out, overrides=[*SHORT, *experts])
    held = (out / "3-caption" / "config.yaml").read_text(encoding="utf-8")
    assert "kind: retention" in held and "kind: moe" in held
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    for method in ("itc", "itm", "clip"):
        for way in ("t2i", "i2t"):
            recall = [metrics["retrieval"][method][way][f"R@{k}"] for k in (1, 5, 10)]
            assert 0 <= recall[0] <= recall[1] <= recall[2] <= 100
    assert metrics["chance"]["t2i"]["R@10"] == pytest.approx(100 * 10 / 503)
    assert metrics["counts"]["images"] == metrics["counts"]["captions"] == metrics["captions"]["count"] == 503
    assert 0 <= metrics["captions"]["exact_name"] <= 100 and metrics["captions"]["cider_d"] >= 0
    assert metrics["seconds"]["total"] >= sum(metrics["seconds"][name] for name in STAGES)
    page = Images()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    assert len(page.sources) >= 20 and all(source.startswith("data:") for source in page.sources)
    told = capsys.readouterr()
    assert "report.html" in told.out and "[5/5]" in told.err and "left" in told.err
    with pytest.raises(ValueError, match="holds an earlier quickstart"):
        quickstart(out)
