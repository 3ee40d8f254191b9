"""ITM re-ranking beside the plain loop that encodes the picture for every pair: a model like BLIP-2's stage 1.

    python -m tests.bench.rerank

A ViT-B/16 of timm and a Q-Former of a quarter of its width at random weights: for one pair the encoder computes some
60 times what the Q-Former does, as in BLIP-2 (ViT-g, BERT-base). Both sides decode the same pictures beforehand.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import webdataset as wds
from torch import Tensor

from tests.bench.dataload import photographs
from tests.bench.side_by_side import alternate, switched, table
from vlm.data.batch import Batch, Text
from vlm.data.loader import Loader
from vlm.data.shards import Shards
from vlm.data.text import train_bpe
from vlm.eval.features import Features, extract, match_pairs
from vlm.eval.retrieval import rerank
from vlm.loss.contrastive import inverse_temperature
from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.vision import timm_encoder
from vlm.model.vlm import VisionLanguageModel, need
from vlm.nn.backend import fast_float32

PICTURES, CAPTIONS, BATCH, K = 12, 5, 4, 8
ENCODER, WIDTH, LAYERS, QUERIES = "vit_base_patch16_224", 192, 12, 32
PLAIN = 8  # pairs that the plain loop is timed on
WORDS = [
    "a",
    "photo",
    "of",
    "one",
    "small",
    "red",
    "green",
    "blue",
    "round",
    "old",
    "new",
    "cat",
    "dog",
    "car",
    "cup",
    "tree",
    "house",
    "street",
    "on",
    "under",
    "beside",
    "the",
]


def stage1(vocabulary: int) -> VisionLanguageModel:
    """Encoder, Q-Former with a text branch, both heads."""
    vision = timm_encoder(ENCODER, frozen=True)
    qformer = QFormer(vision.dim, WIDTH, LAYERS, WIDTH // 64, QUERIES, text=TextBranch(vocabulary, WIDTH, 64))
    heads = ContrastiveHead(WIDTH, WIDTH, 128), MatchingHead(WIDTH)
    return VisionLanguageModel(vision, qformer, contrast=heads[0], match=heads[1]).eval()


def pictures(folder: Path) -> tuple[Shards, list[str]]:
    """JPEGs with five captions of about ten words each."""
    choice = torch.Generator().manual_seed(0)
    texts = []
    with wds.TarWriter(str(folder / "pictures.tar")) as tar:
        for i, file in enumerate(photographs(PICTURES)):
            rows = torch.randint(len(WORDS), (CAPTIONS, 10), generator=choice).tolist()
            captions = [" ".join(WORDS[word] for word in row) for row in rows]
            tar.write({"__key__": f"{i:04d}", "jpg": file, "json": {"captions": captions}})
            texts += captions
    return Shards(str(folder / "pictures.tar"), caption="json:captions"), texts


class Given:
    """Normalised pictures and the ids of their texts, in memory."""

    def __init__(self, loader: Loader) -> None:
        self.batches: list[Batch] = [batch.to(torch.device("cpu")) for batch in loader.once()]
        self.pixels = torch.cat([batch.pixels for batch in self.batches])
        self.words = [
            row[valid] for b in self.batches for row, valid in zip(b.captions.ids, b.captions.valid, strict=True)
        ]


def one_pair(model: VisionLanguageModel, pixels: Tensor, words: Tensor) -> Tensor:
    """The ITM probability of a picture and a text, from scratch."""
    text = Text(words[None], torch.ones(1, len(words), dtype=torch.bool), torch.full((1, len(words)), -100))
    return model.match_logits(model.see(pixels[None]), text).softmax(1)[0, 1]


def check(model: VisionLanguageModel, features: Features, given: Given) -> None:
    """Both sides give the same score, less the contrastive logit that `match_pairs` adds."""
    image, text = torch.tensor([0, 0, 3, 7]), torch.tensor([1, 40, 2, 59])
    cosine = torch.einsum("pqe,pe->pq", features.image[image], features.text[text]).amax(1)
    scale = inverse_temperature(need(model.contrast, "contrastive head").log_scale)
    mine = match_pairs(model, features, image, text) - cosine * scale
    theirs = torch.stack([one_pair(model, given.pixels[i], given.words[t]) for i, t in zip(image, text, strict=True)])
    difference = float((mine - theirs).abs().max())
    print(f"  largest difference of a score: {difference:.1e}")
    assert difference < 1e-4


def candidates(model: VisionLanguageModel, given: Given, features: Features) -> dict[str, Callable[[], object]]:
    """Ours as a whole, encoding the pictures included; the plain loop on so many pairs that it can be scaled."""

    def match(image: Tensor, text: Tensor) -> Tensor:
        return match_pairs(model, features, image, text)

    def encode() -> None:
        for pixels in given.pixels.split(BATCH):
            model.see(pixels)

    def ours() -> None:
        encode()
        rerank(features.image, features.text, features.image_ids, features.text_ids, match, K)

    def plain() -> None:
        for i in range(PLAIN):
            one_pair(model, given.pixels[i % PICTURES], given.words[7 * i])

    return {"plain": switched(plain, fast_float32), "ours": switched(ours, fast_float32)}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        source, texts = pictures(Path(folder))
        tokenizer = train_bpe(texts, 400)
        model = stage1(tokenizer.size)
        transform = need(model.vision, "image encoder").transform
        loader = Loader(
            source, transform, tokenizer, BATCH, max_tokens=32, template=None, image_tokens=0, captions_per_image=0
        )
        given, start = Given(loader), time.process_time()
        features = extract(model, loader, keep_tokens=True)
        print(f"  features of {PICTURES} pictures, decoding included: {time.process_time() - start:.1f} s")
    asked: list[Tensor] = []
    rerank(
        features.image,
        features.text,
        features.image_ids,
        features.text_ids,
        lambda image, text: (asked.append(image), torch.rand(len(image)))[1],
        K,
    )
    pairs = sum(len(part) for part in asked)
    check(model, features, given)
    seconds = alternate(candidates(model, given, features), rounds=2)
    seconds = {
        "plain loop, a pair at a time, scaled": [t * pairs / PLAIN for t in seconds["plain"]],
        f"ours: {PICTURES} pictures encoded, {pairs} pairs": seconds["ours"],
    }
    table(f"ITM of the best {K}, {PICTURES} pictures, {len(given.words)} captions", seconds, next(iter(seconds)))


if __name__ == "__main__":
    main()
