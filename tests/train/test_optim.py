"""Patterns to parameter groups: every mistake at once, and nothing changed by a refusal; the schedule by hand."""

import itertools
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vlm.train.optim import Rule, Schedule, assign, make_optimizer, set_rate, table


def model() -> nn.Module:
    parts = {"vision": nn.Linear(2, 3), "connector": nn.Linear(3, 2), "head": nn.Linear(2, 2, bias=False)}
    return nn.ModuleDict(parts)


def mistakes(rules: list[Rule], frozen: tuple[str, ...] = ()) -> list[str]:
    """The lines of the refusal, which must leave every parameter as it was."""
    net = model()
    net["head"].weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    with pytest.raises(ValueError, match=r"train\.params: ") as caught:
        assign(net, rules, frozen)
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == before
    return str(caught.value).splitlines()


def test_the_first_match_decides() -> None:
    net = model()
    decided = assign(net, [Rule(r".*\.bias", 1e-2, 0.0), Rule("vision.*", None, 0.1), Rule(".*", 1e-3, 0.1)])
    assert {name: rule.lr for name, rule in decided.items()} == {
        "vision.bias": 1e-2,
        "connector.weight": 1e-3,
        "connector.bias": 1e-2,
        "head.weight": 1e-3,
    }
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["vision.weight"]


def test_a_pattern_is_about_the_whole_name() -> None:
    assert len(mistakes([Rule("vision", 1e-3, 0.0)])) == 6  # no part alone, and all five parameters are left


def test_table_in_the_order_of_the_model() -> None:
    net = model()
    decided = assign(net, [Rule("vision.*", None, 0.0), Rule(".*", 1e-3, 0.0)])
    lines = [(line.part, line.match, line.lr, line.tensors, line.parameters) for line in table(net, decided)]
    assert lines == [("vision", "–", None, 2, 9), ("connector", ".*", 1e-3, 2, 8), ("head", ".*", 1e-3, 1, 4)]


def test_a_part_frozen_by_its_own_setting_stays_frozen() -> None:
    net = model()
    decided = assign(net, [Rule(".*", 1e-3, 0.0)], ["vision"])
    assert set(decided) == {"connector.weight", "connector.bias", "head.weight"}
    assert not net["vision"].weight.requires_grad


def test_every_mistake_at_once() -> None:
    rules = [Rule("vison.*", 1e-3, 0.0), Rule("vision.*", 1e-3, 0.0), Rule("connector.weight", 1e-3, 0.0)]
    assert mistakes(rules, ("vision",)) == [
        "train.params: 'vison.*' matches no parameter that an earlier pattern left over",
        "train.params: 'vision.*' gives a rate to parts frozen by their own setting",
        "train.params: no pattern matches connector.bias; end the list with {match: '.*', lr: null}",
        "train.params: no pattern matches head.weight; end the list with {match: '.*', lr: null}",
    ]


def test_unreadable_patterns_are_named_beside_the_other_mistakes() -> None:
    # What only the unreadable ones might have matched is not called unmatched.
    assert mistakes([Rule("(", 1e-3, 0.0), Rule("x.*", 1e-3, 0.0), Rule("*", 1e-3, 0.0)]) == [
        "train.params: '(' is not a regular expression (missing ), unterminated subpattern at position 0)",
        "train.params: '*' is not a regular expression (nothing to repeat at position 0)",
        "train.params: 'x.*' matches no parameter that an earlier pattern left over",
    ]


def test_a_pattern_after_a_catch_all_matches_nothing() -> None:
    (line,) = mistakes([Rule(".*", 1e-3, 0.0), Rule("head.*", 1e-2, 0.0)])
    assert line == "train.params: 'head.*' matches no parameter that an earlier pattern left over"


def test_everything_frozen() -> None:
    assert mistakes([Rule(".*", None, 0.0)]) == [
        "train.params: every parameter is frozen, so there is nothing to train"
    ]


def test_long_lists_are_cut() -> None:
    net = nn.ModuleDict({f"p{i}": nn.Linear(1, 1) for i in range(8)})
    with pytest.raises(ValueError, match=r"and 7 more$") as caught:
        assign(net, [Rule("nothing", 1e-3, 0.0)])
    assert len(str(caught.value).splitlines()) == 11


def test_single_vectors_are_not_decayed() -> None:
    net = model()
    optimizer = make_optimizer(net, assign(net, [Rule("head.*", 1e-2, 0.3), Rule(".*", 1e-3, 0.1)]), (0.9, 0.98))
    found = {
        name: (group["lr"], group["peak_lr"], group["weight_decay"])
        for name, parameter in net.named_parameters()
        for group in optimizer.param_groups
        if any(parameter is other for other in group["params"])
    }
    plain, bias = (1e-3, 1e-3, 0.1), (1e-3, 1e-3, 0.0)
    assert found == {
        "vision.weight": plain,
        "vision.bias": bias,
        "connector.weight": plain,
        "connector.bias": bias,
        "head.weight": (1e-2, 1e-2, 0.3),
    }


def adapted() -> nn.Module:
    """Parts of which one holds adapters, by peft's names."""
    net = model()
    half = nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)})
    query = nn.ModuleDict({"base_layer": nn.Linear(2, 2, bias=False), "lora_A": half, "lora_B": deepcopy(half)})
    net.add_module("language", nn.ModuleDict({"query": query, "norm": nn.LayerNorm(2)}))
    return net


DOWN, UP = (f"language.query.lora_{half}.default.weight" for half in "AB")
BASE, GAIN = "language.query.base_layer.weight", "language.norm.weight"


@pytest.mark.parametrize("match", [".*", "language.*", ".*weight"])
def test_a_pattern_that_matches_adapters_means_them_alone(match: str) -> None:
    net = adapted()
    decided = assign(net, [Rule(match, 1e-3, 0.1), Rule(".*", None, 0.1)][: 1 + (match != ".*")])
    assert {name for name in decided if name.startswith("language")} == {DOWN, UP}
    assert ("head.weight" in decided) == (match != "language.*")
    assert {name for name, p in net.named_parameters() if p.requires_grad} == set(decided)


def test_what_stands_beside_adapters_learns_by_a_pattern_of_its_own() -> None:
    decided = assign(adapted(), [Rule(r".*norm.*|.*base_layer.*", 1e-4, 0.1), Rule(".*", 1e-3, 0.1)])
    assert {name: rule.lr for name, rule in decided.items() if name in (BASE, GAIN, DOWN)} == {
        BASE: 1e-4,
        GAIN: 1e-4,
        DOWN: 1e-3,
    }
    decided = assign(adapted(), [Rule(r".*lora_.*", 1e-3, 0.1), Rule("language.*", 1e-5, 0.1), Rule(".*", None, 0.1)])
    assert (decided[DOWN].lr, decided[BASE].lr) == (1e-3, 1e-5)


def test_adapters_learn_in_a_frozen_part() -> None:
    decided = assign(adapted(), [Rule(".*", 1e-3, 0.1)], ["language"])
    assert {name for name in decided if name.startswith("language")} == {DOWN, UP}
    decided = assign(adapted(), [Rule("language.*", 1e-3, 0.1), Rule(".*", None, 0.1)], ["language"])
    assert set(decided) == {DOWN, UP}


def test_adapters_that_never_learn() -> None:
    with pytest.raises(
        ValueError, match=r"no adapter of model\.lora has a rate; put \{match: '\.\*lora_\.\*', lr: …\}"
    ):
        assign(adapted(), [Rule("head.*", 1e-3, 0.1), Rule(".*", None, 0.1)])


@pytest.mark.parametrize(("match", "asked"), [(".*", False), (".*lora_[AB].*", True)])
def test_muon_takes_adapters_only_if_asked(match: str, asked: bool) -> None:
    net = adapted()
    decided = assign(net, [Rule(match, 1e-3, 0.1, muon=0.02), Rule(".*", 1e-3, 0.1)][: 1 + asked])
    groups = make_optimizer(net, decided, (0.9, 0.98)).param_groups
    found = [group for group in groups if any(p is net.get_parameter(DOWN) for p in group["params"])]
    assert [group["peak_lr"] for group in found] == [0.02 if asked else 1e-3]
    assert [group["weight_decay"] for group in found] == [0.1]


def test_only_matrices_shrink_without_a_gradient() -> None:
    net = model()
    optimizer = make_optimizer(net, assign(net, [Rule(".*", 0.1, 0.5)]), (0.9, 0.98))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if parameter.ndim > 1 else 1.0))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1 / 5), (3, 4 / 5), (4, 1.0), (8, 0.1 + 0.9 * 0.5), (12, 0.1), (20, 0.1)],
)
def test_rate_by_hand(step: int, expected: float) -> None:
    assert Schedule(warmup=4, final=0.1)(step, 12) == pytest.approx(expected)


def test_rate_without_warmup_starts_at_the_peak() -> None:
    assert Schedule()(0, 10) == 1.0
    assert Schedule()(9, 10) > 0


@given(st.integers(1, 300), st.data())
def test_rate_rises_then_falls(steps: int, data: st.DataObject) -> None:
    warmup, final = data.draw(st.integers(0, steps - 1)), data.draw(st.floats(0, 1))
    rates = [Schedule(warmup, final)(step, steps) for step in range(steps)]
    assert all(before < after for before, after in itertools.pairwise(rates[: warmup + 1]))
    assert all(before >= after for before, after in itertools.pairwise(rates[warmup:]))
    assert rates[warmup] == 1.0
    assert all(0 < value <= 1 for value in rates)


def test_what_learns_is_not_kept_in_half_precision() -> None:
    model = nn.ModuleDict({"language": nn.Linear(2, 2).bfloat16(), "connector": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"^model\.language\.dtype: for weights that do not learn"):
        assign(model, [Rule(".*", 1e-3, 0.0)])
    learns = assign(model, [Rule("language.*", None, 0.0), Rule(".*", 1e-3, 0.0)])
    assert set(learns) == {"connector.weight", "connector.bias"}


def test_other_curves_and_drops_by_hand() -> None:
    linear = Schedule(warmup=2, final=0.2, curve="linear")
    assert [linear(step, 10) for step in (2, 6, 10)] == pytest.approx([1.0, 0.6, 0.2])
    steps = Schedule(curve="constant", drops={0.8: 0.316, 0.9: 0.5})
    assert [steps(step, 10) for step in (0, 7, 8, 9)] == pytest.approx([1.0, 1.0, 0.316, 0.158])


def test_set_rate_keeps_the_ratio_of_groups() -> None:
    net = model()
    optimizer = make_optimizer(net, assign(net, [Rule("head.*", 1e-2, 0.0), Rule(".*", 1e-3, 0.0)]), (0.9, 0.98))
    set_rate(optimizer, 0.5)
    set_rate(optimizer, 0.1)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([1e-4, 1e-3])
