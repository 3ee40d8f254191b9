"""What one forward pass works out once and all its blocks share."""

from typing import NamedTuple

from vlm.nn.retain import Fading
from vlm.nn.rotary import Angles
from vlm.nn.tokens import Tokens, Visibility


class Context(NamedTuple):
    """The tokens of the pass, and what each kind of mixer needs to know about their places."""

    tokens: Tokens
    visibility: Visibility | None = None  # for attention; a stack of retention alone has no mask
    angles: Angles | None = None  # for attention with rotary positions
    fading: Fading | None = None  # for retention
