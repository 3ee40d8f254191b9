"""Settings of data with pictures: where it comes from, how it is changed while training, how it stands in a text."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Discriminator, Field, Tag

from vlm.config.section import Fraction, Positive, Section

Published = Literal[
    "plain", "vicuna_v1", "llama3", "chatml", "smollm2", "blip2", "blip2_question", "minigpt4", "instructblip"
]


class OwnTemplate(Section):
    """A template of one's own; {bos} and {eos} are the tokenizer's start and end, other control tokens go by name."""

    user: str = Field(
        description="around a question, such as 'USER: {image}{text} '; pictures at {image}, if it has one"
    )
    answer: str = Field(description="such as 'ASSISTANT: {text}'; a space before {text} belongs to the answer")
    start: str = "{bos}"
    system: str = Field("{system}", description="around the system text; empty: there is none")
    default_system: str = Field("", description="the system text unless data.system or a conversation has one")
    end: str = Field("{eos}", description="what ends an answer, which the model learns to say")
    after: str = Field("", description="what stands between an answer and the next question")
    image: str = Field("{image}", description="around a picture, such as '<Img>{image}</Img>'")
    gap: str = Field("", description="between a picture at {image} and what follows")
    interleaved: bool = Field(False, description="several pictures of a question stay where its text has them")
    stop: list[str] = Field(default_factory=list, description="further strings before which an answer ends")
    control: bool = Field(True, description="<|im_end|> in it is a control token; false: it is spelt out")


def _known(name: str) -> str:
    names = get_args(Published)
    if name not in names and "{" not in name:
        near = get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"no template {name!r}{hint}; {', '.join(names)}, a line with {{image}} and {{text}}, a mapping"
        )
    return name


def _written(value: Any) -> str:
    return "own" if isinstance(value, dict | OwnTemplate) else "name"


Template = Annotated[
    Annotated[str, AfterValidator(_known), Tag("name")] | Annotated[OwnTemplate, Tag("own")], Discriminator(_written)
]


class Augment(Section):
    """Random changes of a training picture; every field is a strength, 0 is off."""

    scale: tuple[float, float] = Field((1.0, 1.0), description="area cut out; above 1 the picture shrinks onto white")
    ratio: float = Field(0.0, ge=0, description="proportions of the cut, up to 1 + this")
    flip: bool = Field(False, description="off by default: captions may say left and right")
    rotate: float = Field(0.0, ge=0, description="degrees, either way")
    shift: float = Field(0.0, ge=0, description="share of the side, either way")
    brightness: float = Field(0.0, ge=0, description="factor 1 ± this; so are contrast and saturation")
    contrast: float = Field(0.0, ge=0)
    saturation: float = Field(0.0, ge=0)
    hue: float = Field(0.0, ge=0, le=0.5, description="turns, either way")
    mix: float = Field(0.0, ge=0, description="how much the colour channels leak into each other")
    grey: Fraction = Field(0.0, description="probability; so are invert and erase")
    invert: Fraction = 0.0
    erase: Fraction = 0.0
    erase_area: tuple[Fraction, Fraction] = Field((0.02, 0.2), description="of the picture, in one random colour")


class MixedSource(Section):
    """One source of a mixture; what is not given is as in `data`."""

    source: str | list[str] = Field(description="as data.train of one source")
    weight: float = Field(1.0, gt=0, description="its share of the samples, beside the other weights")
    images: str | None = None
    image: str | None = None
    caption: str | None = None
    id: str | None = None


def _form(value: Any) -> str:
    mixed = isinstance(value, list) and any(isinstance(item, dict | MixedSource) for item in value)
    return "mixture" if mixed else "one"


class PictureData(Section):
    """What every data set with pictures has."""

    kind: str
    train: Annotated[
        Annotated[str | list[str], Tag("one")] | Annotated[list[MixedSource], Tag("mixture")], Discriminator(_form)
    ] = Field(
        description="shards: a folder, a glob, braces {000..009}, or a list of these; or a folder of pictures and "
        ".txt, a table (CSV, TSV, JSON lines, Parquet), COCO, Karpathy (file.json#split) or LLaVA JSON; tars also by "
        "address: https://…/{000..099}.tar, s3://…; or a mixture: a list of {source: …, weight: …}"
    )
    val: str | list[str] | None = None
    images: str | None = Field(None, description="folder that a table's paths are relative to; its own unless given")
    image: str = Field("jpg;png;jpeg;webp", description="suffixes of the image, or a table's column; first found wins")
    caption: str = Field(
        "txt;json:caption", description="txt (one caption a line) or json:FIELD (also a column), first found wins"
    )
    id: str | None = Field(
        None, description="json field or column that says which samples show the same thing; the key unless given"
    )
    shuffle_window: Positive = Field(
        100_000, description="samples of training that are mixed at a time, at least a shard; little else is read then"
    )
    augment: Augment | None = None
    scaled_decode: bool = Field(
        False, description="large JPEGs of training decoded at 1/2 to 1/8 of their size: faster, and a little different"
    )
    workers: Annotated[int, Field(ge=0)] = 0
    cache_mb: Annotated[int, Field(ge=0)] = Field(0, description="memory for decoded images; uncut where augment cuts")
    shard_cache: str | None = Field(
        None, description="folder of downloaded shards and of indices; $VLM_CACHE or ~/.cache/vlm/shards unless given"
    )
    shard_cache_gb: float = Field(100.0, gt=0, description="its bound in GiB; what was not used for longest goes first")
    max_bad_fraction: Fraction = Field(0.05, description="stop when more of the samples than this are unusable")
