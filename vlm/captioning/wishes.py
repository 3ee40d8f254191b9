"""What is asked of `vlm caption`, and what of it cannot be: plain values that need no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Format = Literal["text", "jsonl", "csv", "coco", "sidecar"]
FORMATS: tuple[Format, ...] = get_args(Format)
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Words:
    """What is written about each picture; what is None is as the model's authors, or its training, have it.

    `prompt`: first words of every caption. `ask`: a question in place of a caption. `captions`: of each picture.
    `max_new`, `min_new` count what is written, in tokens, without picture, question and prompt.
    """

    prompt: str = ""
    ask: str | None = None
    captions: int = 1
    beams: int | None = None
    length_penalty: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_new: int | None = None
    min_new: int = 0
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError: the first thing that cannot be, by the names of the command line."""
        if (wrong := next(self._wrong(), None)) is not None:
            raise ValueError(wrong)

    def _wrong(self) -> Iterator[str]:
        yield from self._wrong_numbers()
        if self.beams is not None and self.temperature:
            yield f"--beams {self.beams} with --temperature {self.temperature:g}: beams are not drawn; give one of them"
        for name, value in (("--top-k", self.top_k), ("--top-p", self.top_p)):
            if value is not None and not self.temperature:
                yield f"{name} {value:g} without --temperature: nothing is drawn; give a temperature above 0 too"
        if self.length_penalty is not None and self.beams is None:
            yield f"--length-penalty {self.length_penalty:g} without --beams: lengths are compared among beams alone"
        if self.beams is not None and self.captions > self.beams:
            yield f"--num-captions {self.captions} of --beams {self.beams}: at most as many as there are beams"

    def _wrong_numbers(self) -> Iterator[str]:
        checks: list[tuple[bool, str, float | None, str]] = [
            (self.captions >= 1, "--num-captions", self.captions, "at least 1"),
            (self.beams is None or self.beams >= 1, "--beams", self.beams, "at least 1"),
            (
                self.length_penalty is None or math.isfinite(self.length_penalty),
                "--length-penalty",
                self.length_penalty,
                "a finite number",
            ),
            (0 <= self.temperature < math.inf, "--temperature", self.temperature, "0 (the likeliest word) or more"),
            (self.top_k is None or self.top_k >= 1, "--top-k", self.top_k, "at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, "--top-p", self.top_p, "above 0, at most 1"),
            (self.max_new is None or self.max_new >= 1, "--max-new", self.max_new, "at least 1"),
            (
                self.min_new >= 0 and (self.max_new is None or self.min_new <= self.max_new),
                "--min-new",
                self.min_new,
                "at least 0, at most --max-new",
            ),
            (self.no_repeat_ngram >= 0, "--no-repeat-ngram", self.no_repeat_ngram, "0 (off) or more"),
            (0 < self.repetition_penalty < math.inf, "--repetition-penalty", self.repetition_penalty, "above 0"),
        ]
        yield from (f"{name} {value:g}: {rule}" for good, name, value, rule in checks if not good and value is not None)

    @property
    def own(self) -> bool:
        """Whether nothing is said on how words are chosen, so that a published model writes as its authors have it."""
        plain = Words(
            prompt=self.prompt,
            ask=self.ask,
            captions=self.captions,
            no_repeat_ngram=self.no_repeat_ngram,
            seed=self.seed,
        )
        return self == plain


@dataclass(frozen=True)
class Work:
    """Where pictures come from and captions go to, and what computes them.

    `null`: names in a list end with a zero byte. `exact`: every JPEG is decoded at its full size.
    """

    null: bool = False
    allow_url: bool = False
    watch: Path | None = None
    format: Format = "text"
    output: Path | None = None
    skip_existing: bool = False
    overwrite: bool = False
    batch_size: int | None = None
    workers: int | None = None
    device: str | None = None
    dtype: str = "auto"
    exact: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """ValueError: the first thing that cannot be, by the names of the command line."""
        if (wrong := next(self._wrong(), None)) is not None:
            raise ValueError(wrong)

    def _wrong(self) -> Iterator[str]:
        if self.format not in FORMATS:
            yield f"--format {self.format}: no such format; there are {', '.join(FORMATS)}"
        if self.dtype not in DTYPES:
            yield f"--dtype {self.dtype}: no such type; there are {', '.join(DTYPES)}"
        yield from self._wrong_places()
        for name, value in (("--batch-size", self.batch_size), ("--workers", self.workers)):
            if value is not None and value < 1:
                yield f"{name} {value}: at least 1"
        if self.watch is not None and not self.watch.is_dir():
            yield f"--watch {self.watch}: no such folder"

    def _wrong_places(self) -> Iterator[str]:
        sidecar = self.format == "sidecar"
        if sidecar and self.output is not None:
            yield f"--output {self.output} with --format sidecar: captions go beside their pictures; leave it out"
        for name, given in (("--skip-existing", self.skip_existing), ("--overwrite", self.overwrite)):
            if given and not sidecar and self.output is None:
                yield f"{name} without --output FILE or --format sidecar: standard output keeps nothing"
        if self.skip_existing and self.overwrite:
            yield "--skip-existing with --overwrite: what is there is either kept or replaced; give one of the two"
