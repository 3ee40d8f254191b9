"""Search over parts on the disk equals one sorted product, whatever the pieces; the graph finds nearly all of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm.search import graph
from vlm.search import store as store_module
from vlm.search.exact import Best, Term, merge, score, search
from vlm.search.manifest import Found, Manifest, create, opened
from vlm.search.store import Form, Store


def unit(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=-1)


def brute(terms: list[Term], rows: Tensor, k: int, unused: Tensor) -> Best:
    """One number after the other."""
    queries = len(terms[0].vectors)
    scores = torch.zeros(queries, len(rows))
    for s in range(queries):
        for r in range(len(rows)):
            for term in terms:
                best = [max(float(v @ w) for w in rows[r]) for v in term.vectors[s]]
                scores[s, r] += term.weight * sum(best) / len(best)
    scores[:, unused] = -torch.inf
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return Best(scores.gather(1, order), order)


@given(
    rows=st.integers(1, 40),
    vectors=st.integers(1, 3),
    queries=st.integers(1, 3),
    shown=st.integers(0, 2),
    k=st.integers(1, 50),
    piece=st.integers(1, 15),
    seed=st.integers(0, 100),
)
def test_equals_brute_force(rows: int, vectors: int, queries: int, shown: int, k: int, piece: int, seed: int) -> None:
    held = unit(rows, vectors, 6, seed=seed)
    terms = [Term(unit(queries, 1, 6, seed=seed + 1), 0.3 if shown else 1.0)]
    terms += [Term(unit(queries, shown, 6, seed=seed + 2), 0.7)] if shown else []
    unused = torch.arange(rows)[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.2]
    found = search(terms, iter(held.split(piece)), k, unused)
    wanted = brute(terms, held, k, unused)
    assert found.scores.shape == wanted.scores.shape
    finite = wanted.scores.isfinite()
    assert torch.equal(found.scores.isfinite(), finite)
    assert torch.allclose(found.scores[finite], wanted.scores[finite], atol=1e-6)
    assert torch.equal(found.places[finite], wanted.places[finite])


def test_equal_scores_are_different_places() -> None:
    rows = torch.ones(30, 1, 4)
    found = search([Term(torch.ones(2, 1, 4))], iter(rows.split(4)), 29, torch.tensor([1]))
    assert [sorted(places) for places in found.places.tolist()] == [[0, *range(2, 30)]] * 2


def test_merge_keeps_the_best_of_both() -> None:
    left = Best(torch.tensor([[3.0, 1.0]]), torch.tensor([[7, 8]]))
    right = Best(torch.tensor([[3.0, 2.0]]), torch.tensor([[1, 2]]))
    assert merge(left, right, 3).places.tolist() == [[7, 1, 2]]


# --- on the disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path: Path) -> Iterator[Manifest]:
    create(tmp_path, {})
    with opened(tmp_path, write=True) as manifest:
        yield manifest


def fill(store: Store, rows: Tensor, first: int = 0) -> None:
    """Rows with a file each, as an update puts them there."""
    part, instead = store.append(rows)
    manifest = store.manifest
    manifest.set_folders([b"folder"])
    with manifest.transaction():
        manifest.add_part(part, instead)
        for place in range(first, first + len(rows)):
            digest = place.to_bytes(32, "big")
            manifest.add_content(digest, place, None)
            content = manifest.content(digest)
            assert content is not None
            manifest.put_file(Found(1, b"%08d.png" % place, 1, 1), content.id)
    store.remove(instead)


def test_parts_are_joined_and_give_back_what_was_put_in(tmp_path: Path, manifest: Manifest) -> None:
    store, rows = Store(tmp_path, manifest, Form(2, 8, "float32")), unit(64, 2, 8)
    for first in range(64):
        fill(store, rows[first : first + 1], first)
    assert [part.rows for part in manifest.parts()] == [64]
    fill(store, rows[:16], 64)
    fill(store, rows[:1], 80)
    assert [(part.start, part.rows) for part in manifest.parts()] == [(0, 64), (64, 16), (80, 1)]
    for piece in (1, 200, 2**20):
        read = torch.cat([part.clone() for part in store.read(manifest.parts(), piece)])
        assert torch.equal(read, torch.cat([rows, rows[:16], rows[:1]]))
    assert len(list(tmp_path.glob("vectors-*"))) == 3
    assert torch.equal(store.pick(torch.tensor([0, 63, 64, 80])), torch.stack([rows[0], rows[63], rows[0], rows[0]]))


def test_a_part_has_a_largest_size(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 4 * 8 * 10)
    store = Store(tmp_path, manifest, Form(1, 8, "float32"))
    for first in range(25):
        fill(store, unit(1, 1, 8, seed=first), first)
    assert all(part.rows <= 10 for part in manifest.parts()) and store.rows() == 25


def test_cleared_up_without_a_change_of_what_is_left(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PART_BYTES", 2 * 8 * 7)
    store, rows = Store(tmp_path, manifest, Form(1, 8, "float16")), unit(20, 1, 8)
    for first in range(0, 20, 5):
        fill(store, rows[first : first + 5], first)
    manifest.begin_scan()
    kept = [place for place in range(20) if place % 3]
    for place in kept:
        manifest.scanned(Found(1, b"%08d.png" % place, 1, 1))
    assert manifest.todo()[0] == 0 and manifest.forget_gone() == 7
    assert manifest.unused() == list(range(0, 20, 3))
    before = search([Term(rows[:1])], store.read(manifest.parts()), 20, torch.tensor(manifest.unused()))
    names = [manifest.files_at(place) for place in before.places[0].tolist()[:13]]
    assert store.clear_up()
    assert store.rows() == 13 and manifest.unused() == []
    after = search([Term(rows[:1])], store.read(manifest.parts()), 20, torch.tensor([], dtype=torch.long))
    assert torch.equal(after.scores, before.scores[:, :13])
    assert [manifest.files_at(place) for place in after.places[0].tolist()] == names
    assert {path.name for path in tmp_path.glob("vectors-*")} == {part.name for part in manifest.parts()}


def test_few_unused_ones_stay(tmp_path: Path, manifest: Manifest) -> None:
    store = Store(tmp_path, manifest, Form(1, 8, "float16"))
    fill(store, unit(20, 1, 8))
    manifest.begin_scan()
    for place in range(1, 20):
        manifest.scanned(Found(1, b"%08d.png" % place, 1, 1))
    manifest.forget_gone()
    assert not store.clear_up() and store.rows() == 20


def test_float16_costs_next_to_no_recall(tmp_path: Path, manifest: Manifest) -> None:
    rows, queries = unit(4000, 1, 64), unit(50, 1, 64, seed=1)
    store = Store(tmp_path, manifest, Form(1, 64, "float16"))
    fill(store, rows)
    none = torch.tensor([], dtype=torch.long)
    half = search([Term(queries)], store.read(manifest.parts()), 10, none)
    full = search([Term(queries)], iter([rows]), 10, none)
    assert (half.scores - full.scores).abs().max() < 3e-4
    same = torch.tensor([len(set(a) & set(b)) for a, b in zip(half.places.tolist(), full.places.tolist(), strict=True)])
    assert same.float().mean() / 10 > 0.995


# --- the graph -------------------------------------------------------------------------------------------------------


def clusters(count: int, vectors: int, dim: int, seed: int) -> Tensor:
    """Vectors around 100 centres, as pictures lie."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(100, dim, generator=torch.Generator().manual_seed(99))
    chosen = centres[torch.randint(100, (count, vectors), generator=generator)]
    return torch.nn.functional.normalize(chosen + 0.7 * torch.randn(chosen.shape, generator=generator), dim=-1)


@pytest.mark.parametrize("vectors", [1, 2])
def test_the_graph_finds_what_exact_search_finds(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, vectors: int
) -> None:
    pytest.importorskip("usearch")
    monkeypatch.setattr(graph, "EXACT", 1000)
    store = Store(tmp_path, manifest, Form(vectors, 32, "float16"))
    fill(store, clusters(3000, vectors, 32, 0))
    graph.extend(store)
    fill(store, clusters(400, vectors, 32, 1), 3000)  # not in the graph: searched exactly
    unused = torch.arange(0, 3400, 7)
    terms = [Term(clusters(30, 1, 32, 2), 0.5), Term(clusters(30, vectors, 32, 3), 0.5)]
    near = graph.propose(store, terms, 10, unused)
    exact = search(terms, store.read(manifest.parts()), 10, unused)
    hits = [len(set(a) & set(b)) for a, b in zip(near.places.tolist(), exact.places.tolist(), strict=True)]
    assert sum(hits) / 300 >= 0.95
    assert not set(unused.tolist()) & set(near.places.flatten().tolist())
    rows = torch.cat([piece.float() for piece in store.read(manifest.parts())])
    assert torch.allclose(near.scores, score(terms, rows).gather(1, near.places), atol=1e-6)  # scores are exact
    graph.extend(store)
    assert [file.name for file in tmp_path.glob("graph-*")] == ["graph-000000003400.usearch"]
    single = [Term(clusters(30, 1, 32, 2))]
    one, all_of_them = (
        graph.propose(store, single, 10, unused),
        search(single, store.read(manifest.parts()), 10, unused),
    )
    hits = [len(set(a) & set(b)) for a, b in zip(one.places.tolist(), all_of_them.places.tolist(), strict=True)]
    assert sum(hits) / 300 >= 0.97


def test_more_asked_for_than_there_is(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch")
    monkeypatch.setattr(graph, "EXACT", 10)
    store = Store(tmp_path, manifest, Form(1, 8, "float32"))
    fill(store, unit(40, 1, 8))
    graph.extend(store)
    found = graph.propose(store, [Term(unit(1, 1, 8, seed=5))], 100, torch.arange(30))
    assert int(found.scores.isfinite().sum()) == 10
    assert set(found.places[0, :10].tolist()) == set(range(30, 40))


def test_a_large_index_without_its_graph(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graph, "EXACT", 10)
    store = Store(tmp_path, manifest, Form(1, 8, "float32"))
    fill(store, unit(40, 1, 8))
    query, none = [Term(unit(1, 1, 8))], torch.tensor([], dtype=torch.long)
    monkeypatch.setattr(graph, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="its graph is not made yet: run vlm index"):
        graph.propose(store, query, 3, none)
    monkeypatch.setattr(graph, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"40 vectors, more than 10: pip install 'vlm\[search\]'"):
        graph.propose(store, query, 3, none)
    graph.extend(store)
    assert capsys.readouterr().err == (
        f"{tmp_path}: more than 10 vectors: vlm search needs --exact, or pip install 'vlm[search]'\n"
    )
