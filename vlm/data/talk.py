"""Conversations: who says what, and where their pictures stand; read from LLaVA's records and from chat messages."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from vlm.data.image import BadSample

COLUMNS = ("conversations", "messages")  # fields that hold a talk
MARK = "<image>"  # where a picture stands in a text
MAX_PICTURES = 32  # of one talk
MAX_CHARACTERS = 200_000  # of one turn; the rest could never be used

Speaker = Literal["system", "user", "assistant"]
Row = dict[str, Any]
_SPEAKERS: dict[str, Speaker] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_REFERENCES = ("image", "path", "image_url", "url")  # fields of a part that name its picture


@dataclass(frozen=True)
class Turn:
    """What one side says: texts, and None where a picture stands, in order."""

    speaker: Speaker
    parts: tuple[str | None, ...]

    @property
    def images(self) -> int:
        """Pictures in it."""
        return self.parts.count(None)

    @property
    def text(self) -> str:
        """Its words without the pictures."""
        return "".join(part for part in self.parts if part is not None).strip()


@dataclass(frozen=True)
class Talk:
    """Turns of user and assistant, the user's first. `system`: instructions of its own; None: those of the template."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def images(self) -> int:
        """Pictures in all turns."""
        return sum(turn.images for turn in self.turns)

    @property
    def answers(self) -> list[str]:
        """What the assistant says."""
        return [turn.text for turn in self.turns if turn.speaker == "assistant"]

    def first(self, answers: int) -> "Talk":
        """The talk up to and with so many answers."""
        places = [place for place, turn in enumerate(self.turns) if turn.speaker == "assistant"]
        return self if len(places) <= answers else replace(self, turns=self.turns[: places[answers - 1] + 1])


def ask(question: str, images: int = 1, answer: str | None = None) -> Talk:
    """A talk of one question about pictures, which stand before it, with or without its answer."""
    user = Turn("user", (*[None] * images, *([question] if question else [])))
    return Talk((user,) if answer is None else (user, Turn("assistant", (answer,))))


def read_talk(row: Row, pictures: int | None = None) -> Talk:
    """The talk in a record's `conversations` (from, value) or `messages` (role, content: a text or a list of parts).

    `pictures`: how many the record has; where no text has a place for them, they stand before the first question.
    BadSample: no talk, no answer, an unknown speaker, other places than pictures, a picture in an answer.
    """
    column = next((name for name in COLUMNS if isinstance(row.get(name), list)), None)
    if column is None:
        raise BadSample("no conversation", f"{' or '.join(COLUMNS)} among {', '.join(sorted(row)) or 'nothing'}")
    turns = [_turn(turn) for turn in row[column]]
    system = "\n".join(turn.text for turn in turns if turn.speaker == "system") or None
    turns = [turn for turn in turns if turn.speaker != "system"]
    while turns and turns[0].speaker == "assistant":  # nothing was asked: LLaVA's code leaves these out as well
        turns.pop(0)
    talk = _with_pictures(Talk(tuple(turns), system), pictures)
    if not talk.answers:
        raise BadSample("no answer", "the assistant says nothing")
    if not all(talk.answers):
        raise BadSample("empty answer")
    if any(turn.images for turn in talk.turns if turn.speaker == "assistant"):
        raise BadSample("picture in an answer")
    return talk


def _with_pictures(talk: Talk, pictures: int | None) -> Talk:
    if pictures is None or talk.images == pictures:
        return talk
    if talk.images or not talk.turns:
        raise BadSample("places and pictures differ", f"{talk.images} x {MARK} in the texts, {pictures} pictures")
    first = talk.turns[0]
    return replace(talk, turns=(Turn(first.speaker, (*[None] * pictures, *first.parts)), *talk.turns[1:]))


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise BadSample("no conversation", f"a turn is {turn!r:.60}")
    name = str(turn.get("from", turn.get("role"))).lower()
    if name not in _SPEAKERS:
        raise BadSample("unknown speaker", f"{name!r:.40}; known are {', '.join(_SPEAKERS)}")
    said = turn.get("value", turn.get("content"))
    if isinstance(said, str):
        return Turn(_SPEAKERS[name], tuple(_marked(said)))
    if not isinstance(said, list) or not all(isinstance(part, dict) for part in said):
        raise BadSample("turn is not text", f"{said!r:.60}")
    return Turn(_SPEAKERS[name], tuple(found for part in said for found in _part(part)))


def _part(part: Row) -> Iterator[str | None]:
    """Of a list of contents. Columnar files have all fields in all parts, those that do not apply as None."""
    kind = str(part.get("type") or ("text" if part.get("text") is not None else "image"))
    if kind in ("image", "image_url"):
        yield None
    elif kind == "text" and isinstance(part.get("text"), str):
        yield from _marked(part["text"])
    else:
        raise BadSample("turn is not text", f"a part is {part!r:.60}; known are text and image")


def _marked(text: str) -> Iterator[str | None]:
    whole = text[:MAX_CHARACTERS].replace("\r\n", "\n").replace("\0", " ").encode("utf-8", "replace").decode()
    for number, piece in enumerate(re.split(re.escape(MARK), whole)):
        if number:
            yield None
        if piece:
            yield piece


def shown(row: Row) -> list[Any]:
    """References to a record's pictures as it has them, in order: its `image` or `images`, else those of its parts."""
    found = next((row[name] for name in ("image", "images") if row.get(name)), None)
    if found is not None:
        return found if isinstance(found, list) else [found]
    turns: list[Any] = next((row[name] for name in COLUMNS if isinstance(row.get(name), list)), [])
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    references = [next((part[name] for name in _REFERENCES if part.get(name)), None) for part in parts]
    return [one.get("url") if isinstance(one, dict) and "url" in one else one for one in references if one is not None]
