"""Text while it is being written: pieces that can be printed at once, and strings at which a text ends."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from vlm.data.text import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a vocabulary's spelling of one byte (SentencePiece's byte fallback)
_BROKEN = "\ufffd"  # what the bytes of half a character decode to
_SLACK = 8  # tokens without text of their own (spaces that a decoder strips, control tokens) in the tail looked at


class StopStrings:
    """Strings that end a text: a stop rule for `generate`, and the cut of what it wrote."""

    def __init__(self, tokenizer: Tokenizer, strings: Iterable[str]) -> None:
        """The text is cut before the first of them. ValueError for none, or an empty one."""
        self.tokenizer, self.strings = tokenizer, (strings,) if isinstance(strings, str) else tuple(strings)
        if not all(self.strings) or not self.strings:
            raise ValueError(f"stop={list(self.strings)}: at least one string, and none of them empty")
        # A token stands for one byte at least, so a string that the last token completes begins within this tail.
        self._tail = max(len(string.encode()) for string in self.strings) + _SLACK
        self._any = re.compile("|".join(map(re.escape, self.strings)))

    def __call__(self, ids: list[int]) -> bool:
        """Do these tokens, whose last one is new, say one of the strings? The cost does not grow with the text."""
        if self._any.search(self.tokenizer.decode(ids[-self._tail :])) is None:
            return False
        # The tail alone may read differently (a word piece without its word): the whole text decides.
        return self._any.search(self.tokenizer.decode(ids)) is not None

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        first = self._any.search(text)
        return text if first is None else text[: first.start()]

    def pending(self, text: str) -> int:
        """How many characters at the end of the text may turn out to begin one of the strings."""
        longest = min(max(map(len, self.strings)) - 1, len(text))
        ends = range(longest, 0, -1)
        return next((count for count in ends if any(s.startswith(text[-count:]) for s in self.strings)), 0)


class Transcript:
    """Text of one row while it grows: print what `push` returns for each new token, then what `close` returns.

    The pieces join to exactly the text of all tokens, cut before the first stop string, and no piece holds a part of a
    character. Only tokens since the last two pieces are decoded each time.
    """

    def __init__(self, tokenizer: Tokenizer, stop: StopStrings | None = None) -> None:
        """`stop`: where the text ends, if not with the tokens."""
        self.tokenizer, self.stop = tokenizer, stop
        self.ended = False  # a stop string was found
        self._before: list[int] = []  # tokens of the last piece: how the next ones read may depend on them
        self._new: list[int] = []
        self._bytes = False  # the last token with a text was a byte
        self._held = ""  # may begin a stop string

    def push(self, token: int) -> str:
        """What can be printed after one more token; often empty."""
        if self.ended:
            return ""
        self._new.append(token)
        # A run of byte tokens is read as a whole, and one bad byte spoils all of it: wait for text that ends it.
        if _BYTE.fullmatch(self.tokenizer.inner.id_to_token(token) or ""):
            self._bytes = True
        elif self.tokenizer.decode([token]):
            self._bytes = False
        if self._bytes:
            return ""
        text = self.tokenizer.decode(self._before + self._new)
        piece = text.removeprefix(self.tokenizer.decode(self._before))
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._before, self._new = self._new, []
        return self._release(piece)

    def close(self) -> str:
        """What was held back, when no more tokens come."""
        if self.ended:
            return ""
        text = self.tokenizer.decode(self._before + self._new)
        piece = self._held + text.removeprefix(self.tokenizer.decode(self._before))
        self.ended = True
        return piece if self.stop is None else self.stop.cut(piece)

    def _release(self, piece: str) -> str:
        if self.stop is None:
            return piece
        text = self._held + piece
        kept = self.stop.cut(text)
        self.ended = len(kept) < len(text)
        sure = len(kept) if self.ended else len(text) - self.stop.pending(text)
        self._held = text[sure:]
        return text[:sure]


class OneLine:
    """Runs of white space as one space and none at either end, for text that comes in pieces."""

    def __init__(self) -> None:
        self._begun = self._gap = False

    def push(self, piece: str) -> str:
        """The piece as it joins what came before."""
        words = piece.split()
        if not words:
            self._gap |= bool(piece)
            return ""
        gap = self._begun and (self._gap or piece[0].isspace())
        self._begun, self._gap = True, piece[-1].isspace()
        return " " * gap + " ".join(words)


def one_line(text: str) -> str:
    """Runs of white space as one space and none at either end."""
    return " ".join(text.split())


def commonest(texts: Sequence[str]) -> float:
    """The share of texts, 0 to 1, that are the most common one, whatever their case and spaces. ValueError for none."""
    if not texts:
        raise ValueError("commonest: there is no text to count")
    return Counter(one_line(text.lower()) for text in texts).most_common(1)[0][1] / len(texts)
