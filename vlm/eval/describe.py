"""Captions of a batch of images by any model that can write: a language model behind a connector, or a Q-Former itself.

Letters: B images, P prompt tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.data.batch import pad
from vlm.data.text import Encoded, Tokenizer, encode_prompt
from vlm.model.generate import Sampling, generate
from vlm.model.vlm import VisionLanguageModel, last_valid


@torch.no_grad()
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
    prompt = _prompt(model, tokenizer, template, max_tokens)
    if model.language is None and sampling.max_new > max_tokens:
        raise ValueError(f"max_new={sampling.max_new}: this Q-Former was built for texts of {max_tokens} tokens")
    text = pad([prompt] * len(images), tokenizer.pad, side="left").to(images.device)
    hidden, state = model.begin(model.see(images), text)
    logits = model.logits(last_valid(hidden, text.valid))
    said = torch.where(text.valid, text.ids, -1)
    rows = generate(model.proceed, logits, state, said, tokenizer.eos, sampling, generator)
    return [" ".join(tokenizer.decode(row).split()) for row in rows]  # one line each, whatever was drawn


def _prompt(model: VisionLanguageModel, tokenizer: Tokenizer, template: str, max_tokens: int) -> Encoded:
    if model.language is None:
        return Encoded([tokenizer.dec], [tokenizer.dec])
    return encode_prompt(tokenizer, template, None, model.image_tokens, max_tokens)
