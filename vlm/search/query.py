"""`vlm search`: the pictures of an index that are nearest to words, to a picture, or to both."""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.data.image import BadSample
from vlm.search import graph
from vlm.search.encoder import Encoder, open_encoder
from vlm.search.exact import Best, Term, search
from vlm.search.manifest import Manifest, opened
from vlm.search.places import as_told, place_of
from vlm.search.rerank import rerank
from vlm.search.show import Hit, show
from vlm.search.store import Store
from vlm.search.update import form_of

TOGETHER = 64  # queries from standard input that are answered by one pass over the vectors
LONGEST = 2**16  # characters of a query


@dataclass(frozen=True)
class Options:
    """`image`: to find similar ones of; `weight`: share of the words beside it. `threshold`: least cosine.

    `rerank`: how many of the best ITM puts in order. `exact`: look at each vector, however many there are.
    """

    image: Path | None = None
    weight: float = 0.5
    top: int = 10
    threshold: float | None = None
    rerank: int | None = None
    exact: bool = False
    model: str | None = None
    null: bool = False
    json: bool = False
    sheet: bool = False


def find(index: Path, words: Sequence[str], options: Options) -> None:
    """Prints the paths of the nearest pictures, best first.

    `words`: of one query; - alone: queries from standard input, one a line.
    Errors: no index, another model than it was made with, nothing to look for, a picture that cannot be read, ITM asked
    of a model that has none, a large index without usearch.
    """
    many = list(words) == ["-"]
    text = " ".join(words).strip()
    _refuse(text, many, options)
    with opened(index) as manifest:
        encoder = open_encoder(index, manifest.meta(), options.model)
        if options.rerank is not None and encoder.ready.model.match is None:
            raise ValueError(f"--rerank: {encoder.name} was trained without itm, so it has no matching head")
        asker = _Asker(index, manifest, encoder, options)
        if not many:
            asker.answer([text])
            return
        lines = (line.strip() for line in sys.stdin)
        queries = (line for line in lines if line)
        while group := list(islice(queries, 1 if sys.stdin.isatty() else TOGETHER)):
            asker.answer(group)


def _refuse(text: str, many: bool, options: Options) -> None:
    for name, value in (("--threshold", options.threshold), ("--weight", options.weight)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} {value}: a number is needed")
    if not text and options.image is None:
        raise ValueError("nothing to look for: give words, --image FILE, or - for queries on standard input")
    if many and not options.json:
        raise ValueError("- reads many queries: paths alone would not say which of them they answer; add --json")
    if many and options.sheet:
        raise ValueError("--open shows what one query finds, and - reads many: leave one of them away")
    if options.rerank is not None and not text:
        raise ValueError("--rerank asks how well words and pictures match: give words")


class _Asker:
    """Answers queries from an index that may be brought up to date meanwhile: each group sees one state of it."""

    def __init__(self, index: Path, manifest: Manifest, encoder: Encoder, options: Options) -> None:
        self.index, self.manifest, self.encoder, self.options = index, manifest, encoder, options
        self._picture: Tensor | None = None
        if options.image is not None:
            self._picture = encoder.images(_pixels(encoder, options.image)[None])

    def answer(self, texts: Sequence[str]) -> None:
        """Prints what each finds."""
        terms = self._terms(texts)
        with self.manifest.transaction():
            roots = {number: place_of(path, self.index) for number, path in self.manifest.folders().items()}
            best = self._best(terms)
            found = [self._hits(roots, *row) for row in zip(best.scores.tolist(), best.places.tolist(), strict=True)]
        for text, hits in zip(texts, found, strict=True):
            told = self._there(hits)
            if self.options.rerank is not None:
                told = rerank(self.encoder, text, told, self.options.rerank)
            show(self._query(text), told[: self.options.top], self.options.null, self.options.json, self.options.sheet)

    def _terms(self, texts: Sequence[str]) -> list[Term]:
        """Words and picture, each with its share."""
        options, terms = self.options, list[Term]()
        if texts[0]:
            vectors = self.encoder.words([text[:LONGEST] for text in texts])
            terms.append(Term(vectors, 1.0 if self._picture is None else options.weight))
        if self._picture is not None:
            shared = self._picture.expand(len(texts), -1, -1)
            terms.append(Term(shared, 1 - options.weight if texts[0] else 1.0))
        return terms

    def _best(self, terms: Sequence[Term]) -> Best:
        store = Store(self.index, self.manifest, form_of(self.manifest.meta()))
        unused = torch.tensor(self.manifest.unused(), dtype=torch.long)
        k = max(self.options.top, self.options.rerank or 0)
        if graph.needed(store) and not self.options.exact:
            return graph.propose(store, terms, k, unused)
        return search(terms, store.read(self.manifest.parts()), k, unused)

    def _hits(self, roots: dict[int, bytes], scores: Iterable[float], places: Iterable[int]) -> list[Hit]:
        """Files of equal content all count."""
        least = -2.0 if self.options.threshold is None else self.options.threshold
        hits = list[Hit]()
        for score, place in zip(scores, places, strict=True):
            if score >= least:
                files = self.manifest.files_at(place)
                hits += [Hit(as_told(os.path.join(roots[folder], path)), score) for folder, path in files]
        return sorted(hits, key=lambda hit: (-hit.score, hit.path))

    def _there(self, hits: Sequence[Hit]) -> list[Hit]:
        """Without what was deleted since the index was brought up to date."""
        there = [hit for hit in hits if os.path.exists(hit.path)]
        if len(there) < len(hits):
            gone = len(hits) - len(there)
            print(f"vlm: {gone} of the pictures found are gone: vlm index {self.index}", file=sys.stderr)
        return there

    def _query(self, text: str) -> dict[str, Any]:
        image = self.options.image
        return ({"query": text} if text else {}) | ({} if image is None else {"image": str(image)})


def _pixels(encoder: Encoder, path: Path) -> Tensor:
    try:
        return encoder.transform.read(path.read_bytes())
    except BadSample as bad:
        raise ValueError(f"--image {path}: {bad}") from None
