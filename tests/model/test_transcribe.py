"""Text in pieces: for any ids, tokenizer and stop strings the pieces join to the text of the whole."""

import random
from functools import cache

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from vlm.data.text import Tokenizer, clip_tokenizer, train_bpe
from vlm.model.transcribe import OneLine, StopStrings, Transcript, one_line

SAMPLE = ["a red square, a blue house.", "Ein Haus – naïve café ☕ 🙂🙃 日本語", "two  spaces\nand a line"]


def byte_fallback() -> Tokenizer:
    """Like Llama's: words with ▁ for the space, and bytes for what the vocabulary lacks."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "▁red", "ed", "b", "c", "▁house"]
    inner = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    inner.add_special_tokens(["<s>", "</s>"])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner, bos=1, eos=2, pad=2, dec=1)


def word_pieces() -> Tokenizer:
    """Like BERT's."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "##ed", "##s", "house", ",", ".", "do", "n't", "'", "s"]
    inner = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.add_special_tokens(words[:3])
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return Tokenizer(inner, bos=1, eos=2, pad=0, dec=1)


@cache
def made(kind: str) -> Tokenizer:
    kinds = {"clip": clip_tokenizer, "fallback": byte_fallback, "wordpiece": word_pieces}
    return train_bpe(SAMPLE, 300) if kind == "bytes" else kinds[kind]()


KINDS = ["bytes", "clip", "fallback", "wordpiece"]


def pieces(tokenizer: Tokenizer, ids: list[int], stop: StopStrings | None = None) -> list[str]:
    transcript = Transcript(tokenizer, stop)
    return [*(transcript.push(token) for token in ids), transcript.close()]


@pytest.mark.parametrize("kind", KINDS)
@given(numbers=st.lists(st.integers(0, 10**6), max_size=40), near=st.booleans())
@example(numbers=[3, 1, 131], near=True)  # a control token inside a run of bytes
def test_pieces_of_any_ids_join_to_their_text(kind: str, numbers: list[int], near: bool) -> None:
    tokenizer = made(kind)
    ids = [number % (min(tokenizer.size, 300) if near else tokenizer.size) for number in numbers]  # near: many bytes
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(numbers=st.lists(st.integers(0, 10**6), max_size=40), seed=st.integers(0, 99))
def test_pieces_end_before_a_stop_string(kind: str, numbers: list[int], seed: int) -> None:
    tokenizer, chance = made(kind), random.Random(seed)
    ids = [number % min(tokenizer.size, 300) for number in numbers]
    text = tokenizer.decode(ids)
    at = chance.randrange(len(text) + 1)
    stop = StopStrings(tokenizer, [text[at : at + chance.randint(1, 6)] or "never", "ed a"])
    assert "".join(pieces(tokenizer, ids, stop)) == stop.cut(text)


@pytest.mark.parametrize("kind", ["bytes", "clip", "fallback"])
def test_no_piece_holds_half_a_character(kind: str) -> None:
    tokenizer = made(kind)
    text = "a 🙂🙃 café 日本語 a"
    ids = tokenizer.encode(text)
    if kind == "fallback":
        ids = [tokenizer.inner.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    found = pieces(tokenizer, ids)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)
    if kind != "fallback":
        assert sum(map(bool, found)) > 4
        assert any("\ufffd" in tokenizer.decode([token]) for token in ids)  # tokens alone would show halves


def test_a_text_ends_as_soon_as_its_stop_string_is_said() -> None:
    tokenizer = made("bytes")
    ids = tokenizer.encode("a red square. And")
    stop = StopStrings(tokenizer, ["square.", "zebra"])
    said = [stop(ids[: count + 1]) for count in range(len(ids))]
    first = said.index(True)
    assert "square." in tokenizer.decode(ids[: first + 1])
    assert "square." not in tokenizer.decode(ids[:first])
    assert len(tokenizer.encode("square.")) > 1
    assert stop.cut(tokenizer.decode(ids)) == "a red "
    transcript = Transcript(tokenizer, stop)
    printed = "".join(transcript.push(token) for token in ids[: first + 1])
    assert printed == "a red " and transcript.ended
    assert transcript.push(ids[0]) == transcript.close() == ""


def test_the_beginning_of_a_stop_string_waits() -> None:
    tokenizer = made("bytes")
    stop = StopStrings(tokenizer, ["\n\nand", "ab"])
    assert [stop.pending(text) for text in ("", "x", "xa", "x\n", "x\n\n", "x\n\na", "\n\nan", "n")] == [
        0, 0, 1, 1, 2, 3, 4, 0,
    ]  # fmt: skip
    transcript = Transcript(tokenizer, stop)
    assert "".join(transcript.push(token) for token in tokenizer.encode("x\n\na")) == "x"
    assert transcript.close() == "\n\na"


def test_the_whole_text_decides_where_the_tail_reads_differently() -> None:
    tokenizer = made("wordpiece")
    ids = [tokenizer.inner.token_to_id(word) for word in ["house", *["##s"] * 40]]
    stop = StopStrings(tokenizer, ["##s"])  # only the tail alone begins with this
    assert "##s" in tokenizer.decode(ids[-10:])
    assert not stop(ids)


def test_only_a_tail_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, lengths = made("bytes"), []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    ids = tokenizer.encode("a red square, a blue house. " * 40)
    stop = StopStrings(tokenizer, ["zebra"])
    transcript = Transcript(tokenizer, stop)
    for count, token in enumerate(ids):
        transcript.push(token)
        stop(ids[: count + 1])
    assert len(ids) > 300
    assert max(lengths) <= 13


@pytest.mark.parametrize("strings", [[], ["a", ""]])
def test_stop_strings_that_are_none(strings: list[str]) -> None:
    with pytest.raises(ValueError, match=r"stop=\[.*\]: at least one string, and none of them empty"):
        StopStrings(made("bytes"), strings)


@given(st.lists(st.text("ab \n\t", max_size=4), max_size=9))
def test_one_line_in_pieces(texts: list[str]) -> None:
    line = OneLine()
    found = [line.push(text) for text in texts]
    assert "".join(found) == one_line("".join(texts))
