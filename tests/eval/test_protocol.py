"""Protocols: the split, the first five captions, the folds, the counts; CLIP_benchmark's folders are recognised."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval.noisy import noisy
from tests.tiny import COLOURS, pack, picture, squares
from vlm.config import schema
from vlm.eval import protocol as module
from vlm.eval.data import folds, open_evaluation_data
from vlm.eval.features import extract
from vlm.eval.protocol import PROTOCOLS, find_protocol, mean_over_folds
from vlm.eval.retrieval import rank_counts, summarize

SETTINGS = schema.PairData(train="", id="none such")  # of another data set: must not be asked of a benchmark
PICTURES = 10


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocols for ten pictures."""
    tiny = {name: replace(one, images=PICTURES, captions=5 * PICTURES) for name, one in PROTOCOLS.items()}
    monkeypatch.setattr(module, "PROTOCOLS", tiny)


def karpathy(folder: Path, name: str = "dataset_coco.json", captions: int = 5, test: int = PICTURES) -> Path:
    """A data set of Karpathy's: each third picture is of the split val; some have a caption more than five."""
    entries: list[dict[str, Any]] = []
    (folder / "val2014").mkdir(parents=True)
    splits = [split for i in range(test) for split in (["test", "val"] if i % 2 else ["test"])]
    for i, split in enumerate(splits):
        (folder / "val2014" / f"{i}.png").write_bytes(picture(COLOURS[i % 8], 40 + i))
        texts = [f"{COLOURS[i % 8]} square {i}, words {n}" for n in range(captions + (i == 0))]
        entries.append({"filepath": "val2014", "filename": f"{i}.png", "split": split, "imgid": i})
        entries[-1]["sentences"] = [{"raw": text} for text in texts]
    (folder / name).write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return folder / name


def refused(match: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(match)}")


def test_the_numbers_of_the_literature() -> None:
    coco, folded, flickr = (find_protocol(name) for name in ("coco-5k", "coco-1k", "flickr30k-1k"))
    assert (coco.images, coco.captions, coco.first, coco.folds) == (5000, 25_000, 5, 1)
    assert (folded.images, folded.captions, folded.first, folded.folds) == (5000, 25_000, 5, 5)
    assert (flickr.images, flickr.captions, flickr.first, flickr.folds) == (1000, 5000, 5, 1)
    assert [folded.fold(number) for number in (0, 4)] == [range(1000), range(4000, 5000)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("named", ["file", "folder", "split"])
def test_karpathys_test_split(tmp_path: Path, named: str) -> None:
    file = karpathy(tmp_path / "coco")
    name = {"file": str(file), "folder": str(file.parent), "split": f"{file}#test"}[named]
    data = open_evaluation_data([name], SETTINGS, "coco-5k")
    assert len(data.source) == PICTURES
    assert len(data.source.raw(0).captions) == 6
    assert "split test" in data.about
    ready = noisy(tmp_path)
    features = extract(ready.model, data.loader(ready), False)
    assert (len(features.names), len(features.strings)) == (PICTURES, 5 * PICTURES)
    assert list(features.strings[:5]) == [f"red square 0, words {n}" for n in range(5)]
    assert data.protocol is not None and data.protocol.deviations(PICTURES, 50) == []


@pytest.mark.usefixtures("small")
def test_folds_are_neighbours_and_figures_their_mean(tmp_path: Path) -> None:
    ready = noisy(tmp_path)
    data = open_evaluation_data([str(karpathy(tmp_path / "coco"))], SETTINGS, "coco-1k")
    features = extract(ready.model, data.loader(ready), False)
    parts = folds(features, data.protocol)
    assert [part.places.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert torch.equal(torch.cat([part.text for part in parts]), features.text)
    found = [summarize(rank_counts(p.image, p.text, p.image_ids, p.text_ids)) for p in parts]
    mean = mean_over_folds(found)
    assert mean["t2i"]["R@1"] == pytest.approx(sum(one["t2i"]["R@1"] for one in found) / 5)
    by_hand = []
    for part in range(5):  # of two pictures each: a text finds its own when it is nearer than the other
        image, text = features.image[2 * part : 2 * part + 2, 0], features.text[10 * part : 10 * part + 10]
        scores = text @ image.T
        own = torch.tensor([0] * 5 + [1] * 5)
        by_hand.append((scores.gather(1, own[:, None]) > scores.gather(1, 1 - own[:, None])).double().mean())
    assert mean["t2i"]["R@1"] == pytest.approx(100 * float(torch.stack(by_hand).mean()))
    assert folds(features, None) == [features]


@pytest.mark.usefixtures("small")
def test_a_picture_that_is_missing_is_told_and_moves_no_fold(tmp_path: Path) -> None:
    file, ready = karpathy(tmp_path / "coco"), noisy(tmp_path)
    (file.parent / "val2014" / "0.png").write_bytes(b"no picture")
    settings = SETTINGS.model_copy(update={"max_bad_fraction": 0.2})
    data = open_evaluation_data([str(file)], settings, "coco-1k")
    features = extract(ready.model, data.loader(ready), False)
    assert [len(part.names) for part in folds(features, data.protocol)] == [1, 2, 2, 2, 2]
    assert data.protocol is not None
    assert data.protocol.deviations(len(features.names), len(features.strings)) == [
        "9 usable pictures in place of 10",
        "45 captions in place of 50",
    ]


@pytest.mark.usefixtures("small")
def test_shards_of_a_benchmark(tmp_path: Path) -> None:
    data = open_evaluation_data([str(squares(tmp_path / "s.tar", PICTURES))], SETTINGS, "flickr30k-1k")
    assert data.protocol is not None and data.protocol.deviations(10, 10) == ["10 captions in place of 50"]


@pytest.mark.usefixtures("small")
def test_another_size(tmp_path: Path) -> None:
    shard = squares(tmp_path / "s.tar", 7)
    message = f"{shard}: 7 pictures, and flickr30k-1k (Karpathy's test split of Flickr30k) has 10: name its data, or "
    with refused(message + "give no protocol"):
        open_evaluation_data([str(shard)], SETTINGS, "flickr30k-1k")


def test_another_split(tmp_path: Path) -> None:
    file = karpathy(tmp_path / "coco")
    with refused(f"{file}#val: coco-5k is the split test; name {file}, or give no protocol"):
        open_evaluation_data([f"{file}#val"], SETTINGS, "coco-5k")


def test_no_such_protocol(tmp_path: Path) -> None:
    with refused("--protocol coco: there is no such protocol; there are: coco-5k, coco-1k, flickr30k-1k"):
        open_evaluation_data([str(tmp_path)], SETTINGS, "coco")


def test_labels_and_captions(tmp_path: Path) -> None:
    with refused("--labels cls: a set is measured by its classes or by its captions; give one of the two"):
        open_evaluation_data([str(tmp_path)], SETTINGS, caption="txt", labels="cls")


@pytest.mark.usefixtures("small")
def test_folds_do_not_shift_by_a_picture_without_captions(tmp_path: Path) -> None:
    members = [
        (f"{i:04d}.{suffix}", data) for i in range(PICTURES) for suffix, data in _pair(i) if i or suffix == "png"
    ]
    file = pack(tmp_path / "coco.tar", members)
    settings = SETTINGS.model_copy(update={"max_bad_fraction": 0.9})
    with refused(
        f"{file}: {{'no caption': 1}} were left out, so that others would come into the folds of coco-1k: mend"
    ):
        open_evaluation_data([str(file)], settings, "coco-1k")
    assert len(open_evaluation_data([str(file)], settings, "coco-5k").source) == PICTURES - 1


def _pair(number: int) -> list[tuple[str, bytes]]:
    return [("png", picture("red", 40 + number)), ("txt", b"a red square")]


# --- CLIP_benchmark's folders ----------------------------------------------------------------------------------------


def benchmark(folder: Path, kind: str, shards: int = 12, split: str = "test") -> Path:
    """A data set of one picture a shard: more than ten, so that 10.tar must not come before 2.tar."""
    (folder / split).mkdir(parents=True)
    for i in range(shards):
        text = b"one\ntwo\n" if kind == "retrieval" else b"1"
        suffix = "txt" if kind == "retrieval" else "cls"
        pack(folder / split / f"{i}.tar", [(f"s{i:07d}.{suffix}", text), (f"s{i:07d}.webp", picture("red"))])
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    if kind != "classification":
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    return folder


def test_a_folder_of_captions(tmp_path: Path) -> None:
    folder = benchmark(tmp_path / "set", "retrieval")
    for name in (folder, folder / "test"):
        data = open_evaluation_data([str(name)], SETTINGS)
        assert [data.source.key(i) for i in range(len(data.source))] == [f"s{i:07d}" for i in range(12)]
        assert data.source.raw(0).captions == ["one", "two"]
        assert data.labels is None
        assert data.about == f"{folder}: CLIP_benchmark's layout, split test, with captions"


def test_a_folder_of_classes(tmp_path: Path) -> None:
    data = open_evaluation_data([str(benchmark(tmp_path / "set", "classification"))], SETTINGS)
    assert (data.labels, data.source.raw(3).captions) == ("cls", ["1"])


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [("protocol", "coco-5k", "--protocol coco-5k"), ("caption", "txt", "--caption txt")],
)
def test_captions_wanted_of_classes(tmp_path: Path, option: str, value: str, shown: str) -> None:
    folder = benchmark(tmp_path / "set", "classification")
    with refused(f"{folder}: has classes, and {shown} is about captions: leave it away"):
        open_evaluation_data([str(folder)], SETTINGS, **{option: value})


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = benchmark(tmp_path / "set", "retrieval")
    (folder / "test" / "3.tar").unlink()
    with refused(f"{folder / 'test' / 'nshards.txt'}: counts 12 shards, and 3.tar is not there: fetch it"):
        open_evaluation_data([str(folder)], SETTINGS)


@pytest.mark.parametrize("content", ["", "many", "0", "-3"])
def test_no_number_of_shards(tmp_path: Path, content: str) -> None:
    folder = benchmark(tmp_path / "set", "retrieval")
    (folder / "test" / "nshards.txt").write_text(content)
    with refused(f"{folder / 'test' / 'nshards.txt'}: {content!r}: should be the number of shards"):
        open_evaluation_data([str(folder)], SETTINGS)


def test_several_classes_a_picture(tmp_path: Path) -> None:
    folder = benchmark(tmp_path / "set", "multilabel")
    message = "multilabel: known are retrieval, and classification with one class a picture"
    with refused(f"{folder / 'dataset_type.txt'}: {message}"):
        open_evaluation_data([str(folder)], SETTINGS)


def test_another_split_of_a_folder(tmp_path: Path) -> None:
    folder = benchmark(tmp_path / "set", "retrieval", split="train")
    with refused(f"{folder}: CLIP_benchmark's layout without test/nshards.txt; name {folder / 'train'}"):
        open_evaluation_data([str(folder)], SETTINGS)
    assert open_evaluation_data([str(folder / "train")], SETTINGS).about.endswith("split train, with captions")
