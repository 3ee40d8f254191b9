"""What all settings are made of: checked when read, unchanging afterwards, free of torch."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Settings that belong together: no unknown name passes, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def nothing_said(name: str | None, architecture: dict[str, Any] | None) -> str:
    """What is wrong with how a published part is told, if anything."""
    if name is None and architecture is None:
        return "name: not set, and without it an architecture must be given"
    if architecture is not None and "model_type" not in architecture:
        return "architecture: has no model_type, such as llama, opt or clip_vision_model"
    return ""


def usually(kind: str) -> BeforeValidator:
    """A choice that need not name its `kind`: this one unless given."""

    def fill(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, dict) else value

    filled: Callable[[Any], Any] = fill
    return BeforeValidator(filled)
