"""`vlm shards write`: any source to tar shards, whole or not at all, the same bytes for the same input."""

import io
import json as jsonlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Dataset

from vlm.data.fetch import is_address
from vlm.data.image import BadSample, decode
from vlm.data.loader import MAX_WARNINGS, in_order
from vlm.data.pictures import PICTURES, Pictures
from vlm.data.shards import Shards, check_bad
from vlm.data.sources import Source, has_paths, open_pictures
from vlm.data.tars import Names, Tars, check_out, drafted, write_index

KEY, PICTURE = "key", "picture"  # fields of each sample's json: the key in the source; samples equal in the other
LIMIT = 0.05  # share of bad samples
QUALITY = 95  # of JPEGs that are written anew
_KNOWN = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How samples become shards.

    A shard ends after `samples` or `max_mb`. `size`: pictures whose shorter side is longer are shrunk to it; they are
    written as JPEG of `quality` (all pictures, if that is given). What is not re-encoded is copied byte for byte.
    `check`: each picture must decode.
    """

    samples: int = 10_000
    max_mb: int = 1000
    size: int | None = None
    quality: int | None = None
    check: bool = True

    def __post_init__(self) -> None:
        for name, most in (("samples", 10**6), ("max_mb", 10**6), ("size", 10**5), ("quality", 100)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name}={value}: must be from 1 to {most}")


@dataclass(frozen=True)
class Options:
    """How a source is written: its format in words, whether its ids go before a `picture` that is in its json already,
    processes that read and encode, whether a small source too is held to its `max_bad_fraction`, replace `out`."""

    about: str = ""
    own_id: bool = False
    workers: int = 0
    strict: bool = False
    overwrite: bool = False


def write(
    spec: Sequence[str],
    out: Path,
    recipe: Recipe,
    *,
    image: str = PICTURES,
    caption: str = "txt;json:caption",
    id_field: str | None = None,
    images: Path | None = None,
    workers: int = 0,
    max_bad_fraction: float | None = None,
    overwrite: bool = False,
    json: bool = False,
    talks: bool | None = None,
) -> None:
    """Recognises a source, writes it as shards and prints the counts; the rest as `open_pictures` and `write_shards`.

    `max_bad_fraction`: a small source is held to it only if it is given. `talks` None: unless the source is tars.
    Errors: see those two.
    """
    check_out(out, overwrite, [name for name in spec if not is_address(name)])
    if images is not None and not has_paths(spec):
        raise ValueError(
            f"--images {images}: {spec[0]} holds its pictures itself; only tables and JSON name them by path"
        )
    source = open_pictures(
        spec,
        image,
        caption,
        id_field,
        images,
        LIMIT if max_bad_fraction is None else max_bad_fraction,
        talks=has_paths(spec) if talks is None else talks,
    )
    about = source.about if isinstance(source, Source) else _about_tars(source)
    print(about, file=sys.stderr, flush=True)
    layout = about.removeprefix(f"{source.files[0]}: ")
    options = Options(layout, id_field is not None, workers, max_bad_fraction is not None, overwrite)
    index = write_shards(source, out, recipe, options)
    print(jsonlib.dumps(index, indent=1) if json else _as_text(out, index))


def _about_tars(source: Pictures) -> str:
    about = f"{source.files[0]}: tar shards; {len(source)} pictures"
    others = source.others if isinstance(source, Shards) else Counter[str]()
    lost = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common())
    return about + (f"; members not carried over: {lost}" if lost else "")


def _as_text(out: Path, index: dict[str, Any]) -> str:
    size = sum(shard["bytes"] for shard in index["shards"]) / 2**20
    bad = ", ".join(f"{count} x {reason}" for reason, count in index["bad"].items()) or "nothing"
    return (
        f"{out}: {index['samples']} pictures with {index['captions']} captions in {len(index['shards'])} shards, "
        f"{size:.1f} MB; {index['re_encoded']} pictures re-encoded, {index['renamed']} keys changed; left out: {bad}"
    )


def write_shards(source: Pictures, out: Path, recipe: Recipe, options: Options | None = None) -> dict[str, Any]:
    """Writes all usable samples of a source in its order; returns what index.json holds.

    Everything goes to a hidden folder beside `out`, which becomes `out` at the end: an interrupted run leaves nothing
    that looks finished, and is cleared by the next. Samples hold the picture, txt (a caption a line) and json: the
    source's fields, `key` (in the source) and `picture` (its id: equal where the same picture is shown). Of a
    conversation they hold KEY.0.jpg, KEY.1.jpg, … unless it shows one picture, and the conversation in the json.
    ValueError: more than the source's `max_bad_fraction` of bad samples, none left, `out` exists or is being written.
    """
    options = options or Options()
    with drafted(out, options.overwrite) as draft:
        index = {"format": options.about, "recipe": asdict(recipe), **_fill(draft, source, recipe, options)}
        write_index(draft, index)
    return index


def _fill(draft: Path, source: Pictures, recipe: Recipe, options: Options) -> dict[str, Any]:
    """All samples into tars in the folder; the counts."""
    bad, changed = source.bad.copy(), Counter[str]()
    captions, name = 0, str(source.files[0])
    names = Names(source.key(index) for index in range(len(source)))
    tars = Tars(draft, recipe.samples, recipe.max_mb * 2**20)
    for index, made in enumerate(_progress(_made(source, recipe, options), len(source))):
        if isinstance(made, _Stop):
            raise ValueError(made.message)
        if isinstance(made, _Bad):
            if bad.total() - source.bad.total() < MAX_WARNINGS:
                log.warning("unusable sample %s", made.message)
            bad[made.reason] += 1
        else:
            key = names(index, made.key)
            tars.add(key, made.members)
            captions += made.captions
            changed += Counter(renamed=key != made.key, re_encoded=made.re_encoded)
        check_bad(bad, index + 1 + source.bad.total(), source.max_bad_fraction, name)
    tars.close()
    if not tars.written or (
        options.strict and bad.total() > source.max_bad_fraction * (len(source) + source.bad.total())
    ):
        counts = ", ".join(f"{reason}: {count}" for reason, count in bad.most_common())
        raise ValueError(
            f"{name}: {bad.total()} of {len(source) + source.bad.total()} samples are unusable ({counts}), more than "
            f"max_bad_fraction={source.max_bad_fraction}; nothing is written"
        )
    return {
        "samples": sum(shard.samples for shard in tars.written),
        "captions": captions,
        "re_encoded": changed["re_encoded"],
        "renamed": changed["renamed"],
        "bad": dict(bad.most_common()),
        "shards": [asdict(shard) for shard in tars.written],
    }


# --- one sample ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """A sample ready for the tar."""

    key: str
    members: dict[str, bytes]
    captions: int
    re_encoded: bool


@dataclass(frozen=True)
class _Bad:
    """Why there is no sample."""

    reason: str
    message: str


@dataclass(frozen=True)
class _Stop:
    """A message for the user, which should not arrive inside a worker's traceback."""

    message: str


_Result = _Made | _Bad | _Stop


@dataclass(frozen=True)
class _Work(Dataset[_Result]):
    """Number to sample, for `DataLoader`."""

    source: Pictures
    recipe: Recipe
    own_id: bool

    def __getitem__(self, index: int) -> _Result:
        try:
            return self._make(index)
        except BadSample as bad:
            return _Bad(bad.reason, f"{self.source.where(index)}: {bad}")
        except ValueError as error:
            return _Stop(str(error))

    def _make(self, index: int) -> _Made:
        raw = self.source.raw(index)
        made = [encoded(image, self.recipe) for image in raw.images]
        fields = {KEY: raw.key, PICTURE: raw.id, **raw.fields}
        if self.own_id:
            fields[PICTURE] = raw.id
        text = jsonlib.dumps(fields, ensure_ascii=False, default=str).encode("utf-8", "replace")
        changed = any(image is not given for (_, image), given in zip(made, raw.images, strict=True))
        if len(made) == 1:  # so that one who takes captions finds one
            ((suffix, image),) = made
            members = {suffix: image, "json": text, "txt": "\n".join(raw.captions).encode()}
        else:
            members = {f"{number}.{suffix}": image for number, (suffix, image) in enumerate(made)} | {"json": text}
        return _Made(raw.key, members, len(raw.captions), changed)


def _made(source: Pictures, recipe: Recipe, options: Options) -> Iterator[_Result]:
    return in_order(_Work(source, recipe, options.own_id), len(source), options.workers)


def encoded(data: bytes, recipe: Recipe) -> tuple[str, bytes]:
    """Suffix and bytes to store: the picture as it is, or written anew where the recipe or its format asks for it.

    JPEG, PNG and WebP can be kept; other formats become PNG. BadSample when it has to be decoded and cannot be.
    """
    suffix = next((known for start, known in _KNOWN.items() if data.startswith(start)), "")
    if not suffix and data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        suffix = "webp"
    if suffix and not recipe.check and recipe.size is None and recipe.quality is None:
        return suffix, data
    picture = decode(data)
    short = min(picture.size)
    out = io.BytesIO()
    if recipe.size is not None and short > recipe.size:
        width, height = (max(1, round(side * recipe.size / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    elif recipe.quality is None:
        if suffix:
            return suffix, data
        picture.save(out, "PNG")
        return "png", out.getvalue()
    picture.save(out, "JPEG", quality=recipe.quality or QUALITY)
    return "jpg", out.getvalue()


def _progress(made: Iterator[_Result], total: int) -> Iterator[_Result]:
    """The same, shown on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield from bar.track(made, total=total)
