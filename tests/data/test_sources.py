"""Every layout gives the same samples, in the same order; each fault is counted or refused, with its row."""

import json
import pickle
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.shard_files import picture
from tests.data.source_files import CAPTIONS, LAYOUTS, NAMES, folder, karpathy, marked, pictures, save, table, talk
from vlm.data.image import ImageTransform
from vlm.data.loader import Loader
from vlm.data.pictures import Pictures
from vlm.data.shards import Shards
from vlm.data.sources import Source, open_pictures
from vlm.data.text import train_bpe

TRANSFORM = ImageTransform((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
layouts = pytest.mark.parametrize("layout", marked(LAYOUTS))


def opened(layout: str, place: Path) -> Pictures:
    tars = layout in ("shards", "img2dataset")
    return open_pictures(LAYOUTS[layout](place), id_field="picture" if tars else None)


@layouts
def test_every_layout_gives_the_same(layout: str, tmp_path: Path) -> None:
    source = opened(layout, tmp_path / "data")
    assert isinstance(source, Pictures) and isinstance(source, Shards) == (layout in ("shards", "img2dataset"))
    assert len(source) == 32 and not source.bad
    for index in (31, 0, 7, 8, *range(32)):  # any order
        raw = source.raw(index)
        assert (source.key(index), raw.key, raw.image) == (NAMES[index], NAMES[index], picture(index))
        assert raw.captions == CAPTIONS[NAMES[index]]
        assert raw.id == f"{NAMES[index]}.png" or layout == "parquet bytes"
    assert list(source.captions()) == [text for name in NAMES for text in CAPTIONS[name]]


@layouts
def test_every_layout_trains_the_same(layout: str, tmp_path: Path) -> None:
    tokens = train_bpe([text for texts in CAPTIONS.values() for text in texts], 290)

    def batches(source: Pictures, workers: int) -> list[Any]:
        options = {"max_tokens": 16, "template": None, "image_tokens": 2, "seed": 3, "workers": workers}
        steps = Loader(source, TRANSFORM, tokens, 8, **options).train(count())
        return [next(steps) for _ in range(5)]

    for one, other in zip(
        batches(opened(layout, tmp_path / "data"), workers=1),
        batches(open_pictures(folder(tmp_path / "folder")), workers=0),
        strict=True,
    ):
        assert (one.keys, one.strings) == (other.keys, other.strings)
        assert one.image_ids == other.image_ids or layout == "parquet bytes"
        assert torch.equal(one.images, other.images) and torch.equal(one.positive, other.positive)
        assert torch.equal(one.captions.ids, other.captions.ids)


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_conversations(chat: bool, lines: bool, tmp_path: Path) -> None:
    source = open_pictures(talk(tmp_path / "data", chat, lines))
    assert len(source) == 32 and not source.bad
    for index in (5, *range(32)):
        raw, name = source.raw(index), NAMES[index]
        assert (raw.key, raw.id, raw.image) == (name, f"{name}.png", picture(index))
        assert raw.captions == CAPTIONS[name][:1]
        assert len(raw.fields["messages" if chat else "conversations"]) == 2 * len(CAPTIONS[name])


def test_conversations_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    def said(**more: Any) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}], **more}

    records = [said(id=i, image="p00.png") for i in range(2)]
    records += [said(), said(image=["p00.png", "p01.png"]), {"image": "p00.png", "conversations": "none"}]
    records += [{"image": "p00.png", "conversations": [{"from": "human", "value": "?"}]}]
    source = open_pictures(save(tmp_path / "data", records))
    assert source.bad == {"no image": 1, "several pictures": 1, "no conversation": 1, "no answer": 1}
    assert [(source.raw(i).key, source.raw(i).id) for i in range(2)] == [("0", "p00.png"), ("1", "p00.png")]


def test_folders_below_and_what_is_passed_over(tmp_path: Path) -> None:
    place = tmp_path / "data"
    for name in ("b/c/x.v2.JPG", "b/a.png", "z.webp", ".hidden/h.png", "b/._a.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(picture(1))
        (place / name).with_suffix(".txt").write_text(f"caption of {name}")
    (place / "b" / "alone.png").write_bytes(picture(2))
    (place / "b" / "alone too.txt").write_text("no picture")
    (place / "b" / "a.webp").write_bytes(picture(3))
    (place / "b" / "a.json").write_text('{"source": "here"}')
    source = open_pictures(str(place))
    assert [source.key(i) for i in range(len(source))] == ["z", "b/a", "b/c/x.v2"]
    assert source.raw(1).fields == {"source": "here"} and source.raw(1).image == picture(1)
    assert source.bad == {"no caption": 1, "no image": 1, "repeated name": 1}
    assert open_pictures(str(place), caption="txt", image="jpg").raw(0).key == "b/c/x.v2"


def test_hugging_face_image_folder(tmp_path: Path) -> None:
    place = pictures(tmp_path / "data")
    (place / "metadata.jsonl").write_text('{"file_name": "p03.png", "text": "a thing"}\n')
    source = open_pictures(str(place))
    assert (source.raw(0).key, source.raw(0).captions) == ("p03", ["a thing"])


def test_columns_by_name(tmp_path: Path) -> None:
    place = pictures(tmp_path / "data")
    (place / "t.csv").write_text("nr,Image,title,alt,thing\n1,p00.png,one,two,a\n2,p01.png,three,four,a\n")
    guessed = open_pictures(str(place / "t.csv"))
    assert isinstance(guessed, Source)
    assert guessed.about == f"{place / 't.csv'}: CSV; picture: 'Image', captions: 'title'; 2 pictures"
    assert guessed.raw(1).captions == ["three"]
    assert guessed.raw(1).fields == {"nr": "2", "Image": "p01.png", "alt": "four", "thing": "a"}
    named = open_pictures(str(place / "t.csv"), image="Image", caption="json:alt", id_field="thing")
    assert [(named.raw(i).captions, named.raw(i).id) for i in range(2)] == [(["two"], "a"), (["four"], "a")]
    for wrong in ({"image": "img"}, {"caption": "json:altt"}, {"id_field": "sort"}):
        with pytest.raises(ValueError, match=r"t.csv: no column '\w+' for the \w+; CSV with the columns nr, Image"):
            open_pictures(str(place / "t.csv"), **wrong)
    (place / "u.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"u.csv: no column for the picture; CSV with the columns a, b; name the"):
        open_pictures(str(place / "u.csv"))


def test_columns_that_not_every_row_has(tmp_path: Path) -> None:
    place = pictures(tmp_path / "data")
    rows = [{"text": "no picture"}, {"image": "p00.png", "text": "a"}, {"image": "p01.png", "text": "b", "thing": 7}]
    (place / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_pictures(str(place / "t.jsonl"), id_field="thing")
    assert [source.raw(i).id for i in range(2)] == ["p00.png", "7"] and source.bad == {"no image": 1}


def test_cells_may_hold_line_ends_and_a_mark_at_the_start(tmp_path: Path) -> None:
    place = pictures(tmp_path / "data")
    text = '\ufeffimage,caption\r\np00.png,"one\r\nline, ""two"""\r\n\r\np01.png,é\r\np00.png,again\r\n'
    (place / "t.csv").write_bytes(text.encode())
    source = open_pictures(str(place / "t.csv"))
    assert [source.raw(i).captions for i in range(2)] == [['one line, "two"', "again"], ["é"]]


def test_pictures_in_another_folder(tmp_path: Path) -> None:
    path = Path(table(tmp_path / "data", ",", "csv"))
    moved = tmp_path / "tables" / "all.csv"
    moved.parent.mkdir()
    path.replace(moved)
    with pytest.raises(
        ValueError, match=r"None of 32 tried is usable: no such picture \(p00.png in .*tables\); .*--im"
    ):
        open_pictures(str(moved))
    assert open_pictures(str(moved), images=tmp_path / "data").raw(3).image == picture(3)
    with pytest.raises(ValueError, match=r"nowhere: no such folder; pictures are looked for there \(--images"):
        open_pictures(str(moved), images=tmp_path / "nowhere")


def test_karpathy_splits(tmp_path: Path) -> None:
    spec = karpathy(tmp_path / "data").removesuffix("#train")
    with pytest.raises(ValueError, match=r"splits are train \(32\), test \(1\); name those to read: .*all.json#train"):
        open_pictures(spec)
    with pytest.raises(ValueError, match=r"\(--split\); there is no val"):
        open_pictures(f"{spec}#test,val")
    (tmp_path / "data" / "other.png").write_bytes(picture(0))
    assert len(open_pictures(f"{spec}#test")) == 1 and len(open_pictures(f"{spec}#train,test")) == 33


def test_karpathy_folders(tmp_path: Path) -> None:
    place = pictures(tmp_path / "data" / "val2014").parent
    entry = {"filepath": "val2014", "filename": "p04.png", "split": "val", "cocoid": 7, "sentences": [{"raw": "a"}]}
    (place / "k.json").write_text(json.dumps({"images": [entry]}))
    for images in (place, place / "val2014"):
        raw = open_pictures(f"{place / 'k.json'}#val", images=images).raw(0)
        assert (raw.image, raw.fields["cocoid"]) == (picture(4), 7)


def test_several_tables(tmp_path: Path) -> None:
    place = pictures(tmp_path / "data")
    (place / "1.csv").write_text("image,caption\np00.png,a\np01.png,b\n")
    (place / "2.csv").write_text("image,caption\np02.png,c\np00.png,d\n")
    source = open_pictures(str(place / "{1..2}.csv"))
    assert [source.raw(i).captions for i in range(3)] == [["a", "d"], ["b"], ["c"]]
    assert source.where(2) == f"{place / '2.csv'}, row 1"
    (place / "2.csv").write_text("caption,image\nc,p02.png\n")
    with pytest.raises(ValueError, match=r"2.csv: its header \['caption', 'image'\] is not that of .*1.csv"):
        open_pictures(str(place / "{1..2}.csv"))


@layouts
def test_sources_can_be_pickled(layout: str, tmp_path: Path) -> None:
    source = opened(layout, tmp_path / "data")
    source.raw(0)
    assert pickle.loads(pickle.dumps(source)).raw(9) == source.raw(9)


def test_memory_of_an_index_is_flat(tmp_path: Path) -> None:
    """Nothing of a row stays in memory but numbers."""
    place = pictures(tmp_path / "data")
    sizes = []
    for words in (1, 1000):
        line = json.dumps({"image": "p00.png", "caption": "word " * words})
        (place / "t.jsonl").write_text("\n".join([line] * 50))
        sizes.append(len(pickle.dumps(open_pictures(str(place / "t.jsonl")))))
    assert abs(sizes[1] - sizes[0]) < 16  # the file's size is a longer number
