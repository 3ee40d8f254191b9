"""Decoding: greedy against a loop without memory, batches against single rows, sampling against hand-made tables."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.model.small import VOCABULARY, blip2, llava, pictures, texts, words
from vlm.data.batch import Text
from vlm.model.beam import Beams
from vlm.model.generate import Decoding, Sampling, choose, generate, stream
from vlm.model.vlm import Seen, VisionLanguageModel, last_valid
from vlm.nn.state import State

EOS, NEVER = 3, VOCABULARY - 1


def continued(model: VisionLanguageModel, seen: Seen, text: Text, eos: int, sampling: Decoding) -> list[list[int]]:
    with torch.no_grad():
        out = model.write(seen, text)
        logits = model.logits(last_valid(out.hidden, text.valid))
    said = torch.where(text.valid, text.ids, -1)
    return generate(model.proceed, logits, out.state, said, eos, sampling, torch.Generator().manual_seed(0))


@torch.no_grad()
def naive(model: VisionLanguageModel, seen: Seen, prompt: Tensor, eos: int, count: int) -> list[int]:
    """One row, everything computed again for every token."""
    ids = prompt.tolist()
    for _ in range(count):
        best = int(model.logits(model.write(seen, texts([torch.tensor(ids)])).hidden[0, -1]).argmax())
        if best == eos:
            break
        ids.append(best)
    return ids[len(prompt) :]


def prompts(text: Text) -> list[Tensor]:
    return [row[valid] for row, valid in zip(text.ids, text.valid, strict=True)]


@pytest.mark.parametrize("kind", [llava, blip2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_in_batches_of_mixed_lengths_equals_a_loop_over_single_rows(kind: object, side: str) -> None:
    assert callable(kind)
    model: VisionLanguageModel = kind()
    seen, text = model.see(pictures(4)), words(model, [1, 4, 2, 6], side)
    free = continued(model, seen, text, NEVER, Sampling(max_new=8))
    assert len({tuple(row) for row in free}) == 4
    eos = free[1][3]  # a word that one row says in the middle ends it there
    found = continued(model, seen, text, eos, Sampling(max_new=8))
    for row, prompt in enumerate(prompts(text)):
        own = seen.select(torch.tensor([row]))
        assert found[row] == naive(model, own, prompt, eos, 8)
        assert found[row] == continued(model, own, texts([prompt]), eos, Sampling(max_new=8))[0]
    assert len(found[1]) <= 3


def scripted(table: list[list[int]]) -> tuple[Tensor, State, object]:
    """A model that wants to say row b's words one after the other; the state counts them."""

    def logits(t: int) -> Tensor:
        rows = torch.zeros(len(table), 6)
        rows[torch.arange(len(table)), [words_of[min(t, len(words_of) - 1)] for words_of in table]] = 5.0
        return rows

    def step(ids: Tensor, state: State) -> tuple[Tensor, State]:
        asked.append(ids[:, 0].tolist())
        return logits(int(state.position[0])), State((), state.valid, state.position + 1)

    asked: list[list[int]] = []
    step.asked = asked  # type: ignore[attr-defined]
    start = State((), torch.ones(len(table), 1, dtype=torch.bool), torch.ones(len(table), dtype=torch.long))
    return logits(0), start, step


def run(table: list[list[int]], sampling: Sampling) -> tuple[list[list[int]], list[list[int]]]:
    logits, state, step = scripted(table)
    assert callable(step)
    found = generate(step, logits, state, torch.zeros(len(table), 0, dtype=torch.long), EOS, sampling)
    return found, step.asked  # type: ignore[attr-defined]


def test_rows_end_before_their_end_token_and_the_rest_goes_on() -> None:
    found, asked = run([[1, 2, EOS, 4], [EOS], [1, 1, 1, 2, EOS]], Sampling(max_new=9))
    assert found == [[1, 2], [], [1, 1, 1, 2]]
    assert asked == [[1, EOS, 1], [2, EOS, 1], [EOS, EOS, 1], [EOS, EOS, 2]]  # nothing is asked once all have ended


@pytest.mark.parametrize("decoding", [Sampling(max_new=3), Beams(2, max_new=3)])
def test_a_model_that_gives_no_numbers_is_refused(decoding: Decoding) -> None:
    logits, state, step = scripted([[1, 2], [1, EOS]])
    logits[1, 4] = torch.nan
    with pytest.raises(ValueError, match="gives no numbers"):
        generate(step, logits, state, torch.zeros(2, 0, dtype=torch.long), EOS, decoding)


def test_max_new_cuts_without_an_end_token() -> None:
    found, asked = run([[1, 2, 4, 5]], Sampling(max_new=3))
    assert found == [[1, 2, 4]]
    assert len(asked) == 2  # what follows the last token is never computed


def test_min_new_forbids_the_end_token_at_first() -> None:
    found, _ = run([[EOS], [EOS]], Sampling(max_new=5, min_new=2))
    assert found == [[0, 0], [0, 0]]  # the first of the others
    assert run([[EOS]], Sampling(max_new=2, min_new=2))[0] == [[0, 0]]


def test_repetition_penalty_counts_what_was_said_and_prompted() -> None:
    table = [[1], [1]]
    logits, state, step = scripted(table)
    assert callable(step)
    prompt = torch.tensor([[-1, 0, 2, -1], [-1, -1, -1, -1]])
    sampling = Sampling(max_new=3, repetition_penalty=1e9)
    favourite = torch.where(logits > 0, logits, torch.tensor([0.4, 0.0, 0.3, 0.0, 0.2, 0.1]))
    found = generate(step, favourite, state, prompt, 5, Sampling(max_new=1, repetition_penalty=1e9))
    assert found == [[1], [1]]
    found = generate(lambda _ids, now: (favourite, now), favourite, state, prompt, 5, sampling)
    # Row 0 was prompted 0 and 2 (its negative ids take nothing back), so 4 follows; row 1 may say 0 and 2.
    assert found == [[1, 4], [1, 0, 2]]


def shares(logits: Tensor, sampling: Sampling, draws: int = 4000) -> Tensor:
    rows = logits.expand(draws, -1)
    found = choose(rows, torch.zeros_like(rows, dtype=torch.bool), sampling, None, torch.Generator().manual_seed(1))
    return torch.bincount(found, minlength=logits.shape[0]) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.15, 0.5, 0.1, 0.25]),
        (Sampling(temperature=0.5), [0.0225, 0.25, 0.01, 0.0625]),
        (Sampling(temperature=1.0, top_k=2), [0, 0.5, 0, 0.25]),
        (Sampling(temperature=1.0, top_k=1), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, top_k=9), [0.15, 0.5, 0.1, 0.25]),
        (Sampling(temperature=1.0, top_p=0.7), [0, 0.5, 0, 0.25]),
        (Sampling(temperature=1.0, top_p=0.8), [0.15, 0.5, 0, 0.25]),
        (Sampling(temperature=1.0, top_p=0.4), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, top_p=1.0), [0.15, 0.5, 0.1, 0.25]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), [0, 0.5, 0, 0.25]),  # after top_k: 0.56, 0.28, 0.17
        (Sampling(temperature=0.0), [0, 1, 0, 0]),
    ],
)
def test_distributions_by_hand(sampling: Sampling, expected: list[float]) -> None:
    found = shares(torch.tensor([0.15, 0.5, 0.1, 0.25]).log(), sampling)
    wanted = torch.tensor(expected) / sum(expected)
    assert torch.equal(found > 0, wanted > 0)
    assert float((found - wanted).abs().max()) < 0.03


def test_repetition_penalty_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    used = torch.tensor([[True, False, True, False]])
    penalised = Sampling(temperature=1.0, repetition_penalty=2.0)
    rows, marks = logits.expand(8000, -1), used.expand(8000, -1)
    found = choose(rows, marks, penalised, None, torch.Generator().manual_seed(2))
    wanted = torch.tensor([1.0, 1.5, -2.0, -1.5]).softmax(0)
    assert float((torch.bincount(found, minlength=4) / 8000 - wanted).abs().max()) < 0.02
    assert choose(logits, used, Sampling(repetition_penalty=2.0)).tolist() == [1]
    assert choose(logits, used, Sampling()).tolist() == [0]
    assert logits.tolist() == [[2.0, 1.5, -1.0, -1.5]]  # not changed in place


def test_a_forbidden_token_is_never_drawn() -> None:
    rows = torch.zeros(500, 3)
    used = torch.zeros_like(rows, dtype=torch.bool)
    forbidden = torch.tensor([1, 2])
    assert set(choose(rows, used, Sampling(temperature=1.0), forbidden).tolist()) == {0}
    assert rows.sum() == 0


def test_sampled_rows_repeat_with_their_seed() -> None:
    model = llava()
    seen, text = model.see(pictures()), words(model, [2, 3])
    sampling = Sampling(max_new=6, temperature=1.5, top_k=20)
    first, again = (continued(model, seen, text, NEVER, sampling) for _ in range(2))
    assert first == again != continued(model, seen, text, NEVER, Sampling(max_new=6))


def test_permuting_the_batch_permutes_the_texts() -> None:
    model = llava()
    seen, text = model.see(pictures(4)), words(model, [1, 4, 2, 6], "left")
    found = continued(model, seen, text, NEVER, Sampling(max_new=6))
    order = torch.tensor([2, 0, 3, 1])
    assert continued(model, seen.select(order), text.select(order), NEVER, Sampling(max_new=6)) == [
        found[i] for i in order.tolist()
    ]


def test_any_of_several_end_tokens() -> None:
    logits, state, step = scripted([[1, 2, 4, 1], [4, 1], [1, 5, 1]])
    assert callable(step)
    prompt = torch.zeros(3, 0, dtype=torch.long)
    assert generate(step, logits, state, prompt, [4, 5], Sampling(max_new=4)) == [[1, 2], [], [1]]
    assert generate(step, logits, state, prompt, [4, 5], Sampling(max_new=2, min_new=2)) == [[1, 2], [0, 1], [1, 0]]
    with pytest.raises(ValueError, match=r"eos=\[\]: at least one end token"):
        generate(step, logits, state, prompt, [], Sampling())


def test_a_stop_rule_ends_its_row_and_keeps_its_last_token() -> None:
    asked: list[list[int]] = []

    def stop(row: list[int]) -> bool:
        asked.append(list(row))
        return row[-2:] == [2, 4]

    logits, state, step = scripted([[1, 2, 4, 1], [2, EOS], [4, 4, 2, 4]])
    assert callable(step)
    found = generate(step, logits, state, torch.zeros(3, 0, dtype=torch.long), EOS, Sampling(max_new=9), stop=stop)
    assert found == [[1, 2, 4], [2], [4, 4, 2, 4]]
    assert asked == [[1], [2], [4], [1, 2], [4, 4], [1, 2, 4], [4, 4, 2], [4, 4, 2, 4]]  # not once a row has ended


def streamed(table: list[list[int]], sampling: Sampling) -> tuple[Iterator[Tensor], list[list[int]]]:
    logits, state, step = scripted(table)
    assert callable(step)
    tokens = stream(step, logits, state, torch.zeros(len(table), 0, dtype=torch.long), EOS, sampling)
    return tokens, step.asked  # type: ignore[attr-defined]


def test_tokens_come_when_they_are_asked_for() -> None:
    tokens, asked = streamed([[1, 2, EOS], [4, EOS]], Sampling(max_new=9))
    seen = [(next(tokens).tolist(), len(asked)) for _ in range(3)]
    assert seen == [([1, 4], 0), ([2, EOS], 1), ([EOS, EOS], 2)]
    assert list(tokens) == []
    assert len(asked) == 2


def test_the_stream_is_what_generate_gives() -> None:
    table = [[1, 2, 4, EOS], [4, EOS], [1, 1, 1, 1, 1]]
    tokens, _ = streamed(table, Sampling(max_new=4))
    columns = torch.stack(list(tokens), 1).tolist()
    assert [[token for token in row if token != EOS] for row in columns] == run(table, Sampling(max_new=4))[0]


def test_gradients_are_off_inside_and_as_they_were_outside() -> None:
    weight = torch.ones(1, requires_grad=True)
    state = State((), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.long))
    inside: list[bool] = []

    def step(_ids: Tensor, now: State) -> tuple[Tensor, State]:
        inside.append(torch.is_grad_enabled())
        return torch.zeros(1, 6) + weight, now

    prompt = torch.zeros(1, 0, dtype=torch.long)
    for chosen in stream(step, torch.zeros(1, 6) + weight, state, prompt, 5, Sampling(max_new=3)):
        assert torch.is_grad_enabled() and not chosen.requires_grad
    assert inside == [False, False]


def test_another_way_to_decode_fits() -> None:
    class Parrot:
        max_new = 1

        def unroll(self, *_: object) -> list[list[int]]:
            return [[4, 2]]

    assert isinstance(Parrot(), Decoding)
    assert isinstance(Sampling(), Decoding)
    logits, state, step = scripted([[1]])
    assert callable(step)
    assert generate(step, logits, state, torch.zeros(1, 0, dtype=torch.long), EOS, Parrot()) == [[4, 2]]


@pytest.mark.parametrize(
    ("options", "words_of"),
    [
        ({"max_new": 0}, "max_new=0: at least 1"),
        ({"min_new": -1}, "min_new=-1: between 0 and max_new"),
        ({"max_new": 2, "min_new": 3}, "min_new=3: between 0 and max_new"),
        ({"temperature": -0.1}, r"temperature=-0\.1: 0 \(greedy\) or more"),
        ({"top_k": 0}, "top_k=0: at least 1"),
        ({"top_p": 0.0}, "top_p=0.0: above 0, at most 1"),
        ({"top_p": 1.1}, "top_p=1.1: above 0, at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: above 0"),
        ({"top_k": 0, "temperature": -1.0}, "temperature=-1.0.*; top_k=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
    ],
)
def test_values_that_no_decoding_has_are_refused(options: dict[str, float], words_of: str) -> None:
    with pytest.raises(ValueError, match=words_of):
        Sampling(**options)
