"""`vlm caption`: a trained model describes pictures, or answers a question about each, as many as there are."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from threading import Event

from torch import Tensor

from vlm.captioning import output
from vlm.captioning.ahead import Ahead
from vlm.captioning.formats import Result, reason
from vlm.captioning.inputs import STDIN, Given, Named, standard_input
from vlm.captioning.progress import Meter
from vlm.captioning.speak import Speaker, chosen_device, set_precision
from vlm.captioning.watch import arrivals, ended_by_term
from vlm.captioning.wishes import Words, Work
from vlm.data.image import BadSample, ImageTransform
from vlm.ready import open_model

SPARE = 2  # a JPEG that is decoded at a fraction of its size keeps so many times the pixels that are needed
WORKERS = 8  # threads that decode, at most, unless told otherwise

Prepared = Tensor | BadSample | OSError


def caption(
    model: str,
    images: Sequence[str],
    words: Words | None = None,
    work: Work | None = None,
    parts: Mapping[str, str] | None = None,
) -> None:
    """Captions all pictures that are named; SystemExit 1 at the end if some could not be, which are told on stderr.

    `model`, `parts`: as of `open_model`. ValueError: what can be known to be wrong before the first picture, and a list
    on standard input that is none.
    """
    words, work = words or Words(), work or Work()
    given = Given(images, standard_input() if STDIN in images else BytesIO(), work.null, work.allow_url)
    given.check()
    output.check(work)
    ready = open_model(model, chosen_device(work.device), parts)
    set_precision(ready.model, work.dtype)
    speaker = Speaker(ready, words, work.batch_size)
    sink = output.opened(work, words.captions)
    hidden = work.output is not None or work.format == "sidecar" or not sys.stdout.isatty()
    meter = Meter(work.quiet, bar=hidden)
    with meter.shown():
        _run(speaker, given, sink, meter, work)
    sink.end()
    meter.end()
    if meter.failed:
        raise SystemExit(1)


def _run(speaker: Speaker, given: Iterable[Named], sink: output.Sink, meter: Meter, work: Work) -> None:
    stop = Event()
    named: Iterable[Named] = given
    if work.watch is not None:
        named = chain(given, arrivals(str(work.watch), stop, all_of_them=work.skip_existing))
        meter.say(f"vlm: watching {work.watch}; Ctrl-C ends")
    transform = replace(speaker.transform, scaled=0 if work.exact else SPARE)
    workers = work.workers or min(WORKERS, os.cpu_count() or 1)
    ahead = Ahead(_todo(named, sink, meter), partial(_prepare, transform), workers, 2 * speaker.size)
    try:
        with nullcontext() if work.watch is None else ended_by_term():
            while taken := ahead.take(speaker.size):
                for result in _said(speaker, taken):
                    _tell(result, sink, meter)
    except KeyboardInterrupt:
        if work.watch is None:
            raise
    finally:
        stop.set()
        ahead.close()


def _todo(named: Iterable[Named], sink: output.Sink, meter: Meter) -> Iterator[tuple[Named, BadSample | None]]:
    """Pictures that are not done yet; some never can be."""
    for each in named:
        try:
            done, refused = sink.has(each), None
        except BadSample as error:
            done, refused = False, error
        meter.skipped += done
        if not done:
            yield each, refused


def _prepare(transform: ImageTransform, given: tuple[Named, BadSample | None]) -> Prepared:
    """Pixels, or what is wrong with the picture."""
    named, refused = given
    if refused is not None:
        return refused
    try:
        return transform.read(named.read())
    except (BadSample, OSError) as error:
        return error


def _said(speaker: Speaker, taken: Sequence[tuple[tuple[Named, BadSample | None], Prepared]]) -> Iterator[Result]:
    """Results of a batch, in order."""
    good = [(named.name, pixels) for (named, _), pixels in taken if isinstance(pixels, Tensor)]
    texts = iter(speaker([name for name, _ in good], [pixels for _, pixels in good]) if good else [])
    for (named, _), pixels in taken:
        if isinstance(pixels, Tensor):
            yield Result(named.name, next(texts), question=speaker.words.ask)
        else:
            yield Result(named.name, error=pixels, question=speaker.words.ask)


def _tell(result: Result, sink: output.Sink, meter: Meter) -> None:
    try:
        sink.put(result)
    except BadSample as error:
        result = Result(result.name, error=error)
    if result.error is None:
        meter.count(done=1)
    else:
        meter.say(f"vlm: {result.name}: {reason(result.error)}")
        meter.count(failed=1)


def find_images(names: Iterable[str]) -> Iterator[Path]:
    """Files as named, and the pictures of folders in order. ValueError: nothing of that name, or no picture in it."""
    return (Path(named.name) for named in Given(list(names), BytesIO()))
