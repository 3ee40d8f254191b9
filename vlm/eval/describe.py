"""Captions of a batch of images by any model that can write: a language model behind a connector, or a Q-Former itself.

Letters: B images, P prompt tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.data.batch import Text, pad
from vlm.data.text import Encoded, Tokenizer, encode_prompt
from vlm.model.generate import Sampling, generate
from vlm.model.vlm import Seen, VisionLanguageModel, last_valid


def describe(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    images: Float[Tensor, "B 3 H W"],
    template: str,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> list[str]:
    """One caption per image; `template` is the run's `data.prompt`, of which the part before {text} is given."""
    return write(model, tokenizer, model.see(images), template, max_tokens, sampling, generator)


@torch.no_grad()
def write(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    seen: Seen,
    template: str,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> list[str]:
    """As `describe`, for images looked at already."""
    prompt = _prompt(model, tokenizer, template, max_tokens)
    if model.language is None and sampling.max_new > max_tokens:
        raise ValueError(f"max_new={sampling.max_new}: this Q-Former was built for texts of {max_tokens} tokens")
    text = pad([prompt] * len(seen.soft), tokenizer.pad, side="left")
    text = Text(text.ids.to(seen.soft.device), text.valid.to(seen.soft.device), text.labels.to(seen.soft.device))
    hidden, state = model.begin(seen, text)
    logits = model.logits(last_valid(hidden, text.valid))
    said = torch.where(text.valid, text.ids, -1)
    rows = generate(model.proceed, logits, state, said, tokenizer.eos, sampling, generator)
    return [" ".join(tokenizer.decode(row).split()) for row in rows]  # one line each, whatever was drawn


def _prompt(model: VisionLanguageModel, tokenizer: Tokenizer, template: str, max_tokens: int) -> Encoded:
    if model.language is None:
        return Encoded([tokenizer.dec], [tokenizer.dec])
    return encode_prompt(tokenizer, template, None, model.image_tokens, max_tokens)
