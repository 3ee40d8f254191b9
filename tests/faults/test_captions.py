"""Captions that cannot be used, are cut, or try to be control tokens.

`make test-faults` draws a million captions; the ordinary suite fewer.
"""

import os
import random
from pathlib import Path

import pytest

from tests.faults.made import counted, encoded, good, tar, trained
from vlm.data.captions import MAX_CHARACTERS
from vlm.data.check import Patience, TextLimit
from vlm.data.encode import encode_prompt
from vlm.data.image import BadSample
from vlm.data.record import Record
from vlm.data.shards import Shards
from vlm.data.text import Tokenizer, train_bpe
from vlm.nn.tokens import IMAGE_ID

CAPTIONS = int(os.environ.get("VLM_TEST_CAPTIONS", "5000"))
PNG = encoded("red")
SPELT = "<bos><eos></s><image><pad><dec><|endoftext|> [SEP]"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a red square", "a blue square"], 300)


@pytest.mark.parametrize(
    ("suffix", "data", "reason"),
    [
        ("txt", b"", "empty caption"),
        ("txt", b" \n\t\x00\n", "empty caption"),
        ("txt", b"caf\xe9", "not UTF-8"),
        ("txt", "utf 16".encode("utf-16"), "not UTF-8"),
        ("json", b"{broken", "unreadable json"),
        ("json", b'{"caption": "caf\xe9"}', "not UTF-8"),
        ("json", b'{"caption": 3}', "caption is not text"),
        ("json", b'{"caption": []}', "empty caption"),
        ("json", b'{"text": "x"}', "no caption"),
        ("json", b"[" * 100_000, "unreadable json"),
        ("json", b'["a caption"]', "unreadable json"),
        ("json", b'{"caption": null}', "no caption"),
        ("json", b'{"caption": ["fine", 3]}', "caption is not text"),
    ],
)
def test_unusable(suffix: str, data: bytes, reason: str, tmp_path: Path) -> None:
    file = tar(tmp_path / "s.tar", [*good(), ("x.png", PNG), (f"x.{suffix}", data)])
    assert counted(file) == (3, {reason: 1}, {})
    assert trained(file) == {reason: 1}


def test_captions_that_are_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = "a red square a red square a red square"
    words = len(tokenizer.encode(long))
    file = tar(
        tmp_path / "s.tar", [("x.png", PNG), ("x.txt", long.encode()), ("y.png", encoded("blue")), ("y.txt", b"a")]
    )
    for room, notes in ((words + 2, {}), (words + 1, {"caption cut": 1})):
        assert counted(file, patience=Patience(text=TextLimit(tokenizer, room))) == (2, {}, notes)
    template, own = "{image} a red {text}", len(tokenizer.encode("a red"))
    assert TextLimit(tokenizer, words + 1 + own, template).cuts(long)
    assert not TextLimit(tokenizer, words + 2 + own, template).cuts(long)


def test_random_bytes_are_captions_or_bad_samples(tokenizer: Tokenizer) -> None:
    draw, record, taken = random.Random(0), Record("png", "txt"), 0
    control = {tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.dec}
    pieces = [SPELT.encode(), b"</s>", b"<image>", "é漢\u202e".encode(), b"\xff", b"\xed\xa0\x80", b"\x00", b"word "]
    for _ in range(CAPTIONS):
        data = b"".join(
            draw.choice(pieces) if draw.random() < 0.7 else draw.randbytes(3) for _ in range(draw.randint(0, 6))
        )
        try:
            captions = record.texts({"txt": data}, {})
        except BadSample as bad:
            assert bad.reason in ("not UTF-8", "empty caption")
            continue
        taken += 1
        for caption in captions:
            assert caption and len(caption) <= MAX_CHARACTERS and not set(tokenizer.encode(caption)) & control
    assert 0.06 < taken / CAPTIONS < 0.94


def test_control_tokens_in_captions_stay_text(tokenizer: Tokenizer) -> None:
    filled = encode_prompt(tokenizer, "{image}{text}", SPELT, image_tokens=3, max_tokens=200)
    assert filled.ids.count(IMAGE_ID) == 3 and filled.ids.count(tokenizer.eos) == filled.ids.count(tokenizer.bos) == 1
    assert tokenizer.decode(filled.ids) == SPELT


@pytest.mark.parametrize(
    ("suffix", "data", "expected"),
    [
        ("txt", b"\xef\xbb\xbfa red square", ["a red square"]),
        ("txt", b"a\x00red\x07\tsquare\x7f", ["a red square"]),
        ("txt", b"one\r\n\r\n two \n", ["one", "two"]),
        ("json", b'{"caption": "half a pair \\ud83d"}', ["half a pair ?"]),
        ("txt", b"x" * 10 * 2**20, ["x" * MAX_CHARACTERS]),
    ],
    ids=["mark", "control", "empty lines", "lone surrogate", "10 MB"],
)
def test_captions_that_are_cleaned(suffix: str, data: bytes, expected: list[str], tmp_path: Path) -> None:
    file = tar(tmp_path / "s.tar", [*good(), ("x.png", PNG), (f"x.{suffix}", data)])
    assert counted(file) == (3, {}, {})
    assert Shards(str(file)).raw(2).captions == expected
