"""`vlm evaluate`: what is written, that figures follow from it, what is refused."""

import hashlib
import io
import json
import re
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import Commands
from tests.eval.refusals import FILES, refused
from tests.eval.test_protocol import karpathy
from tests.tiny import pack, picture, squares
from vlm.cli_evaluate import TASKS as NAMES
from vlm.eval.compare import compare
from vlm.eval.data import EvaluationData, open_evaluation_data
from vlm.eval.measure import measures
from vlm.eval.outcome import Outcome
from vlm.eval.protocol import PROTOCOLS, Protocol
from vlm.eval.ranking import rank, retrieval_task
from vlm.eval.record import default_folder, read, write_files
from vlm.eval.renamed import renamed
from vlm.eval.run import evaluate
from vlm.eval.show import WAYS
from vlm.eval.tasks import TASKS, Request, Task
from vlm.restore import Ready, restore


def test_the_record_says_all_that_decides_the_figures(place: Path) -> None:
    folder = place / "of-qformer"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    told = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert told["model"] == {"name": str(place / "qformer"), "weights": told["identity"]["model"], "step": 2}
    assert told["data"]["shards"] == [str(place / "test.tar")] and told["data"]["samples"] == 12
    assert all(re.fullmatch("[0-9a-f]{64}", told["identity"][name]) for name in ("model", "data"))
    wanted = {"tasks": ["retrieval"], "rerank": 4, "seed": 0, "dtype": "float32", "protocol": None}
    assert wanted.items() <= told["settings"].items()
    assert set(told["versions"]) == {"vlm", "torch", "open_clip", "timm", "pillow", "python"}
    assert (told["device"], told["command"]) == ("cpu", "vlm evaluate …")
    assert told["seconds"]["total"] >= told["seconds"]["retrieval"] > 0
    task = told["tasks"]["retrieval"]
    assert set(task["metrics"]) == {"itc", "itm"} and set(task["chance"]) == {"t2i", "i2t", "rsum"}
    assert task["counts"] == {"images": 12, "captions": 12, "unusable": {}}
    assert task["protocol"]["rerank_k"] == 4 and task["protocol"]["ties"].startswith("count against the model")
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES[1:]}
    assert told["files"] == hashes


def test_figures_follow_from_the_values(place: Path) -> None:
    folder = place / "of-qformer"
    task = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["tasks"]["retrieval"]
    found = read(folder)
    assert set(found.values) == {f"retrieval/{way}/{side}/rank" for way in ("itc", "itm") for side in WAYS}
    for name, values in found.values.items():
        _, way, side, _ = name.split("/")
        for figure, each in measures(name, values).items():
            short = figure.rpartition("/")[2]
            assert task["metrics"][way][side][short] == pytest.approx(float(each.mean()))
            low, high = task["intervals"][f"{way}/{side}/{short}"]
            assert low <= float(each.mean()) <= high
    recalls = [task["metrics"]["itc"][side][f"R@{k}"] for side in WAYS for k in (1, 5, 10)]
    assert task["metrics"]["itc"]["rsum"] == pytest.approx(sum(recalls))


def test_queries_are_named_and_lead_to_their_samples(place: Path) -> None:
    found = read(place / "of-clip")
    source = open_evaluation_data([str(place / "test.tar")], restore(place / "clip").data).source
    texts, pictures = "retrieval/itc/t2i/rank", "retrieval/itc/i2t/rank"
    assert found.queries[pictures] == [source.key(i) for i in range(12)]
    for name in (texts, pictures):
        for query, group, sample in zip(
            found.queries[name], found.groups[name], found.samples[name].tolist(), strict=True
        ):
            raw = source.raw(sample)
            assert raw.key == group and query in (raw.key, *raw.captions)


def test_the_same_again_is_allowed_and_gives_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "of-clip"
    before = {name: (folder / name).read_bytes() for name in ("values.safetensors", "queries.json")}
    evaluate(str(place / "clip"), Request([str(place / "test.tar")], rerank=4), out=folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    out = capsys.readouterr().out
    assert "text → image R@1" in out and "12 images, 12 captions" in out and f"open {folder / 'report.html'}" in out


def test_other_precision_and_kept_features(place: Path, tmp_path: Path) -> None:
    asked = Request([str(place / "test.tar")], rerank=4)
    evaluate(str(place / "qformer"), asked, ["retrieval"], out=tmp_path / "half", dtype="bfloat16")
    half, full = read(tmp_path / "half"), read(place / "of-qformer")
    assert half.record["settings"] == full.record["settings"] | {"dtype": "bfloat16"}
    assert {name: values.shape for name, values in half.values.items()} == dict.fromkeys(full.values, (12,))
    for name in ("first", "again"):
        evaluate(str(place / "qformer"), replace(asked, features=tmp_path / "kept"), ["retrieval"], out=tmp_path / name)
        assert (tmp_path / name / "values.safetensors").read_bytes() == (
            place / "of-qformer" / "values.safetensors"
        ).read_bytes()
    assert list((tmp_path / "kept").iterdir())


def test_another_evaluation_is_refused_with_its_differences(place: Path) -> None:
    folder = place / "of-clip"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError) as caught:
        evaluate(str(place / "clip"), Request([str(place / "test.tar")], rerank=8, seed=1), out=folder)
    assert str(caught.value) == (
        f"{folder} holds another evaluation (rerank: was 4, now 8; seed: was 0, now 1): choose another --out, or "
        "--overwrite it"
    )
    with pytest.raises(ValueError, match=r"holds another evaluation \(data: was [0-9a-f]{12}…, now [0-9a-f]{12}…\)"):
        evaluate(str(place / "clip"), Request([str(place / "other.tar")], rerank=4), out=folder)
    with pytest.raises(ValueError, match=r"holds another evaluation \(model: was "):
        evaluate(str(place / "qformer"), Request([str(place / "test.tar")], rerank=4), ["retrieval"], out=folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_overwrite_replaces(place: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"retrieval": {}}')
    asked = Request([str(place / "other.tar")])
    with pytest.raises(ValueError) as caught:
        evaluate(str(place / "clip"), asked, out=tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds metrics.json of something else than an evaluation: choose another --out, or --overwrite it"
    )
    evaluate(str(place / "clip"), asked, out=tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_nothing_is_written_where_a_task_fails(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot rank images and texts"):
        evaluate(str(place / "decoder"), Request([str(place / "test.tar")]), ["retrieval"], out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_swallows_no_figure(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError) as caught:
        evaluate(str(place / "clip"), Request([str(place / "test.tar")]), out=tmp_path / "out")
    names = "values.safetensors, queries.json, report.html, metrics.json"
    assert str(caught.value) == f"could not write {names} in {tmp_path / 'out'}: [Errno 28] No space left on device"
    assert list((tmp_path / "out").iterdir()) == []
    out = capsys.readouterr().out
    assert "text → image R@1" in out and "open" not in out


def test_files_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"a": b"one", "b": b"one"})
    calls = []

    def full_disk(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_files(tmp_path, {"a": b"two", "b": b"two"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"one", "b": b"one"}


@pytest.mark.parametrize(
    ("model", "shards", "name"),
    [
        ("runs/quickstart/2-qformer", ["vlm/quickstart/data/test-0000.tar"], "2-qformer-test-0000"),
        ("runs/mine/", ["shards/{000..003}.tar", "more.tar"], "mine-000..003"),
        ("Salesforce/blip2-opt-2.7b@main", ["dataset_coco.json#test"], "blip2-opt-2.7b-dataset_coco-test"),
        ("a/clip.pth", ["https://host/x y.tar"], "clip-x_y"),
        (".", ["/"], "data-data"),
    ],
)
def test_the_folder_is_named_after_model_and_data(model: str, shards: list[str], name: str) -> None:
    assert default_folder(model, shards) == Path("runs/evaluate") / name


def test_the_names_of_other_tools(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((place / "of-qformer" / "metrics.json").read_text(encoding="utf-8"))
    ours = record["tasks"]["retrieval"]["metrics"]
    asked = Request([str(place / "test.tar")], rerank=4)
    evaluate(str(place / "qformer"), asked, out=place / "of-qformer", names="lavis")
    theirs = json.loads(capsys.readouterr().out)
    assert theirs["img_r1"] == ours["itm"]["t2i"]["R@1"] and theirs["txt_r5"] == ours["itm"]["i2t"]["R@5"]
    told = renamed(record, "clip_benchmark")
    assert (told["task"], told["dataset"], told["model"]) == ("zeroshot_retrieval", "test", "qformer")
    assert told["metrics"]["image_retrieval_recall@1"] == pytest.approx(ours["itc"]["t2i"]["R@1"] / 100)


def test_the_command_line_offers_what_there_is() -> None:
    assert list(NAMES) == list(TASKS)


def test_unless_named_all_is_measured_that_the_model_can(place: Path, tmp_path: Path) -> None:
    evaluate(str(place / "qformer"), Request([str(place / "test.tar")], rerank=4), out=tmp_path / "all")
    told = read(tmp_path / "all").record["tasks"]
    assert set(told) == {"retrieval", "captions"}
    assert told["captions"]["counts"]["images"] == 12 and "cider_d" in told["captions"]["chance"]
    page = (tmp_path / "all" / "report.html").read_text(encoding="utf-8")
    assert "Retrieval" in page and "CIDEr-D" in page


def test_a_protocol_holds_for_captions_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its split alone, with all that people wrote about it; retrieval takes five captions a picture."""
    tiny = {name: replace(one, images=10, captions=50) for name, one in PROTOCOLS.items()}
    monkeypatch.setattr("vlm.eval.protocol.PROTOCOLS", tiny)
    asked = Request([str(karpathy(tmp_path / "coco"))], protocol="coco-5k")
    evaluate(str(place / "qformer"), asked, out=tmp_path / "out")
    told = read(tmp_path / "out").record["tasks"]
    assert told["retrieval"]["counts"] == {"images": 10, "captions": 50, "unusable": {}}
    assert told["captions"]["counts"] == {"images": 10, "references": 51, "unusable": {}}


@pytest.mark.parametrize("kind", ["a table beside a folder", "CLIP_benchmark's layout"])
def test_captions_are_of_the_data_that_retrieval_has(place: Path, tmp_path: Path, kind: str) -> None:
    if kind == "a table beside a folder":
        (tmp_path / "pictures").mkdir()
        for name in ("red", "blue", "green"):
            (tmp_path / "pictures" / f"{name}.png").write_bytes(picture(name))
        rows = [{"image": f"{name}.png", "caption": f"a {name} square"} for name in ("red", "blue", "green")]
        (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
        asked = Request([str(tmp_path / "table.jsonl")], images=tmp_path / "pictures", caption="caption")
    else:
        (tmp_path / "set" / "test").mkdir(parents=True)
        squares(tmp_path / "set" / "test" / "0.tar", 3)
        (tmp_path / "set" / "test" / "nshards.txt").write_text("1\n")
        (tmp_path / "set" / "dataset_type.txt").write_text("retrieval")
        asked = Request([str(tmp_path / "set")])
    evaluate(str(place / "qformer"), asked, out=tmp_path / "out")
    told = read(tmp_path / "out").record["tasks"]
    assert told["retrieval"]["counts"] == {"images": 3, "captions": 3, "unusable": {}}
    assert told["captions"]["counts"] == {"images": 3, "references": 3, "unusable": {}}


def test_what_is_left_out_is_told_beside_the_figures(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {name: replace(one, images=10, captions=50) for name, one in PROTOCOLS.items()}
    monkeypatch.setattr("vlm.eval.protocol.PROTOCOLS", tiny)
    data = karpathy(tmp_path / "coco")
    (tmp_path / "coco" / "val2014" / "3.png").write_bytes(b"no picture")
    evaluate(str(place / "clip"), Request([str(data)], protocol="coco-5k"), out=tmp_path / "out")
    told = [
        "LEFT OUT, not usable: 1 not an image",
        "NOT coco-5k: 9 usable pictures in place of 10, 45 captions in place of 50",
    ]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    lines = capsys.readouterr().out.splitlines()
    assert all(line in lines and f"{line}." in page for line in told)


def test_the_record_is_written_where_nobody_reads_the_figures(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    with pytest.raises(BrokenPipeError):
        evaluate(str(place / "clip"), Request([str(place / "test.tar")]), out=tmp_path / "out")
    assert read(tmp_path / "out").record["tasks"]["retrieval"]["counts"]["images"] == 12


def test_questions_are_looked_for_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text("[]")

    def said(message: str) -> AbstractContextManager[Any]:
        return pytest.raises(ValueError, match=f"^{re.escape(message)}$")

    def run(*files: str, images: Path | None = None, tasks: tuple[str, ...] = ("answers",)) -> None:
        evaluate("nowhere/at/all", Request(list(files), images=images), tasks, tmp_path / "one")

    with said("--task answers: name the folder of the pictures that are asked about (--images FOLDER)"):
        run("q.json")
    with said("--task answers: one file of questions is read, not 2"):
        run("q.json", "r.json", images=tmp_path)
    with said(f"--images {tmp_path / 'none'}: no such folder"):
        run("q.json", images=tmp_path / "none")
    with said(f"{tmp_path / 'r.json'}: no such file of questions"):
        run(str(tmp_path / "r.json"), images=tmp_path)
    with said("--task answers is on a file of questions, and captions on pictures: one at a time"):
        run(str(tmp_path / "q.json"), images=tmp_path, tasks=("captions", "answers"))


def test_a_task_on_questions_opens_no_pictures(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(trained: Ready, asked: Request, _: EvaluationData | None) -> Outcome:
        lines = Path(asked.shards[0]).read_text().splitlines()
        values = {"length": torch.tensor([len(line) for line in lines])}
        return Outcome({"lines": len(lines)}, {}, {"lines": len(lines)}, {}, values, {"length": lines})

    monkeypatch.setitem(TASKS, "counting", Task(count, questions=True))  # type: ignore[misc]
    questions = tmp_path / "questions.txt"
    questions.write_text("what?\nwhich one?\n")
    for name in ("one", "two"):
        evaluate(str(place / "decoder"), Request([str(questions)]), ["counting"], tmp_path / name)
    told = read(tmp_path / "one")
    assert told.record["tasks"]["counting"]["metrics"] == {"lines": 2} and "settings" not in told.record["data"]
    assert told.record["tasks"]["counting"]["intervals"]["length"][0] >= 5
    compare(tmp_path / "one", tmp_path / "two", tmp_path / "both")
    questions.write_text("what?\n")
    with pytest.raises(ValueError, match=r"one holds another evaluation \(data: was "):
        evaluate(str(place / "decoder"), Request([str(questions)]), ["counting"], tmp_path / "one")
    with pytest.raises(ValueError) as caught:
        evaluate(str(place / "clip"), Request([str(questions)]), ["retrieval", "counting"], tmp_path / "three")
    assert str(caught.value) == ("--task counting is on a file of questions, and retrieval on pictures: one at a time")


def test_classification_where_the_data_has_classes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = Request([str(place / "test.tar")], labels="txt")
    evaluate(str(place / "clip"), asked, out=place / "classes", json=True)
    told = json.loads(capsys.readouterr().out)
    assert list(told["tasks"]) == ["classification"]
    assert told["tasks"]["classification"]["chance"]["top1"] == pytest.approx(12.5)
    assert "Zero-shot classification" in (place / "classes" / "report.html").read_text(encoding="utf-8")


def test_the_mean_over_folds(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard = Protocol("tiny", "two halves", "tiny.json", "test", images=12, captions=12, folds=2)
    monkeypatch.setitem(PROTOCOLS, "tiny", standard)  # type: ignore[misc]
    trained = restore(place / "qformer")
    folded = retrieval_task(trained, Request([str(place / "test.tar")], protocol="tiny").open(trained), 3, 0)
    halves = []
    whole = open_evaluation_data([str(place / "test.tar")], trained.data).source
    for half in (range(6), range(6, 12)):
        samples = [whole.raw(i) for i in half]
        members = [(f"{raw.key}.{end}", data) for raw in samples for end, data in _members(raw)]
        tar = pack(place / f"half{half.start}.tar", members)
        halves.append(rank(trained, open_evaluation_data([str(tar)], trained.data), 3))
    for way in ("itc", "itm"):
        for side in WAYS:
            both = torch.cat([half.ranks(way, side) for half in halves])
            torch.testing.assert_close(folded.values[f"{way}/{side}/rank"], both)
            mean = sum(half.summary(way)[side]["median_rank"] for half in halves) / 2
            assert folded.metrics[way][side]["median_rank"] == pytest.approx(mean)
    assert folded.protocol["folds"] == 2 and folded.protocol["deviations"] == []
    assert folded.chance["t2i"]["R@1"] == pytest.approx(halves[0].chance()["t2i"]["R@1"])


def _members(raw: Any) -> list[tuple[str, bytes]]:
    return [("png", raw.image), ("txt", "\n".join(raw.captions).encode())]


# --- bad input, by exit code and message -----------------------------------------------------------------------------


def test_bad_evaluations(vlm: Commands, place: Path) -> None:
    test = ("evaluate", "test.tar", "-m", "clip")
    (place / "file").touch()
    assert refused(vlm, place, *test, "--out", "file") == "vlm: --out: file is a file"
    assert refused(vlm, place, *test, "--out", "file/below").endswith("/file is a file")
    assert refused(vlm, place, *test, "--out", "of-qformer").startswith(
        "vlm: of-qformer holds another evaluation (model: "
    )
    assert refused(vlm, place, *test, "--features", "kept", "--dtype", "bfloat16") == (
        "vlm: --features keeps what float32 gives: leave --dtype bfloat16 away, or --features"
    )
    assert refused(vlm, place, *test, "--task", "classification", "--labels", "txt", "--names", "lavis") == (
        "vlm: --names lavis is of one --task, retrieval, not of classification"
    )
    assert refused(vlm, place, *test, "--task", "classification") == (
        "vlm: test.tar: which class a picture has is not known: say where it stands (--labels json:FIELD)"
    )
    assert "'retrievel' is not one of" in refused(vlm, place, *test, "--task", "retrievel")
    assert refused(vlm, place, *test, "--task", "retrieval", "--labels", "txt") == (
        "vlm: --task retrieval: test.tar has classes in place of captions: name --task classification"
    )
