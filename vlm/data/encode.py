"""A conversation as token ids with labels, span by span: nothing is tokenised twice, matched or searched for.

What is supervised are the tokens of the answers, and of the end that follows each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vlm.data.image import BadSample
from vlm.data.talk import Talk, ask
from vlm.data.template import Literal, Piece, Template, exchanges
from vlm.data.text import Encoded, Tokenizer
from vlm.nn.tokens import IGNORE, IMAGE_ID

NO_ROOM = "no room for an answer"
_ENDLESS = 2**40


def encode_conversation(
    tokenizer: Tokenizer, template: Template, talk: Talk, image_tokens: int, max_tokens: int
) -> Encoded:
    """All answers of a talk, as far as there is room.

    `max_tokens` counts text and control tokens, not those of images, which are never cut. The first answer that has
    not enough room loses its last words, never its end; what follows it is left out whole, with its images.
    BadSample: no room for a single word of an answer.
    """
    writer = _Writer(tokenizer, template, image_tokens)
    for before, answer in exchanges(template, talk):
        if answer is None or not writer.write(before, answer, max_tokens):
            break
    if not any(label != IGNORE for label in writer.labels):
        raise BadSample(NO_ROOM, f"its first question alone takes more than max_tokens={max_tokens}")
    return Encoded(writer.ids, writer.labels, images=writer.images)


def encode_question(
    tokenizer: Tokenizer, template: Template, talk: Talk, image_tokens: int, begun: str = ""
) -> Encoded:
    """A talk whose last question is to be answered: exactly the ids that stand before the answer in training.

    `begun`: the first words of the answer, which follow as tokens that are supervised. ValueError: the last to speak is
    not the user.
    """
    writer, last = _Writer(tokenizer, template, image_tokens), "nothing"
    for before, answer in exchanges(template, talk):
        if answer is None:
            spaced = writer.prompt(before)
            words = writer.words(begun.strip(), spaced) if begun.strip() else []
            return Encoded(writer.ids + words, [IGNORE] * len(writer.ids) + words, images=writer.images)
        writer.write(before, answer, _ENDLESS)
        last = f"{answer!r:.40}"
    raise ValueError(f"a talk that ends with {last}, and no question that is to be answered")


def encode_prompt(
    tokenizer: Tokenizer, template: str | Template, text: str | None, image_tokens: int, max_tokens: int
) -> Encoded:
    """A caption after its picture, as of `caption_encoder`.

    `text=None` gives the generation prompt: exactly the ids that stand before the answer in training.
    """
    encode = caption_encoder(tokenizer, template, image_tokens, max_tokens)
    return encode.start if text is None else encode(text)


def caption_encoder(
    tokenizer: Tokenizer, template: str | Template, image_tokens: int, max_tokens: int
) -> "CaptionEncoder":
    """For captions after their pictures, by a template or a line such as "{image} a photo of {text}".

    Truncation as in `encode_conversation`. ValueError for a template that does not fit.
    """
    form = Template.of(template)
    writer = _Writer(tokenizer, form, image_tokens)
    ((before, _),) = exchanges(form, ask("", 1 if form.shows_images else 0))
    encoder = CaptionEncoder(writer, writer.prompt(before), max_tokens)
    if writer.room(max_tokens) < 1:
        raise ValueError(
            f"template {template!r}: its own words and the control tokens take {max_tokens - writer.room(max_tokens)} "
            f"of max_tokens={max_tokens}, {NO_ROOM}; raise max_tokens or shorten the template"
        )
    return encoder


def encode_instruction(tokenizer: Tokenizer, text: str, max_tokens: int) -> Encoded:
    """What a Q-Former reads beside a picture: start, the last words of the text, end; nothing is supervised."""
    before = [piece for piece in tokenizer.literal("{bos}") if isinstance(piece, int)]
    room = max_tokens - len(before) - 1
    ids = tokenizer.encode(text)
    ids = [*before, *ids[max(0, len(ids) - room) :], tokenizer.eos]
    return Encoded(ids, [IGNORE] * len(ids))


def instructions(talk: Talk) -> list[str]:
    """Of each picture the question that shows it, or the next one where that has no words."""
    found: list[str] = []
    waiting = 0
    for turn in talk.turns:
        if turn.speaker != "user":
            continue
        waiting += turn.images
        if turn.text:
            found += [turn.text] * waiting
            waiting = 0
    return found + [""] * waiting


def end_ids(tokenizer: Tokenizer, template: Template) -> list[int]:
    """The tokens that end an answer."""
    pieces = tokenizer.literal(template.end) if template.control else [template.end]
    return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else tokenizer.encode_inside(piece))]


def ends(tokenizer: Tokenizer, template: Template) -> tuple[list[int], list[str]]:
    """Token ids, and strings, at which a written answer ends."""
    pieces = tokenizer.literal(template.end) if template.control else [template.end]
    stop = dict.fromkeys(template.stop)
    if isinstance(pieces[0], int):
        return list(dict.fromkeys([pieces[0], *tokenizer.ends])), list(stop)
    return list(tokenizer.ends), [pieces[0], *stop]


@dataclass
class _Writer:
    """Ids and labels while they grow."""

    tokenizer: Tokenizer
    template: Template
    image_tokens: int
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: int = 0
    inside: bool = False  # does what comes next go on in a text?

    def __post_init__(self) -> None:
        self._end = end_ids(self.tokenizer, self.template)
        self._ends_in_text = isinstance(self._pieces([Literal(self.template.end)])[-1], str)

    def room(self, most: int) -> int:
        """Tokens that an answer may have in `most` tokens of text."""
        return most - (len(self.ids) - self.images * self.image_tokens) - len(self._end)

    def write(self, before: Sequence[Piece], answer: str, most: int) -> bool:
        """An answer with what stands before it, if there is room in `most` tokens of text; True when all of it fits."""
        mark = len(self.ids), self.images, self.inside
        words = self.words(answer, spaced=self.prompt(before))
        room = self.room(most)
        if room < 1:
            del self.ids[mark[0] :], self.labels[mark[0] :]
            self.images, self.inside = mark[1:]
            return False
        learned = [*words[:room], *self._end]
        self.ids += learned
        self.labels += learned
        self.inside = self._ends_in_text
        return len(words) <= room

    def written(self, words: Sequence[int], most: int) -> Encoded:
        """What there is, with an answer after it, which stays out of it."""
        learned = [*words[: self.room(most)], *self._end]
        return Encoded(self.ids + learned, self.labels + learned, images=self.images)

    def prompt(self, before: Sequence[Piece]) -> bool:
        """What stands before an answer; whether it ends in a space, which belongs to the answer."""
        pieces = self._pieces(before)
        spaced = bool(pieces) and isinstance(pieces[-1], str) and pieces[-1].endswith(" ")
        if spaced:
            pieces[-1] = str(pieces[-1])[:-1]
        for piece in pieces:
            if piece != "":
                self._put(piece)
        self.labels += [IGNORE] * (len(self.ids) - len(self.labels))
        return spaced

    def words(self, answer: str, spaced: bool) -> list[int]:
        """Tokens of an answer; `spaced`: after a space."""
        if spaced:
            return self.tokenizer.encode(answer if self.tokenizer.own_space else f" {answer}")
        return self.tokenizer.encode_inside(answer) if self.inside else self.tokenizer.encode(answer)

    def _put(self, piece: str | int | None) -> None:
        if piece is None:
            self.ids += [IMAGE_ID] * self.image_tokens
            self.images += 1
        elif isinstance(piece, int):
            self.ids.append(piece)
        elif self.inside:
            self.ids += self.tokenizer.encode_inside(piece)
        else:  # the space that a tokenizer puts before a first word is not written twice
            self.ids += self.tokenizer.encode(piece[1:] if self.tokenizer.own_space and piece[0] == " " else piece)
        self.inside = isinstance(piece, str)

    def _pieces(self, pieces: Sequence[Piece]) -> list[str | int | None]:
        """Neighbouring texts as one, so that they are encoded as one; the template's control tokens as ids."""
        found: list[str | int | None] = []
        for piece in pieces:
            parts: Sequence[str | int | None] = [piece.text if isinstance(piece, Literal) else piece]
            if isinstance(piece, Literal) and self.template.control:
                parts = self.tokenizer.literal(piece.text)
            for part in parts:
                if isinstance(part, str) and found and isinstance(found[-1], str):
                    found[-1] += part
                else:
                    found.append(part)
        return found


@dataclass(frozen=True)
class CaptionEncoder:
    """Captions, all after the same beginning, which is encoded once."""

    _writer: _Writer
    _spaced: bool
    _max_tokens: int

    def __call__(self, caption: str) -> Encoded:
        """A caption with what stands before and after it."""
        return self._writer.written(self._writer.words(caption.strip(), self._spaced), self._max_tokens)

    @property
    def start(self) -> Encoded:
        """What stands before a caption."""
        return self.begun("")

    def begun(self, words: str) -> Encoded:
        """The same and the first words of a caption, as tokens that are supervised."""
        ids = self._writer.words(words.strip(), self._spaced) if words.strip() else []
        return Encoded(self._writer.ids + ids, self._writer.labels + ids, images=self._writer.images)
