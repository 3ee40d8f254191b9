"""Search of a million pictures beside one matrix-vector product in memory; an update beside indexing all anew.

    python -m tests.bench.search [search] [many] [update] [graph]

The vectors are random: time does not depend on them. Ours lie on the disk (in its cache) as fp16, those of the products
in memory as fp32: they are the floor of what has to be read. graph, which has to be named: 1,100,000 vectors that vary
in 32 directions and a little in all, as those of pictures do; usearch's graph of them is made (minutes), and what it
finds is compared with the exact search.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tests.bench.side_by_side import alternate, peak_memory, table
from tests.tiny import picture, tiny_run
from vlm.search import graph
from vlm.search.exact import Term, search
from vlm.search.manifest import create, opened
from vlm.search.store import Form, Store
from vlm.search.update import Options, index
from vlm.train.run import train_run

PICTURES, DIM, TOP = 1_000_000, 512, 10
FILES, CHANGED = 5000, 50
PART, LARGE, ASKED = 50_000, 1_100_000, 50


def vectors(seed: int, count: int) -> Tensor:
    """Random unit vectors."""
    made = torch.randn(count, 1, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=-1)


def like_pictures(seed: int, count: int) -> Tensor:
    """Unit vectors near a space of 32 dimensions."""
    axes = torch.randn(32, DIM, generator=torch.Generator().manual_seed(10**6))
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(count, 1, 32, generator=generator) @ axes
    return torch.nn.functional.normalize(made + torch.randn(count, 1, DIM, generator=generator), dim=-1)


@contextmanager
def stored(folder: Path, count: int = PICTURES, of: Callable[[int, int], Tensor] = vectors) -> Iterator[Store]:
    """An index of `count` vectors, made in parts."""
    create(folder, {})
    with opened(folder, write=True) as manifest:
        store = Store(folder, manifest, Form(1, DIM, "float16"))
        for seed in range(count // PART):
            part, instead = store.append(of(seed, PART))
            manifest.add_part(part, instead)
            store.remove(instead)
        yield store


def in_memory(store: Store) -> Tensor:
    """The same vectors as fp32."""
    memory, first = torch.empty(PICTURES, DIM), 0
    for piece in store.read(store.manifest.parts()):
        memory[first : first + len(piece)] = piece[:, 0]
        first += len(piece)
    return memory


def ours(store: Store, queries: Tensor) -> object:
    """What `vlm search` does once it has vectors of its queries."""
    none = torch.tensor([], dtype=torch.long)
    return search([Term(queries)], store.read(store.manifest.parts()), TOP, none)


def bench_search(folder: Path) -> None:
    """One query."""
    with stored(folder) as store:
        _bench_search(store)


def _bench_search(store: Store) -> None:
    one = vectors(100, 1)
    print(f"a search raises memory by {peak_memory(lambda: ours(store, one)):.0f} MiB")
    memory = in_memory(store)
    array, query = memory.numpy(), one[0, 0]
    floor = "numpy, product alone, fp32 in memory"
    candidates = {
        floor: lambda: array @ query.numpy(),
        "torch, product alone, fp32 in memory": lambda: memory @ query,
        "vlm, from fp16 on the disk": lambda: ours(store, one),
    }
    ratios = table(f"{PICTURES:,} x {DIM}, one query, best {TOP}", alternate(candidates, rounds=5), floor)
    print(f"  vlm takes {1 / ratios['vlm, from fp16 on the disk']:.2f} of the time of numpy's product")


def bench_many(folder: Path) -> None:
    """64 queries in one pass."""
    with stored(folder) as store:
        _bench_many(store)


def _bench_many(store: Store) -> None:
    many = vectors(101, 64)
    print(f"a search of 64 queries raises memory by {peak_memory(lambda: ours(store, many)):.0f} MiB")
    memory = in_memory(store)
    candidates = {"torch, product alone": lambda: memory @ many[:, 0].T, "vlm": lambda: ours(store, many)}
    table("64 queries together", alternate(candidates, rounds=3), "torch, product alone")


def bench_graph(folder: Path) -> None:
    """More vectors than are looked at one by one: by all threads; then queries, each alone, by one."""
    with stored(folder, LARGE, like_pictures) as store:
        torch.set_num_threads(os.cpu_count() or 1)
        start = time.perf_counter()
        graph.extend(store)
        print(f"graph of {LARGE:,} x {DIM}: {(time.perf_counter() - start) / 60:.1f} min")
        torch.set_num_threads(1)
        _bench_graph(store)


def _bench_graph(store: Store) -> None:
    none = torch.tensor([], dtype=torch.long)
    queries = like_pictures(10**7, ASKED)

    def proposed() -> list[set[int]]:
        found = [graph.propose(store, [Term(one[None])], TOP, none) for one in queries]
        return [set(best.places[0].tolist()) for best in found]

    def exact() -> list[set[int]]:
        return [
            set(row) for row in search([Term(queries)], store.read(store.manifest.parts()), TOP, none).places.tolist()
        ]

    both = list(zip(proposed(), exact(), strict=True))
    print(f"  of the best {TOP} it finds {sum(len(mine & best) for mine, best in both) / len(both) / TOP:.4f}")
    first = [Term(queries[:1])]
    candidates: dict[str, Callable[[], object]] = {
        "exact": lambda: ours(store, queries[:1]),
        "graph, opened for each query": lambda: graph.propose(store, first, TOP, none),
    }
    table("one query", alternate(candidates, rounds=5), "exact")


def photographs(folder: Path) -> None:
    """FILES different pictures, older than the times that are not trusted."""
    folder.mkdir()
    for number in range(FILES):
        change(folder, number, 0)


def change(folder: Path, number: int, turn: int) -> None:
    """Another picture under the name."""
    colour = f"#{(number * 2654435761 + turn * 97) % 2**24:06x}"
    path = folder / f"{number:05d}.png"
    path.write_bytes(picture(colour, 64))
    os.utime(path, (10**9 + turn, 10**9 + turn))


def bench_update(folder: Path) -> None:
    """Everything, then one in a hundred changed, then nothing; processor time of all threads."""
    train_run(tiny_run(folder, "clip"), folder / "clip")
    photographs(folder / "pictures")

    def seconds(*, model: str | None = None) -> float:
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        assert index([folder / "pictures"] if model else [], folder / "index", Options(model))
        after = resource.getrusage(resource.RUSAGE_SELF)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"    {spent:.2f} s of processor, {time.perf_counter() - start:.2f} s by the clock", file=sys.stderr)
        return spent

    whole = seconds(model=str(folder / "clip"))
    rounds = list[float]()
    for turn in range(1, 4):
        for number in range(0, FILES, FILES // CHANGED):
            change(folder / "pictures", number, turn)
        rounds.append(seconds())
    some, nothing = sorted(rounds)[1], seconds()
    print(
        f"\n{FILES} pictures: all {whole:.2f} s, {CHANGED} changed {some:.2f} s = {some / whole:.3f} of it, "
        f"nothing changed {nothing:.2f} s = {nothing / whole:.3f}"
    )


SECTIONS = {"search": bench_search, "many": bench_many, "update": bench_update, "graph": bench_graph}


def main() -> None:
    """What the arguments name; all but the graph without any."""
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("search", "many", "update"):
        with tempfile.TemporaryDirectory() as folder:
            SECTIONS[name](Path(folder))


if __name__ == "__main__":
    main()
