"""Templates: how a conversation stands in the text of a language model. Pure data; the published ones by name."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from vlm.data.talk import Talk, Turn

_FIELDS = re.compile(r"(\{\w+\})")
_ALLOWED = {  # placeholders by field; {bos} and {eos} may stand everywhere
    "start": (),
    "system": ("{system}",),
    "user": ("{image}", "{text}"),
    "answer": ("{text}",),
    "end": (),
    "after": (),
    "image": ("{image}",),
    "gap": (),
}


class Literal(NamedTuple):
    """Words of the template itself, in which control tokens are control tokens."""

    text: str


Piece = Literal | str | None  # words of the template, words that somebody said, a picture


@dataclass(frozen=True)
class Template:
    """What stands around the turns of a conversation; `{bos}` and `{eos}` are the tokenizer's own start and end.

    `user`: a question; its pictures stand at {image}, or where its text has them. Without {text} it is not shown.
    `answer`: what the model says, at its very end, followed by `end`, which it learns to say; `after`: before the next.
    `image`: what stands around a picture; `gap`: between one at {image} and what follows.
    `interleaved`: several pictures of a question stay where its text has them, also where there is an {image}.
    `stop`: strings, beside the end, before which an answer ends. `control`: control tokens may be written by name.
    A space before an answer belongs to it.
    """

    user: str
    answer: str
    start: str = "{bos}"
    system: str = "{system}"
    default_system: str = ""
    end: str = "{eos}"
    after: str = ""
    image: str = "{image}"
    gap: str = ""
    interleaved: bool = False
    stop: tuple[str, ...] = ()
    control: bool = True

    def __post_init__(self) -> None:
        """ValueError: what no template can be, all of it at once."""
        problems = [problem for name in _ALLOWED for problem in self._problems(name)]
        if not self.answer.endswith("{text}"):
            problems.append("answer: {text} must be its end: what follows an answer stands in `end` and `after`")
        if "{image}" not in self.image:
            problems.append("image: it holds no {image}")
        if self.system and "{system}" not in self.system:
            problems.append("system: it holds no {system}; give an empty one to have none")
        if not self.end:
            problems.append("end: empty, so that no answer would ever end")
        if not all(self.stop):
            problems.append("stop: one of the strings is empty")
        if problems:
            raise ValueError("template: " + "; ".join(problems))

    def _problems(self, name: str) -> Iterator[str]:
        found = _FIELDS.findall(getattr(self, name))
        allowed = _ALLOWED[name]
        for field in dict.fromkeys(found):
            if field not in (*allowed, "{bos}", "{eos}"):
                yield f"{name}: {field} is unknown; use {', '.join((*allowed, '{bos}', '{eos}'))}"
            elif field in allowed and found.count(field) > 1:
                yield f"{name}: it holds {field} {found.count(field)} times, at most once"

    @staticmethod
    def of(spec: "str | Template") -> "Template":
        """The template itself, the published one of a name, or what a line such as "{image} a photo of {text}" says."""
        if isinstance(spec, Template):
            return spec
        if spec in TEMPLATES:
            return TEMPLATES[spec]
        if "{" not in spec:
            raise ValueError(
                f"template {spec!r}: neither one of {', '.join(TEMPLATES)} nor a line with {{image}} and {{text}}"
            )
        return _line(spec)

    @property
    def shows_images(self) -> bool:
        """Whether a question's pictures have a place."""
        return "{image}" in self.user or "{text}" in self.user

    def begin(self, system: str | None) -> list[Piece]:
        """What stands before the first turn; `system` None: the template's own."""
        text = self.default_system if system is None else system
        if not text or not self.system:
            return [Literal(self.start)]
        before, after = self.system.split("{system}")
        return [Literal(self.start + before), text, Literal(after)]

    def ask(self, turn: Turn) -> list[Piece]:
        """A question as it stands in the text."""
        gather = "{image}" in self.user and (turn.images == 1 or not self.interleaved or "{text}" not in self.user)
        pieces: list[Piece] = []
        for part in _FIELDS.split(self.user):
            if part == "{image}":
                pieces += self._gathered(turn) if gather else []
            elif part == "{text}":
                pieces += [turn.text] if gather else self._spread(turn)
            elif part:
                pieces.append(Literal(part))
        return pieces

    def reply(self) -> list[Piece]:
        """What stands before an answer."""
        return [Literal(self.answer.removesuffix("{text}"))]

    def _shown(self) -> list[Piece]:
        before, after = self.image.split("{image}")
        return [Literal(before), None, Literal(after)]

    def _gathered(self, turn: Turn) -> list[Piece]:
        pieces = [piece for _ in range(turn.images) for piece in (*self._shown(), Literal(self.gap))]
        followed = turn.text and "{text}" in self.user
        return pieces if followed else pieces[:-1]

    def _spread(self, turn: Turn) -> list[Piece]:
        """Text and pictures in their order, without white space at the ends."""
        pieces: list[Piece] = []
        for place, part in enumerate(turn.parts):
            if part is None:
                pieces += self._shown()
                continue
            begun = part if place else part.lstrip()
            pieces.append(begun if place < len(turn.parts) - 1 else begun.rstrip())
        return pieces


def exchanges(template: Template, talk: Talk) -> Iterator[tuple[list[Piece], str | None]]:
    """What stands before each answer (since the one before), and the answer; None where it is still to come.

    A question at the end of a talk is to be answered: its pieces come with None.
    """
    pieces = template.begin(talk.system)
    open_question = False
    for turn in talk.turns:
        if turn.speaker == "user":
            pieces += template.ask(turn)
            open_question = True
        else:
            yield [*pieces, *template.reply()], turn.text
            pieces, open_question = [Literal(template.after)], False
    if open_question:
        yield [*pieces, *template.reply()], None


@lru_cache(maxsize=64)
def _line(line: str) -> Template:
    """Of a line: what stands before the picture, and between it and the answer."""
    fields = _FIELDS.findall(line)
    problem = ""
    if unknown := [field for field in fields if field not in ("{image}", "{text}", "{bos}", "{eos}")]:
        problem = f"{unknown[0]} is unknown; use {{image}} and {{text}}"
    elif fields.count("{text}") != 1:
        problem = f"it holds {{text}} {fields.count('{text}')} times, must be once"
    elif fields.count("{image}") > 1:
        problem = f"it holds {{image}} {fields.count('{image}')} times, at most once"
    elif not line.endswith("{text}"):
        problem = "{text} must be its end: what follows the answer can never be learned"
    if problem:
        raise ValueError(f"template {line!r}: {problem}")
    before, image, after = line.rpartition("{image}")
    return Template(user=before.rstrip(" ") + image, answer=after, system="")


_ASSISTANT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Qwen; what system text it has differs from model to model.
_CHATML = Template(
    user="<|im_start|>user\n{text}<|im_end|>\n",
    answer="<|im_start|>assistant\n{text}",
    start="",
    system="<|im_start|>system\n{system}<|im_end|>\n",
    default_system="You are a helpful assistant.",
    end="<|im_end|>",
    after="\n",
)
# Each as its authors' code has it at training time.
TEMPLATES = {
    # LLaVA and LLaVA-1.5, stage 1; MiniGPT-4, stage 1: the picture, then the caption and a line's end.
    "plain": Template(user="{image}", answer="{text}", system="", end="\n"),
    # LLaVA and LLaVA-1.5, stage 2 (version v1): a single picture goes before its question.
    "vicuna_v1": Template(
        user="USER: {image}{text} ",
        answer="ASSISTANT: {text}",
        system="{system} ",
        default_system=_ASSISTANT,
        gap="\n",
        interleaved=True,
    ),
    "llama3": Template(
        user="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n{text}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        end="<|eot_id|>",
    ),
    "chatml": _CHATML,
    "smollm2": replace(_CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    # BLIP-2 before OPT: the start stands after the picture, and a line's end is what ends an answer.
    "blip2": Template(user="{image}{bos}", answer="a photo of {text}", start="", system="", end="\n"),
    "blip2_question": Template(
        user="{image}{bos}Question: {text} ", answer="Answer: {text}", start="", system="", end="\n"
    ),
    # MiniGPT-4, stage 2. Its prompt ends in a space of its own, and the answer begins with another.
    "minigpt4": Template(
        start="{bos}###",
        user="Human: {image}{text} ",
        answer="###Assistant:  {text}",
        system="",
        end="###",
        image="<Img>{image}</Img>",
        gap=" ",
    ),
    # InstructBLIP before Vicuna; its question goes to the Q-Former as well (data.instruction).
    "instructblip": Template(user="{image}{bos}{text}", answer=" {text}", start="", system=""),
}
