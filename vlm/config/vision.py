"""Settings of the image encoder: of open_clip, timm, or a published system."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlm.config.section import Positive, Section, nothing_said

Dtype = Literal["float32", "bfloat16"]


class VisionBase(Section):
    """What every image encoder has."""

    kind: str
    layer: int = Field(-1, description="-1: normalised output; -2: output of the last block but one (LLaVA)")
    class_token: Literal["keep", "drop"] = "keep"
    frozen: bool = True
    dtype: Dtype | None = Field(None, description="dtype of a frozen encoder's weights and arithmetic")

    @property
    def source(self) -> str | None:
        """Where its weights come from; None for random ones."""
        return None


class LibraryVision(VisionBase):
    """One that a library knows by name."""

    name: str = Field(description="model name of the library")
    weights: str | None = Field(None, description="pretrained tag, file, or null for random")
    image_size: Positive | None = Field(None, description="pixels; the model's own unless given")

    @property
    def source(self) -> str | None:
        """Where its weights come from; None for random ones."""
        return self.weights


class OpenClipVision(LibraryVision):
    """The image tower of an open_clip model."""

    kind: Literal["open_clip"]


class TimmVision(LibraryVision):
    """A timm model without its classifier."""

    kind: Literal["timm"]
    args: dict[str, Any] = Field(default_factory=dict, description="further arguments of timm.create_model")


class PublishedVision(VisionBase):
    """The image encoder of a published system: CLIP, SigLIP, BLIP-2, LLaVA."""

    kind: Literal["published"]
    name: str | None = Field(
        None, description="folder, file, or OWNER/NAME[@REVISION] of the hub; null: random weights"
    )
    architecture: dict[str, Any] | None = Field(
        None, description="the vision_config of its config.json (model_type, hidden_size, ...); read there unless given"
    )
    resize: Literal["shortest", "longest", "squash"] | None = Field(
        None, description="to a square by cutting, padding or squeezing; as published unless given"
    )

    @property
    def source(self) -> str | None:
        """Where its weights come from; None for random ones."""
        return self.name

    @model_validator(mode="after")
    def _something_is_said(self) -> "PublishedVision":
        if problem := nothing_said(self.name, self.architecture):
            raise ValueError(problem)
        return self


Vision = Annotated[OpenClipVision | TimmVision | PublishedVision, Field(discriminator="kind")]
