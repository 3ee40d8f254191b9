"""Beam search: against a plain loop without memory, against all texts there are, and in batches against single rows."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.model.small import VOCABULARY, blip2, llava, pictures, texts, words
from tests.model.test_generate import continued, prompts
from vlm.data.batch import Text
from vlm.model.beam import Beams, Hypothesis, search
from vlm.model.generate import Decoding, Sampling, Stop
from vlm.model.vlm import Seen, VisionLanguageModel, last_valid
from vlm.nn.state import State

NEVER = VOCABULARY - 1
Scores = Callable[[list[int]], Tensor]


@torch.no_grad()
def found(
    model: VisionLanguageModel, seen: Seen, text: Text, eos: list[int], beams: Beams, stop: Stop | None = None
) -> list[list[Hypothesis]]:
    out = model.write(seen, text)
    logits = model.logits(last_valid(out.hidden, text.valid))
    return search(model.proceed, logits, out.state, torch.where(text.valid, text.ids, -1), eos, beams, stop)


def rescored(model: VisionLanguageModel, seen: Seen, prompt: Tensor) -> Scores:
    """Log-probabilities of what follows one row's prompt and the given tokens, all computed again each time."""

    @torch.no_grad()
    def scores(ids: list[int]) -> Tensor:
        text = texts([torch.cat([prompt, torch.tensor(ids, dtype=torch.long)])])
        return model.logits(model.write(seen, text).hidden[0, -1]).log_softmax(0)

    return scores


def plain(scores: Scores, eos: list[int], beams: Beams) -> list[Hypothesis]:
    """Beam search with lists: all continuations of all beams are sorted, nothing is remembered but the texts."""
    running, done = [Hypothesis([], 0.0)], list[Hypothesis]()
    for made in range(1, beams.max_new + 1):
        longer = [Hypothesis([*ids, t], score + float(s)) for ids, score in running for t, s in enumerate(scores(ids))]
        if made <= beams.min_new:
            longer = [h for h in longer if h.ids[-1] not in eos]
        longer.sort(key=lambda h: -h.score)
        ended = [h for h in longer[: beams.width] if h.ids[-1] in eos or made == beams.max_new]
        done += [Hypothesis(h.ids, h.score / made**beams.length_penalty) for h in ended]
        done = sorted(done, key=lambda h: -h.score)[: beams.width]
        running = [h for h in longer if h.ids[-1] not in eos][: beams.width]
        if len(done) == beams.width and hopeless(running[0].score, done[-1].score, beams, made):
            break
    return [Hypothesis(h.ids[:-1] if h.ids[-1] in eos else h.ids, h.score) for h in done[: beams.returned]]


def hopeless(best: float, worst: float, beams: Beams, made: int) -> bool:
    length = beams.max_new if beams.early_stopping == "never" and beams.length_penalty > 0 else made
    return beams.early_stopping is True or best / length**beams.length_penalty <= worst


def assert_same(ours: list[Hypothesis], theirs: list[Hypothesis]) -> None:
    assert [h.ids for h in ours] == [h.ids for h in theirs]
    assert [h.score for h in ours] == pytest.approx([h.score for h in theirs], rel=1e-4)


@pytest.mark.parametrize("kind", [llava, blip2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_batches_of_mixed_lengths_equal_a_plain_loop_over_single_rows(
    kind: Callable[[], VisionLanguageModel], side: str, early_stopping: object
) -> None:
    model = kind()
    seen, text = model.see(pictures(3)), words(model, [1, 4, 2], side)
    beams = Beams(4, max_new=6, min_new=1, length_penalty=0.7, early_stopping=early_stopping, returned=3)  # type: ignore[arg-type]
    free = found(model, seen, text, [NEVER], replace(beams, min_new=6))
    eos = [free[1][0].ids[2], free[2][0].ids[1]]
    ours = found(model, seen, text, eos, beams)
    for row, prompt in enumerate(prompts(text)):
        own = seen.select(torch.tensor([row]))
        assert_same(ours[row], plain(rescored(model, own, prompt), eos, beams))
        assert_same(ours[row], found(model, own, texts([prompt]), eos, beams)[0])
    assert ours != free
    assert any(len(h.ids) < 6 for row in ours for h in row)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_beams_for_all_find_all_texts_in_order(length_penalty: float) -> None:
    """With a vocabulary of 5 there are 1 + 4 + 4 * 4 * 5 texts of up to 3 tokens."""
    table = torch.randn(6, 6, 6, 5, generator=torch.Generator().manual_seed(3)).log_softmax(3)

    def scores(ids: list[int]) -> Tensor:
        return table[tuple([5] * (3 - len(ids)) + ids)]

    memory: dict[int, list[int]] = {0: []}  # position -> tokens: the state carries nothing but a number

    def walk(ids: Tensor, state: State) -> tuple[Tensor, State]:
        pasts = [memory[int(number)] + [int(token)] for number, token in zip(state.position, ids[:, 0], strict=True)]
        numbers = torch.tensor([len(memory) + i for i in range(len(pasts))])
        memory.update(zip(numbers.tolist(), pasts, strict=True))
        return torch.stack([scores(past) for past in pasts]), State((), torch.ones(len(pasts), 1).bool(), numbers)

    beams = Beams(90, max_new=3, length_penalty=length_penalty, returned=90)
    start = State((), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.long))
    prompt = torch.zeros(1, 0, dtype=torch.long)
    (ours,) = search(walk, scores([])[None], start, prompt, 4, beams)
    said = [[4], *([a, 4] for a in range(4)), *([*ab, c] for ab in product(range(4), repeat=2) for c in range(5))]
    every = [
        Hypothesis(
            [t for t in ids if t != 4],
            float(sum(scores(ids[:n])[t] for n, t in enumerate(ids))) / len(ids) ** length_penalty,
        )
        for ids in said
    ]
    assert len(ours) == 85
    assert_same(ours, sorted(every, key=lambda h: -h.score))


@pytest.mark.parametrize("early_stopping", [True, False])
def test_one_beam_is_greedy(early_stopping: bool) -> None:
    model = llava()
    seen, text = model.see(pictures(4)), words(model, [1, 4, 2, 6], "left")
    eos = continued(model, seen, text, NEVER, Sampling(max_new=8))[1][3]
    for least, penalty in [(0, 1.0), (5, 1.0), (0, 1.5)]:
        greedy = continued(model, seen, text, eos, Sampling(8, least, repetition_penalty=penalty))
        one = Beams(1, 8, least, early_stopping=early_stopping)
        if penalty == 1.0:
            assert continued(model, seen, text, eos, one) == greedy
        else:
            assert continued(model, seen, text, eos, replace(one, repetition_penalty=penalty)) != greedy


def test_permuting_the_batch_permutes_the_texts() -> None:
    model = llava()
    seen, text = model.see(pictures(4)), words(model, [1, 4, 2, 6], "left")
    beams, order = Beams(3, max_new=5, returned=3), torch.tensor([2, 0, 3, 1])
    before = found(model, seen, text, [NEVER], beams)
    after = found(model, seen.select(order), text.select(order), [NEVER], beams)
    for row, old in zip(after, order.tolist(), strict=True):
        assert_same(row, before[old])


def test_the_best_is_what_generate_gives_and_scores_are_sorted() -> None:
    model = llava()
    seen, text = model.see(pictures(2)), words(model, [1, 4])
    beams = Beams(5, max_new=6, returned=5)
    assert isinstance(beams, Decoding)
    rows = found(model, seen, text, [NEVER], beams)
    assert continued(model, seen, text, NEVER, beams) == [row[0].ids for row in rows]
    for row in rows:
        assert [h.score for h in row] == sorted([h.score for h in row], reverse=True)
        assert len({tuple(h.ids) for h in row}) == 5
    assert found(model, seen, text, [NEVER], replace(beams, returned=2)) == [row[:2] for row in rows]


def test_wide_beams_beat_greedy() -> None:
    model = llava()
    seen, text = model.see(pictures(4)), words(model, [1, 4, 2, 6])
    narrow, wide = (found(model, seen, text, [NEVER], Beams(width, max_new=6)) for width in (1, 8))
    gains = [w[0].score - n[0].score for w, n in zip(wide, narrow, strict=True)]
    assert min(gains) > -1e-6 and max(gains) > 0.01


def test_a_stop_rule_ends_texts_and_keeps_their_last_token() -> None:
    model = llava()
    seen, text = model.see(pictures(2)), words(model, [1, 4])
    word = found(model, seen, text, [NEVER], Beams(3, max_new=6, min_new=6))[0][0].ids[2]
    beams = Beams(3, max_new=6, length_penalty=0.0, returned=3)
    rows = found(model, seen, text, [NEVER], beams, lambda row: row[-1] == word)
    for row, other in zip(rows, found(model, seen, text, [NEVER, word], beams), strict=True):
        assert_same([h._replace(ids=h.ids[:-1] if h.ids[-1:] == [word] else h.ids) for h in row], other)
    assert any(h.ids[-1:] == [word] and len(h.ids) < 6 for h in rows[0])


def test_rows_that_go_on_in_order_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    reorder = State.reorder

    def counted(self: State, index: Tensor) -> State:
        calls.append(len(index))
        return reorder(self, index)

    model = llava()
    seen, text = model.see(pictures(2)), words(model, [1, 4])
    with monkeypatch.context() as patch:
        patch.setattr(State, "reorder", counted)
        found(model, seen, text, [NEVER], Beams(1, max_new=6))
        assert calls == []
        found(model, seen, text, [NEVER], Beams(3, max_new=6))
    assert calls[0] == 6 and 1 <= len(calls) <= 5


@pytest.mark.parametrize(
    ("options", "words_of"),
    [
        ({"width": 0}, "width=0: at least 1"),
        ({"max_new": 0}, "max_new=0: at least 1"),
        ({"max_new": 2, "min_new": 3}, "min_new=3: between 0 and max_new"),
        ({"length_penalty": float("nan")}, "length_penalty=nan: a finite number"),
        ({"length_penalty": float("inf")}, "length_penalty=inf"),
        ({"early_stopping": "always"}, "early_stopping='always': True, False or 'never'"),
        ({"returned": 0}, "returned=0: between 1 and width"),
        ({"width": 2, "returned": 3}, "returned=3: between 1 and width"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: above 0"),
        ({"width": 0, "max_new": 0}, "width=0: at least 1; max_new=0"),
    ],
)
def test_values_that_no_search_has_are_refused(options: dict[str, object], words_of: str) -> None:
    if options.get("early_stopping"):  # the type checker of these tests would come first
        with pytest.raises(Exception, match="early_stopping"):
            Beams(4, **options)  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=words_of):
        Beams(**{"width": 4, **options})  # type: ignore[arg-type]
