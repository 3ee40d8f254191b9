"""Parts of a published system for a model of one's own: image encoder and Q-Former before another language model."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from vlm.model.vlm import VisionLanguageModel, need

PARTS = ("vision", "connector", "text", "language", "contrast", "match")


@torch.no_grad()
def take(
    model: VisionLanguageModel, given: VisionLanguageModel, parts: Sequence[str], new: Collection[str] = ()
) -> list[str]:
    """Copies parts of `given` into the same parts of `model`, in the types that they have there.

    `new`: names, or beginnings of names, that keep what `model` has of them ("connector.out": the projection to another
    language model); all else must be in both, and of one shape. Returns a line for each part: what was taken, what is
    new here, what was left behind. ValueError, before anything is copied: a part that one of the two lacks, tensors
    that do not fit, a `new` that names nothing.
    """
    own, theirs, problems = dict[str, Tensor](), dict[str, Tensor](), list[str]()
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part '{part}': there are {', '.join(PARTS)}")
        own |= _named(need(getattr(model, part), part), part)
        theirs |= _named(need(getattr(given, part), part), part)
    fresh = {name for name in own if any(_under(name, prefix) for prefix in new)}
    if idle := [prefix for prefix in new if not any(_under(name, prefix) for name in own)]:
        problems.append(f"new={idle[0]}: no tensor of {', '.join(parts)} has such a name")
    for name in sorted(own.keys() - fresh):
        if name not in theirs:
            problems.append(f"{name} is not in what is given")
        elif own[name].shape != theirs[name].shape:
            problems.append(f"{name} is {tuple(theirs[name].shape)} there and {tuple(own[name].shape)} here")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        remedy = "; name what is to be learned afresh in `new`"
        raise ValueError(f"these parts do not fit: {'; '.join(problems[:5])}{more}{remedy}")
    for name in own.keys() - fresh:
        own[name].copy_(theirs[name])
    return [_line(part, set(own), set(theirs), fresh) for part in parts]


def _named(module: nn.Module, part: str) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _line(part: str, own: set[str], theirs: set[str], fresh: set[str]) -> str:
    mine, other = ({name for name in names if _under(name, part)} for names in (own, theirs))
    kept, left = sorted(mine & fresh), len(other - (mine - fresh))
    extra = f", new here: {', '.join(kept[:4])}{' …' if len(kept) > 4 else ''}" if kept else ""
    return f"{part}: {len(mine - fresh)} tensors taken{extra}" + (f", {left} left behind" if left else "")
