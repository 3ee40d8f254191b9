"""One stage-1 step (ITC + ITM + LM, forward and backward) of our Q-Former beside transformers' pieces; same losses.

The image encoder is frozen in both and left out: its features are given.
    python -m tests.bench.stage1_step
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.bench.side_by_side import alternate, switched, table
from tests.bench.stage1_peer import EMBED, HEADS, LAYERS, QUERIES, VOCABULARY, WIDTH, Peer
from vlm.data.batch import Batch, Text
from vlm.data.image import ImageTransform
from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.blip2 import qformer_table
from vlm.nn.backend import bfloat16_is_fast, fast_float32, onednn_is_exact
from vlm.train.task import Itc, Itm, Lm, Task

BATCH, LENGTH, TOKENS, IMAGE_WIDTH, DEC = 4, 32, 257, 1024, 3


class Given(nn.Module):
    """Stands where the frozen encoder is: hands the features on."""

    transform = ImageTransform((224, 224), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    dim, tokens = IMAGE_WIDTH, TOKENS

    def forward(self, images: Tensor) -> Tensor:
        return images


def ours(peer: Peer) -> Task:
    """Our task with the peer's weights."""
    qformer = QFormer(IMAGE_WIDTH, WIDTH, LAYERS, HEADS, QUERIES, text=TextBranch(VOCABULARY, WIDTH, 512), eps=1e-12)
    model = VisionLanguageModel(
        Given(), qformer, contrast=ContrastiveHead(WIDTH, WIDTH, EMBED, bias=True), match=MatchingHead(WIDTH)
    )
    published = {
        k: v for k, v in peer.state_dict().items() if k.startswith(("qformer.", "embeddings.", "query_tokens"))
    }
    weights = {f"connector.{name}": value for name, value in qformer_table().to_ours(published).items()}
    heads = {
        "image_proj": "contrast.image",
        "text_proj": "contrast.text",
        "itm_head": "match.classify",
        "lm_head": "connector.text.head",
    }
    for theirs, mine in heads.items():
        for part in ("weight", "bias"):
            weights[f"{mine}.{part}"] = peer.state_dict()[f"{theirs}.{part}"]
    weights["contrast.log_scale"] = peer.log_scale.detach()
    model.load_state_dict(weights)
    return Task(model, [Itc(), Itm(), Lm(VOCABULARY, DEC)])


def batch(image: Tensor, ids: Tensor) -> Batch:
    """One full-length caption per image."""
    labels = ids.clone()
    labels[:, 0] = -100
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool), labels)
    names = [str(i) for i in range(BATCH)]
    return Batch(names, image, names, torch.arange(BATCH), names, text, None, torch.eye(BATCH, dtype=torch.bool))


def step(module: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()

    return run


def hardest(weight: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Stands for torch.multinomial: the same negatives on both sides, so that the losses can be compared."""
    return weight.argmax(1, keepdim=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.multinomial = hardest
    peer = Peer(IMAGE_WIDTH).train()
    task = ours(peer).train()
    image, ids = torch.randn(BATCH, TOKENS, IMAGE_WIDTH), torch.randint(5, VOCABULARY, (BATCH, LENGTH))
    given = batch(image, ids)
    with torch.no_grad():
        theirs, mine = peer(image, ids, DEC), task(given).each
    for name, value in theirs.items():
        print(f"  {name}: transformers {value:.6f}, ours {mine[name]:.6f}")
        assert abs(float(value - mine[name])) < 1e-4, name

    def peer_loss() -> Tensor:
        return torch.stack(list(peer(image, ids, DEC).values())).sum()

    def our_loss() -> Tensor:
        return task(given).total

    candidates = {"transformers fp32": step(peer, peer_loss), "ours fp32": step(task, our_loss)}
    if onednn_is_exact():
        candidates["transformers fp32, oneDNN switch"] = switched(step(peer, peer_loss), fast_float32)
        candidates["ours fp32, oneDNN switch (as shipped)"] = switched(step(task, our_loss), fast_float32)
    if bfloat16_is_fast(torch.device("cpu")):
        candidates["transformers autocast bf16"] = step(peer, peer_loss, torch.bfloat16)
        candidates["ours autocast bf16"] = step(task, our_loss, torch.bfloat16)
    seconds = alternate(candidates)
    table(f"stage-1 step, batch {BATCH}, {TOKENS} x {IMAGE_WIDTH} features", seconds, "transformers fp32")


if __name__ == "__main__":
    main()
