"""How the authors of BLIP-2's family have it write (prompts, lengths, beams): what holds unless something else is said.

Sources: LAVIS, lavis/projects/{blip2,instructblip}/eval and the defaults of its `generate` and `predict_answers`;
MiniGPT-4, minigpt4/conversation. Their lengths count what is written, without prompt and image, and so do ours; their
repetition penalty counts nothing else either.
"""

from typing import NamedTuple

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


def usage_of(model_type: str, language: str) -> Usage:
    """For a config.json's model_type, "minigpt4" for that, and the model_type of its language model.

    ValueError for another system.
    """
    match model_type, language:
        case "minigpt4", _:
            return MINIGPT4
        case "instructblip", _:
            return INSTRUCTBLIP
        case "llava" | "llava_llama", _:
            return LLAVA
        case "blip-2", "t5":
            return BLIP2_T5
        case "blip-2", _:
            return BLIP2_OPT
        case _:
            raise ValueError(f"model_type={model_type!r}: known are blip-2, instructblip, llava and minigpt4")
