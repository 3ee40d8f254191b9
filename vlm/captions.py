"""What a model that is ready for use says of pictures: captions, or answers to a question about each."""

from torch import Tensor

from vlm import build_data
from vlm.config.schema import ChatData
from vlm.data.talk import ask
from vlm.model.describe import Caption, answer_several, describe_several
from vlm.model.generate import Decoding, Dice, Sampling
from vlm.nn.backend import fast_float32
from vlm.restore import Ready

ANSWER = 256  # tokens of the longest answer, unless told otherwise


def written(
    ready: Ready,
    images: Tensor,
    how: Decoding,
    generator: Dice | None = None,
    question: str | None = None,
    begun: str = "",
    draws: int = 1,
) -> list[list[Caption]]:
    """Captions of normalised images on the model's device, B 3 H W, or of a model that answers, its answers about each.

    Without a question a published model is asked as its authors ask it for a caption. `begun`, `draws`: as of
    `describe_several`.
    """
    model, data = ready.model, ready.data
    with fast_float32():
        if isinstance(data, ChatData):
            form, words, stop = ready.form(question)
            talks = [ask(words, 1)] * len(images)
            return answer_several(model, form, talks, images, how, generator, stop, begun, draws)
        template = build_data.template(data.template)
        return describe_several(
            model, ready.tokenizer, images, template, data.max_tokens, how, generator, (), begun, draws
        )


def captions(
    ready: Ready, images: Tensor, how: Decoding, generator: Dice | None = None, question: str | None = None
) -> list[str]:
    """The text alone of one caption each, as `written`; images of any device."""
    images = images.to(next(ready.model.parameters()).device)
    return [row[0].text for row in written(ready, images, how, generator, question)]


def usual_decoding(ready: Ready, question: bool = False) -> Decoding:
    """As its authors have a published model write captions, or answers; greedy, as long as in training, for others."""
    if ready.usage is not None:
        return ready.usage.answers if question else ready.usage.captions
    return Sampling(longest_text(ready))


def longest_text(ready: Ready) -> int:
    """Tokens of the longest text unless told otherwise: as in training, of answers no more than ANSWER."""
    data = ready.data
    return min(data.max_tokens, ANSWER) if isinstance(data, ChatData) else data.max_tokens
