"""`vlm evaluate` and `vlm caption` on tiny trained runs: what they print, and that batches change nothing."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import COLOURS, pack, picture, squares, tiny_run
from vlm import build_data
from vlm.captioning import run as run_module
from vlm.captioning.run import caption, find_images
from vlm.data.image import decode
from vlm.data.shards import Shards
from vlm.eval.features import extract, match_pairs
from vlm.eval.run import evaluate, retrieval
from vlm.eval.tasks import Request
from vlm.model.generate import Sampling
from vlm.restore import captions, restore
from vlm.train.run import train_run

WAYS, MEASURES = {"t2i", "i2t"}, {"R@1", "R@5", "R@10", "mean_rank", "median_rank"}


def rate(value: float) -> str:
    return f"train.params=[{{match: '.*', lr: {value}}}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have learned eight colours, and a picture of each."""
    folder = tmp_path_factory.mktemp("runs")
    common = ("train.batch_size=16", "train.log_every=60", "train.warmup=10", "data.cache_mb=8")
    train_run(tiny_run(folder, "clip", *common, "train.steps=60", rate(5e-3)), folder / "clip")
    frozen = ("model.vision.frozen=true", f"model.init.vision={folder / 'clip'}", rate(2e-2))
    learned = ("train.steps=120", "model.connector.queries=4")
    train_run(tiny_run(folder, "qformer", *common, *frozen, *learned), folder / "qformer")
    train_run(tiny_run(folder, "decoder", *common, *frozen, "train.steps=60"), folder / "decoder")
    (folder / "pictures" / "more").mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        (folder / "pictures" / ("more" if i > 5 else "") / f"{colour}.png").write_bytes(picture(colour))
    (folder / "pictures" / "notes.txt").write_text("no picture")
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


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return {Path(path).stem: text for path, text in rows}


@pytest.mark.parametrize("kind", ["qformer", "decoder"])
def test_captions_name_what_was_learned(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    caption(str(folder / kind), [str(folder / "pictures")])
    found = said(capsys)
    assert list(found) == sorted(COLOURS[:6])[:3] + sorted(COLOURS[6:]) + sorted(COLOURS[:6])[3:]  # in order of paths
    assert sum(text == f"a {colour} square" for colour, text in found.items()) >= 6


def test_files_and_a_list_on_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    red, blue = folder / "pictures" / "red.png", folder / "pictures" / "blue.png"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{blue}\n\n{red}\n"))
    caption(str(folder / "decoder"), [str(red), "-"], json=True)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["image"] for record in records] == [str(red), str(blue), str(red)]
    assert set(records[0]) == {"image", "caption"}
    assert records[0]["caption"] == records[2]["caption"]


def test_a_picture_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = folder / "bad.png"
    bad.write_bytes(b"\x89PNG and no more")
    good = [str(folder / "pictures" / f"{colour}.png") for colour in ("red", "blue")]
    with pytest.raises(SystemExit) as caught:
        caption(str(folder / "decoder"), [good[0], str(bad), good[1]])
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert [line.split("\t")[0] for line in printed.out.splitlines()] == good
    assert printed.err.splitlines()[0].startswith(f"vlm: {bad}: not an image (")
    assert printed.err.splitlines()[-1] == "vlm: 1 of 3 pictures could not be read"


def test_only_unreadable_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = folder / "empty.png"
    bad.touch()
    with pytest.raises(SystemExit):
        caption(str(folder / "decoder"), [str(bad)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["qformer", "decoder"])
@pytest.mark.parametrize("sampling", [Sampling(11), Sampling(6, min_new=3, repetition_penalty=1.3)])
def test_batched_captions_equal_single_ones(folder: Path, kind: str, sampling: Sampling) -> None:
    trained = restore(folder / kind)
    images = torch.stack([trained.model.vision.transform(decode(picture(colour))) for colour in COLOURS])
    together = captions(trained, images, sampling)
    assert together == [text for image in images for text in captions(trained, image[None], sampling)]
    assert len(set(together)) > 1


def test_batches_are_joined_in_order(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caption(str(folder / "decoder"), [str(folder / "pictures")])
    whole = capsys.readouterr().out
    monkeypatch.setattr(run_module, "BATCH", 3)
    caption(str(folder / "decoder"), [str(folder / "pictures")])
    assert capsys.readouterr().out == whole


def test_sampled_captions_follow_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(seed: int) -> dict[str, str]:
        options: dict[str, Any] = {"temperature": 3.0, "top_k": 50, "seed": seed}
        caption(str(folder / "decoder"), [str(folder / "pictures")], **options)
        return said(capsys)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_find_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "A.JPG").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.webp").touch()
    (tmp_path / "b" / "d.txt").touch()
    names = [str(path.relative_to(tmp_path)) for path in find_images([str(tmp_path)])]
    assert names == ["A.JPG", os.path.join("b", "c.webp")]
    assert list(find_images([str(tmp_path / "b" / "d.txt")])) == [tmp_path / "b" / "d.txt"]  # named: tried
    with pytest.raises(ValueError, match="no such file or folder"):
        list(find_images([str(tmp_path / "e.png")]))
