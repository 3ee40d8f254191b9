"""What cannot be asked for is refused by the name of its option."""

from pathlib import Path
from typing import Any

import pytest

from vlm.captioning.wishes import Words, Work


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beams": 5, "temperature": 0.7}, "--beams 5 with --temperature 0.7: beams are not drawn; give one of them"),
        ({"beams": 2, "captions": 3}, "--num-captions 3 of --beams 2: at most as many as there are beams"),
        ({"captions": 0}, "--num-captions 0: at least 1"),
        ({"beams": 0}, "--beams 0: at least 1"),
        ({"length_penalty": 0.5}, "--length-penalty 0.5 without --beams: lengths are compared among beams alone"),
        ({"length_penalty": float("nan"), "beams": 2}, "--length-penalty nan: a finite number"),
        ({"top_k": 5}, "--top-k 5 without --temperature: nothing is drawn; give a temperature above 0 too"),
        ({"top_p": 0.5}, "--top-p 0.5 without --temperature: nothing is drawn; give a temperature above 0 too"),
        ({"temperature": float("nan")}, "--temperature nan: 0 (the likeliest word) or more"),
        ({"max_new": 3, "min_new": 4}, "--min-new 4: at least 0, at most --max-new"),
        ({"no_repeat_ngram": -1}, "--no-repeat-ngram -1: 0 (off) or more"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0: above 0"),
    ],
)
def test_words(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Words(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"format": "sidecar", "output": Path("o")},
            "--output o with --format sidecar: captions go beside their pictures",
        ),
        ({"skip_existing": True}, "--skip-existing without --output FILE or --format sidecar: standard output keeps"),
        ({"overwrite": True}, "--overwrite without --output FILE or --format sidecar"),
        ({"output": Path("o"), "skip_existing": True, "overwrite": True}, "--skip-existing with --overwrite: what is"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"workers": 0}, "--workers 0: at least 1"),
        ({"watch": Path("nowhere")}, "--watch nowhere: no such folder"),
        ({"dtype": "int8"}, "--dtype int8: no such type; there are auto, float32, bfloat16, float16"),
    ],
)
def test_work(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Work(**given)
    assert str(caught.value).startswith(message)
