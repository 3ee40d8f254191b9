"""How published systems are used: the authors' own settings for each."""

import pytest

from vlm.model.beam import Beams
from vlm.model.generate import Sampling
from vlm.model.published.usage import as_said, usage_of


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


@pytest.mark.parametrize(
    ("said", "captions"),
    [
        ({}, Beams(5, 30, 8)),
        ({"eos_token_id": 2, "max_length": 20, "temperature": 0.3, "top_p": None}, Beams(5, 30, 8)),
        ({"num_beams": 3, "length_penalty": -1, "early_stopping": True}, Beams(3, 30, 8, -1.0, early_stopping=True)),
        ({"max_new_tokens": 5}, Beams(5, 5, 5)),
        ({"num_beams": 1, "repetition_penalty": 1.5}, Sampling(30, 8, repetition_penalty=1.5)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(30, 8, 0.6, 50, 0.9)),
        ({"do_sample": True, "top_k": 0}, Sampling(30, 8, 1.0)),
        ({"do_sample": False, "temperature": 0.6}, Beams(5, 30, 8)),
    ],
)
def test_what_a_generation_config_says(said: dict[str, object], captions: Beams | Sampling) -> None:
    assert as_said(usage_of("blip-2", "opt"), said, "generation_config.json").captions == captions


@pytest.mark.parametrize("said", [{"num_beams": "3"}, {"top_p": True}, {"max_new_tokens": 2.5}])
def test_what_is_no_number(said: dict[str, object]) -> None:
    name, value = next(iter(said.items()))
    with pytest.raises(ValueError, match=rf"^g\.json: {name}={value!r}: a (whole )?number; correct the file, or take"):
        as_said(usage_of("blip-2", "opt"), said, "g.json")


def test_what_is_drawn_stays_drawn_unless_said_otherwise() -> None:
    usage = usage_of("minigpt4", "llama")
    found = as_said(usage, {"temperature": 0.5, "max_new_tokens": 9}, "generation_config.json").captions
    assert found == Sampling(9, 1, 0.5, None, 0.9, 1.05)
    assert as_said(usage, {"do_sample": False}, "generation_config.json").captions == Sampling(
        300, 1, repetition_penalty=1.05
    )


def test_short_answers_of_opt_and_t5_differ_in_what_length_costs() -> None:
    opt, t5 = (usage_of("blip-2", language).answers for language in ("opt", "t5"))
    assert isinstance(opt, Beams) and isinstance(t5, Beams)
    assert (opt.length_penalty, t5.length_penalty) == (0.0, -1.0)


def test_another_system_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type='flamingo': known are blip-2, instructblip"):
        usage_of("flamingo", "opt")
