"""Padding and the matrix of positives by hand and against a naive loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.batch import collate, pad
from vlm.data.shards import Sample
from vlm.data.text import Encoded, Tokenizer, train_bpe
from vlm.nn.tokens import IGNORE, IMAGE_ID


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["a fox", "a bird"] * 3, 270)


def _sample(key: str, captions: list[str], id: str = "", known: tuple[str, ...] = ()) -> Sample:
    pixels = torch.full((3, 2, 2), len(key), dtype=torch.uint8)
    return Sample(key, id or key, pixels, captions, frozenset(known))


def test_pad_by_hand() -> None:
    texts = [Encoded([5, 6], [IGNORE, 6]), Encoded([7], [7]), Encoded([], [])]
    right, left = pad(texts, 0), pad(texts, 0, "left")
    assert right.ids.tolist() == [[5, 6], [7, 0], [0, 0]] and left.ids.tolist() == [[5, 6], [0, 7], [0, 0]]
    assert right.valid.tolist() == [[True, True], [True, False], [False, False]]
    assert left.valid.tolist() == [[True, True], [False, True], [False, False]]
    assert right.labels.tolist() == [[IGNORE, 6], [7, IGNORE], [IGNORE, IGNORE]]
    assert right.ids.dtype == right.labels.dtype == torch.int64
    assert pad([], 0).ids.shape == (0, 0)


def test_batch_by_hand(bpe: Tokenizer) -> None:
    samples = [_sample("a", ["a fox", "a bird"]), _sample("b", ["a fox"]), _sample("c", ["bird"], id="a")]
    batch = collate(samples, bpe, 16, "{image}{text}", 2)
    assert batch.keys == ["a", "b", "c"] and batch.image_ids == ["a", "b", "a"]
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (3, 3, 2, 2)
    assert batch.strings == ["a fox", "a bird", "a fox", "bird"] and batch.owner.tolist() == [0, 0, 1, 2]
    assert batch.positive.int().tolist() == [[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 1]]
    fox = bpe.encode("a fox")
    assert batch.captions.ids[2, : len(fox) + 2].tolist() == [bpe.bos, *fox, bpe.eos]
    assert batch.prompts is not None
    assert batch.prompts.ids[2, : len(fox) + 4].tolist() == [bpe.bos, IMAGE_ID, IMAGE_ID, *fox, bpe.eos]
    assert collate(samples, bpe, 16, None, 2).prompts is None


def test_a_caption_that_was_not_drawn_is_still_true(bpe: Tokenizer) -> None:
    samples = [_sample("a", ["a fox"], known=("a fox", "a bird")), _sample("b", ["a bird"], known=("a bird",))]
    assert collate(samples, bpe, 16, None, 0).positive.int().tolist() == [[1, 1], [0, 1]]


WORDS = st.sampled_from(["a", "b", "c", "d"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, max_size=2)), min_size=1, max_size=6
    )
)
def test_positive_equals_a_naive_loop(bpe: Tokenizer, records: list[tuple[str, list[str], list[str]]]) -> None:
    samples = [_sample(f"k{i}", own, id, tuple(more)) for i, (id, own, more) in enumerate(records)]
    batch = collate(samples, bpe, 8, None, 0)
    for b, sample in enumerate(samples):
        for m, text in enumerate(batch.strings):
            same = samples[int(batch.owner[m])].id == sample.id
            assert bool(batch.positive[b, m]) == (same or text in sample.captions or text in sample.known)


def test_nothing_to_learn_is_an_error(bpe: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no caption in a batch of 1 samples"):
        collate([_sample("a", [])], bpe, 16, None, 0)


def test_to_keeps_everything(bpe: Tokenizer) -> None:
    batch = collate([_sample("a", ["a fox"])], bpe, 16, "{text}", 0)
    moved = batch.to("meta")
    assert moved.strings == batch.strings and moved.prompts is not None
    tensors = [moved.images, moved.owner, moved.positive, moved.captions.ids, moved.prompts.labels]
    assert all(tensor.device.type == "meta" for tensor in tensors)
