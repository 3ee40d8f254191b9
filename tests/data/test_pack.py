"""Packed ids against the tokenizer itself; blocks that lose nothing; resuming, rebuilding and failing half-way."""

import itertools
import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from vlm.data import pack as module
from vlm.data.batch import Text
from vlm.data.documents import Documents
from vlm.data.pack import PackedLoader, open_ids, pack
from vlm.data.text import Tokenizer, load_tokenizer, train_bpe
from vlm.loss.language import supervised
from vlm.nn.tokens import IGNORE

TEXTS = [f"the {i}th thing\nhas <eos> and </s> in it, café {i}" for i in range(40)]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, 300)


def _flat(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [i for text in texts for i in (tokenizer.bos, *tokenizer.encode(text), tokenizer.eos)]


@pytest.mark.parametrize("room", [2**20, 100, 1])
def test_documents_come_back(bpe: Tokenizer, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", room)
    ids = pack(TEXTS, bpe, tmp_path / "new" / "ids.bin")
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint16 and ids.tolist() == _flat(bpe, TEXTS)
    ends = np.flatnonzero(ids == bpe.eos) + 1
    assert [bpe.decode(part.tolist()) for part in np.split(ids, ends)[:-1]] == TEXTS
    assert sorted(os.listdir(tmp_path / "new")) == ["ids.bin", "ids.bin.json"]
    facts = json.loads((tmp_path / "new" / "ids.bin.json").read_text())
    assert (facts["tokens"], facts["documents"], facts["dtype"]) == (len(ids), 40, "uint16")


@example(texts=["a\ud800b", ""])  # half a surrogate pair
@given(texts=st.lists(st.text(max_size=9), min_size=1, max_size=9))
def test_any_text(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    ids = pack(texts, bpe, tmp_path_factory.mktemp("p") / "ids")
    assert ids.tolist() == _flat(bpe, texts)


def test_control_spellings_are_dropped_as_by_the_tokenizer(tmp_path: Path) -> None:
    names = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    vocab = [*((name, 0.0) for name in names), ("a", -1.0), ("<", -3.0), ("s", -3.0), (">", -3.0)]
    inner = tokenizers.Tokenizer(models.Unigram(vocab, 4, False))
    inner.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer = Tokenizer(inner, bos=1, eos=2, pad=0, dec=1)
    texts = ["a</s>a<mask>s", "<unk>€a", "<pad>"]
    assert inner.encode(texts[0]).ids == [5, 2, 5, 3, 7]  # what would happen
    assert pack(texts, tokenizer, tmp_path / "ids").tolist() == _flat(tokenizer, texts)


def test_one_token_for_start_and_end_stands_once(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "<|endoftext|>": 2}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # as GPT-2
    ids = pack(["ab", "b"], Tokenizer(inner, bos=2, eos=2, pad=2, dec=2), tmp_path / "ids")
    assert ids.tolist() == [0, 1, 2, 1, 2]
    none = pack(["ab", "b"], Tokenizer(inner, bos=None, eos=2, pad=2, dec=2), tmp_path / "other")  # as Qwen
    assert none.tolist() == [0, 1, 2, 1, 2]


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = pack(["w69999 w3"], Tokenizer(inner, bos=1, eos=2, pad=2, dec=1), tmp_path / "ids")
    assert ids.dtype == np.uint32 and ids.tolist() == [1, 69_999, 3, 2]
    assert module._dtype(2**16).itemsize == 2 and module._dtype(2**32).itemsize == 4
    with pytest.raises(ValueError, match="vocabulary of 4294967297 entries"):
        module._dtype(2**32 + 1)


def test_used_again_while_nothing_has_changed(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ids"
    for name in ("a.jsonl", "b.jsonl"):  # neither the names of files nor their times matter
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    bpe.save(tmp_path / "tokenizer.json")
    first = pack(Documents(str(tmp_path / "a.jsonl")), bpe, path)
    monkeypatch.setattr(module, "_write", None)
    for documents in (Documents(str(tmp_path / "b.jsonl")), TEXTS):
        assert np.array_equal(pack(documents, load_tokenizer(tmp_path), path), first)
    with pytest.raises(TypeError):  # the control: other documents would be written
        pack(TEXTS[1:], bpe, path)


@pytest.mark.parametrize("change", ["document", "border", "tokenizer", "json", "ids"])
def test_rebuilt_when_anything_changes(
    bpe: Tokenizer, change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, texts, tokenizer = tmp_path / "ids", ["one two", "three"], bpe
    pack(texts, bpe, path)
    reason = "not whole"
    if change == "document":
        texts, reason = ["one two", "thrEe"], "made from other documents"
    elif change == "border":
        texts, reason = ["one two three"[:7], "", "three"], "made from other documents"
    elif change == "tokenizer":
        tokenizer, reason = train_bpe(TEXTS, 270), "made with another tokenizer"
    else:
        damaged = path if change == "ids" else tmp_path / "ids.json"
        damaged.write_bytes(damaged.read_bytes()[:-3])
        with pytest.raises(ValueError, match="pack again"):
            open_ids(path)
    assert pack(texts, tokenizer, path).tolist() == _flat(tokenizer, texts)
    assert caplog.messages == [f"{path}: {reason}; packing again"]


class _Failing:
    """Documents whose reading breaks off."""

    def __iter__(self) -> Iterator[str]:
        yield from TEXTS
        raise KeyboardInterrupt


@pytest.mark.parametrize("room", [2**20, 1])
def test_stopped_half_way_leaves_nothing(
    bpe: Tokenizer, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", room)
    path = tmp_path / "ids"
    with pytest.raises(KeyboardInterrupt):
        pack(_Failing(), bpe, path)
    assert not os.listdir(tmp_path)
    with pytest.raises(ValueError, match=r"ids.json: No such file or directory; make it with `pack`"):
        open_ids(path)
    before = pack(TEXTS, bpe, path).tolist()
    with pytest.raises(KeyboardInterrupt):
        pack(_Failing(), bpe, path)
    assert open_ids(path).tolist() == before and sorted(os.listdir(tmp_path)) == ["ids", "ids.json"]


@pytest.mark.parametrize("at", ["ids", "ids.json"])
def test_killed_at_a_rename(bpe: Tokenizer, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two files: what is there is whole, or is known not to be."""
    path, rename = tmp_path / "ids", Path.replace
    pack(TEXTS, bpe, path)

    def stop(draft: Path, target: Path) -> Path:
        if target.name == at:
            raise KeyboardInterrupt
        return rename(draft, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stop)
        pack(TEXTS[1:], bpe, path)
    with pytest.raises(ValueError, match="make it with `pack`"):
        open_ids(path)
    assert pack(TEXTS[2:], bpe, path).tolist() == _flat(bpe, TEXTS[2:])


def test_what_cannot_be_packed(bpe: Tokenizer, tmp_path: Path) -> None:
    for documents, message in (
        ([], "ids: no document to pack"),
        (iter(TEXTS), "list_iterator: give Documents"),
        ("all.jsonl", "documents of type str: give Documents"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(documents, bpe, tmp_path / "ids")
    assert not os.listdir(tmp_path)


STREAMS = st.tuples(st.integers(2, 200), st.integers(2, 9), st.integers(1, 9)).filter(
    lambda sizes: sizes[0] >= sizes[1]
)


def _rows(batches: Iterator[Text], count: int) -> torch.Tensor:
    return torch.cat([batch.ids for batch in itertools.islice(batches, count)])


@given(STREAMS, st.integers(0, 2**63 - 1))
def test_every_token_once_an_epoch(sizes: tuple[int, int, int], seed: int) -> None:
    tokens, length, batch = sizes
    loader = PackedLoader(np.arange(tokens, dtype=np.uint16), length, batch, seed)
    blocks = tokens // length
    assert loader.blocks == blocks and loader.steps_per_epoch == -(-blocks // batch)
    rows = _rows(loader.train(count()), -(-3 * blocks // batch))
    for epoch in rows[: 3 * blocks].split(blocks):
        assert sorted(epoch.flatten().tolist()) == list(range(blocks * length))
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(length))
    assert torch.equal(_rows(loader.once(), blocks).flatten(), torch.arange(blocks * length))
    assert [len(part.ids) for part in loader.once()][:-1] == [batch] * (loader.steps_per_epoch - 1)


@given(STREAMS, st.integers(0, 2**63 - 1), st.integers(0, 30))
def test_resumed_anywhere(sizes: tuple[int, int, int], seed: int, start: int) -> None:
    loader = PackedLoader(np.arange(sizes[0], dtype=np.uint32), *sizes[1:], seed)
    expected = itertools.islice(loader.train(count()), start, start + 5)
    again = PackedLoader(np.arange(sizes[0], dtype=np.uint32), *sizes[1:], seed)
    for one, other in zip(expected, again.train(count(start)), strict=False):
        assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("ids", "valid", "labels"))


def test_seeds_and_epochs_differ() -> None:
    ids = np.arange(200, dtype=np.uint16)
    epochs = [_rows(PackedLoader(ids, 2, 10, seed).train(count()), 30).split(100) for seed in range(3)]
    assert len({tuple(epoch.flatten().tolist()) for parts in epochs for epoch in parts}) == 9


@given(STREAMS)
def test_labels_are_the_models_own(sizes: tuple[int, int, int]) -> None:
    loader = PackedLoader(np.arange(sizes[0], dtype=np.uint16), *sizes[1:])
    for batch in [next(loader.train(count())), *loader.once()]:
        assert batch.ids.dtype == batch.labels.dtype == torch.int64 and batch.valid.all() and batch.full
        assert (batch.labels[:, 0] == IGNORE).all() and torch.equal(batch.labels[:, 1:], batch.ids[:, 1:])
        hidden, target = supervised(batch.ids[..., None].float(), batch.labels)
        assert torch.equal(hidden.long()[:, 0] + 1, target)  # each predicts the token that follows it in the stream


def test_a_packed_file_to_batches(bpe: Tokenizer, tmp_path: Path) -> None:
    ids = pack(TEXTS, bpe, tmp_path / "ids")
    loader = PackedLoader(ids, 16, 4)
    assert loader.ids is ids and isinstance(loader.ids, np.memmap)
    assert _rows(loader.once(), 10**6).flatten().tolist() == _flat(bpe, TEXTS)[: loader.blocks * 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length=1: must be at least 2"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be from 0"),
        ({"length": 11}, "length=11: the text has only 10 tokens, not one block; make it smaller"),
    ],
)
def test_loader_errors(options: dict[str, int], message: str) -> None:
    sizes: dict[str, Any] = {"length": 5, "batch_size": 2} | options
    with pytest.raises(ValueError, match=message):
        PackedLoader(np.arange(10, dtype=np.uint16), **sizes)
