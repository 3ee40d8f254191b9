"""How published systems are used: the authors' own settings for each."""

import pytest

from vlm.model.beam import Beams
from vlm.model.generate import Sampling
from vlm.model.published.usage import usage_of


@pytest.mark.parametrize(
    ("model_type", "language", "captions", "stop"),
    [
        ("blip-2", "opt", Beams(5, 30, 8), ("\n",)),
        ("blip-2", "t5", Beams(5, 30, 8), ()),
        ("instructblip", "llama", Beams(5, 80, 10, repetition_penalty=1.5), ()),
        ("minigpt4", "llama", Sampling(300, 1, 1.0, top_p=0.9, repetition_penalty=1.05), ("###",)),
    ],
)
def test_each_system_s_own(model_type: str, language: str, captions: Beams | Sampling, stop: tuple[str, ...]) -> None:
    usage = usage_of(model_type, language)
    assert (usage.captions, usage.stop) == (captions, stop)
    assert usage.question.count("{}") == 1 and "{" not in usage.caption


def test_short_answers_of_opt_and_t5_differ_in_what_length_costs() -> None:
    opt, t5 = (usage_of("blip-2", language).answers for language in ("opt", "t5"))
    assert isinstance(opt, Beams) and isinstance(t5, Beams)
    assert (opt.length_penalty, t5.length_penalty) == (0.0, -1.0)


def test_another_system_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type='flamingo': known are blip-2, instructblip"):
        usage_of("flamingo", "opt")
