"""Beyond a million vectors: usearch's graph of near ones (HNSW, arXiv 1603.09320) proposes, exact scores decide.

The graph lies beside the vectors and holds all of them up to a place; what came later is searched exactly.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vlm.search.exact import Best, Term, merge, score, search
from vlm.search.store import Store
from vlm.train.log import note

EXACT = 1_000_000  # vectors that are searched one by one
NEIGHBOURS, CARE_ADDING = 16, 128  # of a vector; candidates looked at
CARE_SEARCHING = 1024  # of a million like pictures 128 found 81 % of the best ten; it takes 10 ms
SAVE = 2**19  # vectors, after which a graph that grows is saved
MORE = 4  # candidates asked for, for each that is wanted


def needed(store: Store) -> bool:
    """Whether there are too many vectors to look at each."""
    return store.rows() * store.form.vectors > EXACT


def extend(store: Store) -> None:
    """Puts what is new into the graph of a large index; without usearch it tells that and does nothing."""
    if not needed(store):
        return
    if find_spec("usearch") is None:
        note(f"{store.folder}: more than {EXACT:,} vectors: vlm search needs --exact, or pip install 'vlm[search]'")
        return
    done, total, vectors = _covered(store), store.rows(), store.form.vectors
    if done == total:
        return
    index, unsaved = _load(store, view=False), 0
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("graph", total=total, completed=done)
        for first, rows in _numbered(store, done):
            keys = torch.arange(first * vectors, (first + len(rows)) * vectors)
            index.add(keys.numpy(), rows.flatten(0, 1).float().numpy())
            done, unsaved = first + len(rows), unsaved + len(keys)
            bar.update(task, completed=done)
            if unsaved >= SAVE or done == total:
                _save(store, index, done)
                unsaved = 0


def propose(store: Store, terms: Sequence[Term], k: int, unused: Int[Tensor, "U"]) -> Best:
    """The best `k` of what the graph proposes and of what it does not hold yet, by their exact scores.

    ValueError: usearch is missing, or the graph is not there.
    """
    remedy = "or look at each vector with --exact, which is slower"
    if find_spec("usearch") is None:
        raise ValueError(
            f"{store.folder}: {store.rows() * store.form.vectors:,} vectors, more than {EXACT:,}: "
            f"pip install 'vlm[search]' and run vlm index {store.folder}, {remedy}"
        )
    done = _covered(store)
    if (store.rows() - done) * store.form.vectors > EXACT:
        raise ValueError(f"{store.folder}: its graph is not made yet: run vlm index {store.folder}, {remedy}")
    index = _load(store, view=True)
    early = list[Best]()
    for query in range(len(terms[0].vectors)):
        mine = [Term(term.vectors[query : query + 1], term.weight) for term in terms]
        early.append(_rescored(store, mine, _candidates(index, store, mine, k, unused), k))
    later = search(terms, (rows for _, rows in _numbered(store, done)), k, unused, done)
    found = Best(torch.cat([one.scores for one in early]), torch.cat([one.places for one in early]))
    return merge(found, later, k)


def _candidates(index: Any, store: Store, terms: Sequence[Term], k: int, unused: Tensor) -> Int[Tensor, "C"]:
    """Places near any vector of a query, those of no file left out; asks for more until there are enough."""
    count, vectors = max(64, MORE * k) * store.form.vectors, torch.cat([term.vectors[0] for term in terms])
    while True:
        keys: Tensor = torch.from_numpy(index.search(vectors.numpy(), count).keys.astype("int64")).flatten()
        places: Tensor = (keys // store.form.vectors).unique()
        places = places[~torch.isin(places, unused)]
        if len(places) >= k or count >= len(index):
            return places
        count *= 2


def _rescored(store: Store, terms: Sequence[Term], places: Int[Tensor, "C"], k: int) -> Best:
    """One query's candidates by their exact scores."""
    scores = torch.full((1, max(k, len(places))), -torch.inf)
    scores[0, : len(places)] = score(terms, store.pick(places).float())[0]
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    padded = torch.cat([places, torch.full((scores.shape[1] - len(places),), -1)])
    return Best(scores.gather(1, order), padded[order])


def _numbered(store: Store, start: int) -> Iterator[tuple[int, Tensor]]:
    """Rows from `start` on, with the place of the first of each piece."""
    parts = [part for part in store.manifest.parts() if part.start + part.rows > start]
    place = parts[0].start if parts else 0
    for piece in store.read(parts):
        skip = max(0, start - place)
        if skip < len(piece):
            yield place + skip, piece[skip:]
        place += len(piece)


def _known(store: Store) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(store.manifest.meta().get("graph", "{}"))
    return known


def _covered(store: Store) -> int:
    """Places that the graph holds."""
    known = _known(store)
    return int(known["rows"]) if known and (store.folder / known["file"]).is_file() else 0


def _load(store: Store, view: bool) -> Any:
    from usearch.index import Index

    index = Index(
        ndim=store.form.dim,
        metric="ip",
        dtype="f16",
        connectivity=NEIGHBOURS,
        expansion_add=CARE_ADDING,
        expansion_search=CARE_SEARCHING,
        enable_key_lookups=False,
    )
    if _covered(store):
        path = str(store.folder / _known(store)["file"])
        index.view(path) if view else index.load(path)
    return index


def _save(store: Store, index: Any, rows: int) -> None:
    name = f"graph-{rows:012d}.usearch"
    draft = store.folder / f".{name}.tmp"
    index.save(str(draft))
    draft.replace(store.folder / name)
    store.manifest.remember({"graph": json.dumps({"file": name, "rows": rows})})
    for file in store.folder.glob("graph-*.usearch"):
        if file.name != name:
            file.unlink()
