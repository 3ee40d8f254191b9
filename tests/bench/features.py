"""Training from kept features: a whole step beside transformers' with its encoder, and epochs with and without one.

    python -m tests.bench.features [step] [epoch]

Weights and features are random: time does not depend on them. Our side reads its features from shards on the disk.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
import webdataset as wds
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.bench.dataload import photographs
from tests.bench.side_by_side import alternate, table
from tests.bench.stage1_peer import EMBED, HEADS, LAYERS, QUERIES, VOCABULARY, WIDTH, Peer
from vlm.data.batch import Batch
from vlm.data.features import SUFFIX, FeatureInfo, FeatureShards, Transform
from vlm.data.image import ImageTransform
from vlm.data.loader import Loader
from vlm.data.pictures import Pictures
from vlm.data.shards import Shards
from vlm.data.tars import Tars
from vlm.data.text import Tokenizer, train_bpe
from vlm.model.connector import MlpConnector
from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.language import llama
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.vision import open_clip_encoder
from vlm.model.vlm import VisionLanguageModel
from vlm.train.loop import one_step
from vlm.train.parallel import Passes
from vlm.train.task import Itc, Itm, Lm, Task

BATCH, LENGTH, PICTURES = 8, 32, 32
CAPTION = " ".join(f"word{i}" for i in range(40))  # longer than LENGTH in any tokenizer: every text is full
ENCODERS = {"ViT-L/14": (24, 1024, 16, 14, "ViT-L-14"), "ViT-B/16": (12, 768, 12, 16, "ViT-B-16")}
BFLOAT16 = torch.bfloat16


class Given(nn.Module):
    """Stands where the frozen encoder is: it is never called."""

    transform = ImageTransform((224, 224), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens, self.dim = tokens, dim

    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError("the features are kept")


def kept(folder: Path, tokens: int, dim: int) -> FeatureShards:
    """Shards of random features in float16, as `vlm shards features` lays them."""
    info = FeatureInfo(tokens, dim, "float16", "", "", "")
    folder.mkdir()
    tars = Tars(folder, PICTURES, 2**30)
    beside = f'{{"key": "k", "picture": "KEY", "captions": ["{CAPTION}"]}}'
    for i in range(PICTURES):
        row = info.write(torch.randn(tokens, dim, generator=torch.Generator().manual_seed(i)))
        tars.add(f"{i:04d}", {SUFFIX: row, "json": beside.replace("KEY", str(i)).encode()})
    tars.close()
    return FeatureShards(folder, info, 0.0)


def loader(source: Pictures, transform: Transform, tokenizer: Tokenizer, template: str | None, tokens: int) -> Loader:
    """As training reads."""
    return Loader(source, transform, tokenizer, BATCH, max_tokens=LENGTH, template=template, image_tokens=tokens)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """The same for both sides."""
    return torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=1e-4, fused=True)


# --- a step of BLIP-2's stage 1 --------------------------------------------------------------------------------------


def their_step(layers: int, width: int, heads: int, patch: int, encoder: bool) -> Callable[[], None]:
    """Encoder in evaluation mode without gradients, the losses, clipping and Adam, all in float32, as users get it."""
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=224, patch_size=patch,
    )  # fmt: skip
    vision = CLIPVisionModel(config).eval().requires_grad_(False) if encoder else None
    peer = Peer(width).train()
    optimizer = adam(peer)
    pixels, ids = torch.randn(BATCH, 3, 224, 224), torch.randint(5, VOCABULARY, (BATCH, LENGTH))
    features = torch.randn(BATCH, (224 // patch) ** 2 + 1, width)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            image = features if vision is None else vision(pixels).last_hidden_state
        torch.stack(list(peer(image, ids, 3).values())).sum().backward()
        nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()

    return run


def our_step(source: FeatureShards, tokenizer: Tokenizer) -> Callable[[], None]:
    """Reading, the losses, clipping and Adam."""
    tokens, dim = source.info.tokens, source.info.dim
    qformer = QFormer(dim, WIDTH, LAYERS, HEADS, QUERIES, text=TextBranch(VOCABULARY, WIDTH, 512), eps=1e-12)
    heads = ContrastiveHead(WIDTH, WIDTH, EMBED, bias=True), MatchingHead(WIDTH)
    model = VisionLanguageModel(Given(tokens, dim), qformer, contrast=heads[0], match=heads[1])
    task = Task(model, [Itc(), Itm(), Lm(VOCABULARY, tokenizer.dec)]).train()
    optimizer = adam(task)
    passes = Passes(task, BFLOAT16)
    batches = loader(source, source.info, tokenizer, None, 0).train(count())

    def run() -> None:
        batch = next(batches)
        assert batch.captions.full and batch.captions.ids.shape == (BATCH, LENGTH)
        one_step(passes, [batch.to("cpu")], [0], optimizer, 1.0)

    return run


def step(name: str, folder: Path, tokenizer: Tokenizer) -> None:
    """Ours from kept features in bf16 beside theirs in float32 with and without the encoder."""
    layers, width, heads, patch, _ = ENCODERS[name]
    source = kept(folder, (224 // patch) ** 2 + 1, width)
    seconds = alternate(
        {
            "transformers fp32, pictures": their_step(layers, width, heads, patch, encoder=True),
            "transformers fp32, features in memory": their_step(layers, width, heads, patch, encoder=False),
            "ours bf16, features from shards": our_step(source, tokenizer),
        },
        rounds=3,
    )
    table(f"stage-1 step with Adam, batch {BATCH}, {name}", seconds, "transformers fp32, pictures")


# --- epochs of an MLP adapter ----------------------------------------------------------------------------------------


def adapter(encoder: nn.Module, tokens: int, dim: int, tokenizer: Tokenizer) -> Task:
    """Encoder, MLP, a decoder of the size of configs/tiny/adapter.yaml; the encoder is frozen."""
    language = llama(tokenizer.size, 128, layers=3, heads=4)
    model = VisionLanguageModel(encoder, MlpConnector(dim, 128, tokens), language=language)
    return Task(model, [Lm(tokenizer.size, tokenizer.dec)]).train()


def epoch(task: Task, batches: Callable[[], Iterator[Batch]]) -> Callable[[], None]:
    """All pictures once."""
    optimizer, passes = adam(task), Passes(task, BFLOAT16)

    def run() -> None:
        stream = batches()
        for _ in range(PICTURES // BATCH):
            one_step(passes, [next(stream).to("cpu")], [0], optimizer, 1.0)

    return run


def pictures(folder: Path) -> Shards:
    """JPEGs of 640 x 480 with captions."""
    with wds.TarWriter(str(folder / "pictures.tar")) as tar:
        for i, file in enumerate(photographs(PICTURES)):
            tar.write({"__key__": f"{i:04d}", "jpg": file, "txt": CAPTION})
    return Shards(str(folder / "pictures.tar"))


def epochs(name: str, folder: Path, tokenizer: Tokenizer, source: Shards) -> None:
    """From pictures, from kept features, from features that are in memory as finished batches."""
    encoder = open_clip_encoder(ENCODERS[name][4], frozen=True)
    task = adapter(encoder, encoder.tokens, encoder.dim, tokenizer)
    wanted = tokenizer, "{image} {text}", encoder.tokens
    features = kept(folder, encoder.tokens, encoder.dim)
    stored = loader(features, features.info, *wanted)
    finished = [batch for batch, _ in zip(stored.train(count()), range(PICTURES // BATCH), strict=False)]
    run = {
        "kept features": epoch(task, lambda: stored.train(count())),
        "features in memory": epoch(task, lambda: iter(finished)),
        "pictures": epoch(task, lambda: loader(source, encoder.transform, *wanted).train(count())),
    }
    near = alternate({key: run[key] for key in ("features in memory", "kept features")}, rounds=9)
    table(f"MLP adapter, epoch of {PICTURES}, {encoder.tokens} x {encoder.dim} of {name}", near, "features in memory")
    table(f"the same, {name}", alternate({k: run[k] for k in ("pictures", "kept features")}, rounds=3), "pictures")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = train_bpe([CAPTION], 300)
    sections = sys.argv[1:] or ["step", "epoch"]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if "step" in sections:
            for number, encoder in enumerate(ENCODERS):
                step(encoder, place / f"step{number}", tokenizer)
        if "epoch" in sections:
            source = pictures(place)
            for number, encoder in enumerate(ENCODERS):
                epochs(encoder, place / f"epoch{number}", tokenizer, source)


if __name__ == "__main__":
    main()
