"""How the authors of BLIP-2's family have it write (prompts, lengths, beams): what holds unless something else is said.

Sources: LAVIS, lavis/projects/{blip2,instructblip}/eval and the defaults of its `generate` and `predict_answers`;
MiniGPT-4, minigpt4/conversation. Their lengths count what is written, without prompt and image, and so do ours; their
repetition penalty counts nothing else either, while ours, as transformers', counts the prompt's words too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from vlm.data.text import Tokenizer
from vlm.model.beam import Beams
from vlm.model.generate import Sampling


class Usage(NamedTuple):
    """`template`: the name of one in `vlm.data.template`, which says where image and words stand; `stop`: beside eos.

    `caption`: what is said before a caption, or asked for one; `question`: around one that asks for few words.
    """

    template: str
    caption: str
    question: str
    captions: Beams | Sampling
    answers: Beams | Sampling
    stop: tuple[str, ...] = ()

    def asked(self, question: str | None) -> tuple[str, str]:
        """The template's name and what the user says in it; without a question, what is said for a caption."""
        if self.template == "blip2":  # a template that has the words itself
            return (self.template, "") if question is None else ("blip2_question", question)
        return self.template, self.caption if question is None else self.question.format(question)


_SHORT = "Question: {} Short answer:"
_CAPTIONS = Beams(5, max_new=30, min_new=8)
# Before OPT a line's end is the end of an answer: what Hugging Face's files give as its eos.
BLIP2_OPT = Usage(
    "blip2", "a photo of", _SHORT, _CAPTIONS, Beams(5, max_new=10, min_new=1, length_penalty=0.0), ("\n",)
)
BLIP2_T5 = Usage("blip2", "a photo of", _SHORT, _CAPTIONS, Beams(5, max_new=10, min_new=1, length_penalty=-1.0))
INSTRUCTBLIP = Usage(
    "instructblip",
    "A short image caption.",
    "Question: {} Short Answer:",
    Beams(5, max_new=80, min_new=10, repetition_penalty=1.5),
    Beams(5, max_new=10, min_new=1, length_penalty=-1.0),
)
_TALK = Sampling(max_new=300, min_new=1, temperature=1.0, top_p=0.9, repetition_penalty=1.05)
MINIGPT4 = Usage("minigpt4", "Describe this image in detail.", "{}", _TALK, _TALK, ("###",))
# The caption's question is that of its authors' training mixture.
LLAVA = Usage(
    "vicuna_v1",
    "Provide a one-sentence caption for the provided image.",
    "{}\nAnswer the question using a single word or phrase.",
    Sampling(max_new=64),
    Sampling(max_new=16),
)
# The templates of language models that LLaVA stands before, by a control token that such a vocabulary has.
_TALKS = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml"}


def usage_of(model_type: str, language: str, tokenizer: Tokenizer | None = None) -> Usage:
    """For a config.json's model_type, "minigpt4" for that, and the model_type of its language model.

    `tokenizer`: its control tokens say how LLaVA's language model talks; as Vicuna does unless given. ValueError for
    another system.
    """
    match model_type, language:
        case "minigpt4", _:
            return MINIGPT4
        case "instructblip", _:
            return INSTRUCTBLIP
        case "llava" | "llava_llama", _:
            return _llava(tokenizer)
        case "blip-2", "t5":
            return BLIP2_T5
        case "blip-2", _:
            return BLIP2_OPT
        case _:
            raise ValueError(f"model_type={model_type!r}: known are blip-2, instructblip, llava and minigpt4")


def _llava(tokenizer: Tokenizer | None) -> Usage:
    names = () if tokenizer is None else (name for name in _TALKS if tokenizer.literal(name) != [name])
    if (found := next(iter(names), None)) is None:
        return LLAVA
    # Beside these templates the picture has a line of its own.
    return LLAVA._replace(template=_TALKS[found], caption=f"\n{LLAVA.caption}", question=f"\n{LLAVA.question}")


def as_said(usage: Usage, said: Mapping[str, Any], where: str) -> Usage:
    """The same with what a generation_config.json says in place of the authors' ways of writing.

    As in transformers, temperature, top_k and top_p count only where do_sample is true. ValueError: values that no
    decoding has, beams that are drawn.
    """
    try:
        return usage._replace(captions=_decoding(usage.captions, said), answers=_decoding(usage.answers, said))
    except ValueError as error:
        raise ValueError(f"{where}: {error}; correct the file, or take these lines out of it") from None


_SHARED = {"max_new_tokens": "max_new", "min_new_tokens": "min_new", "repetition_penalty": "repetition_penalty"}
_OF_BEAMS = {"num_beams": "width", "length_penalty": "length_penalty", "early_stopping": "early_stopping"}
_DRAWN = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
_WHOLE = ("max_new_tokens", "min_new_tokens", "num_beams", "top_k")
_BROKEN = ("repetition_penalty", "length_penalty", "temperature", "top_p")
_TOP_K = 50  # of transformers, where sampling is asked for and nothing else


def _decoding(usual: Beams | Sampling, said: Mapping[str, Any]) -> Beams | Sampling:
    given = {name: _read(name, value) for name, value in said.items() if value is not None}
    draws = bool(given.get("do_sample", isinstance(usual, Sampling) and usual.temperature > 0))
    width = given.get("num_beams", usual.width if isinstance(usual, Beams) and not draws else 1)
    shared = _said(given, _SHARED, usual)
    shared["min_new"] = min(shared["min_new"], shared["max_new"])
    if width == 1:
        usual = usual if isinstance(usual, Sampling) else Sampling(usual.max_new)
        fresh = given.get("do_sample") and usual.temperature == 0
        drawn = _said(given, _DRAWN, replace(usual, temperature=1.0, top_k=_TOP_K) if fresh else usual)
        return Sampling(**shared, **(drawn | {"top_k": drawn["top_k"] or None} if draws else {}))
    if draws:
        raise ValueError(f"do_sample=true with num_beams={width}: beams are not drawn here")
    usual = usual if isinstance(usual, Beams) else Beams(width)
    return Beams(**shared, **_said(given, _OF_BEAMS, usual))


def _read(name: str, value: Any) -> Any:
    """A setting of the file as ours. ValueError: no number where one is wanted."""
    for names, kind in ((_WHOLE, int), (_BROKEN, float)):
        if name in names:
            if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
                raise ValueError(f"{name}={value!r}: a {'whole ' if kind is int else ''}number")
            return kind(value)
    return value


def _said(given: Mapping[str, Any], names: Mapping[str, str], usual: Beams | Sampling) -> dict[str, Any]:
    """Our settings by the names of the file, as it says, or as usual."""
    return {ours: given.get(theirs, getattr(usual, ours)) for theirs, ours in names.items()}
