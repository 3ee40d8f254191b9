"""Small models with random weights, and texts for them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.parity.noise import noise
from vlm.data.batch import Text
from vlm.data.image import ImageTransform
from vlm.model.connector import MlpConnector
from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.language import llama
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.seq2seq import t5
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.ffn import GatedMlp
from vlm.nn.tokens import IGNORE, IMAGE_ID

VOCABULARY, WIDTH, QUERIES, PATCHES, LONGEST = 40, 24, 3, 4, 16


class Eye(nn.Module):
    """Patches of 4 by 4 of images of 8 by 8."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 10, 4, 4)
        self.transform = ImageTransform((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.tokens, self.dim = PATCHES, 10

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.patches(images)
        return rows.flatten(2).transpose(1, 2)


def qformer(text: bool = True, out_dim: int | None = None) -> QFormer:
    branch = TextBranch(VOCABULARY, WIDTH, LONGEST) if text else None
    return QFormer(10, WIDTH, layers=3, heads=4, queries=QUERIES, hidden=32, text=branch, out_dim=out_dim)


def finished(model: VisionLanguageModel) -> VisionLanguageModel:
    noise(model, scale=0.3)
    return model.eval()


def llava() -> VisionLanguageModel:
    language = llama(VOCABULARY, WIDTH, layers=2, heads=4, kv_heads=2)
    return finished(VisionLanguageModel(Eye(), MlpConnector(10, WIDTH, PATCHES), language=language))


def seq2seq() -> VisionLanguageModel:
    """An encoder-decoder whose answers start with token 2."""
    language = t5(
        VOCABULARY, WIDTH, 2, 3, head_dim=5, ffn=lambda: GatedMlp(WIDTH, 32), tied=False, buckets=8, longest=9, start=2
    )
    return finished(VisionLanguageModel(Eye(), MlpConnector(10, WIDTH, PATCHES), language=language))


def blip2() -> VisionLanguageModel:
    contrast, match = ContrastiveHead(WIDTH, WIDTH, 8), MatchingHead(WIDTH)
    return finished(VisionLanguageModel(Eye(), qformer(), contrast=contrast, match=match))


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def words(model: VisionLanguageModel, lengths: list[int], side: str = "right", seed: int = 6) -> Text:
    """Rows of random words, each after the image's placeholders where the model wants them, one word before them."""
    maker = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        drawn = torch.randint(0, VOCABULARY, (length,), generator=maker)
        rows.append(torch.cat([drawn[:1], torch.full((model.image_tokens,), IMAGE_ID), drawn[1:]]))
    return texts(rows, side)


def asked(text: Text, replies: list[list[int]]) -> Text:
    """The text with a reply of each row, padded on the right."""
    return replace(text, reply=texts([torch.tensor(row) for row in replies]))


def texts(rows: list[Tensor], side: str = "right") -> Text:
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    valid = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, columns], valid[i, columns] = row, True
    return Text(ids, valid, ids.masked_fill(~valid | (ids == IMAGE_ID), IGNORE))
