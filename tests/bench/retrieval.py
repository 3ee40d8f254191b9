"""Recall both ways beside CLIP_benchmark, faiss and one matrix product: time, memory, the recalls.

    python -m tests.bench.retrieval [coco] [large] [shuffled] [q-former]

coco: 5,000 images x 25,000 captions x 512. large: a slice of 100,000 images x 500,000 captions. Products are fp32 with
the oneDNN switch wherever torch makes them. Peers: pip install clip-benchmark faiss-cpu; one that is not there is left
out, in words.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.bench.side_by_side import alternate, peak_memory, switched, table
from vlm.eval.names import clip_benchmark_retrieval
from vlm.eval.retrieval import _Pool, rank_counts, summarize
from vlm.nn.backend import fast_float32

WIDTH, CAPTIONS, KS = 512, 5, (1, 5, 10)
ROWS = 256  # of each direction that CLIP_benchmark is timed on; its time grows with their number
SLICE = 2048  # captions of the large set that are timed
FLOOR = "one matrix product, in parts"
Recalls = Mapping[str, float]


def there(package: str, pip: str) -> bool:
    """Is the peer installed? Says how to, if not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{package} is left out; to have it here: pip install {pip}")
    return found


def data(images: int, texts: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images and of captions that lie near theirs, and the image of each caption."""
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(images, WIDTH, generator=generator), dim=-1)
    owner = torch.arange(images).repeat_interleave(CAPTIONS)[:texts]
    text = torch.empty(len(owner), WIDTH)
    for part in torch.arange(len(owner)).split(4096):  # no second copy of large sets
        noise = 0.28 * torch.randn(len(part), WIDTH, generator=generator)
        text[part] = normalize(image[owner[part]] + noise, dim=-1)
    return image, text, owner


def ours(image: Tensor, text: Tensor, owner: Tensor) -> Recalls:
    """Exact ranks in both directions."""
    return clip_benchmark_retrieval(summarize(rank_counts(image[:, None], text, torch.arange(len(image)), owner), KS))


def product(image: Tensor, text: Tensor) -> Callable[[], None]:
    """All with all once, in parts that stay in the cache, kept nowhere."""

    def run() -> None:
        for part in text.split(512):
            for block in image.split(8192):
                part @ block.T

    return run


def faiss_flat(image: Tensor, text: Tensor, owner: Tensor) -> Recalls:
    """Exact search, one index a direction; at one thread, like everything here."""
    import faiss

    faiss.omp_set_num_threads(1)
    images, texts, found = faiss.IndexFlatIP(WIDTH), faiss.IndexFlatIP(WIDTH), dict[str, float]()
    images.add(image.numpy())
    texts.add(text.numpy())
    hits = {
        "image": images.search(text.numpy(), max(KS))[1] == owner.numpy()[:, None],
        "text": owner.numpy()[texts.search(image.numpy(), max(KS))[1]] == np.arange(len(image))[:, None],
    }
    for way, hit in hits.items():
        found |= {f"{way}_retrieval_recall@{k}": float(hit[:, :k].any(1).mean()) for k in KS}
    return found


class ClipBenchmark:
    """Its own functions; timed on some rows, as its whole evaluation takes minutes."""

    def __init__(self, image: Tensor, text: Tensor, owner: Tensor) -> None:
        self.image, self.text, self.owner = image, text, owner

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Scores of all with all, and which of them are positive."""
        scores = self.text @ self.image.T
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[torch.arange(len(scores)), self.owner] = True
        return scores, positive

    def recalls(self, scores: Tensor, positive: Tensor, rows: int | None = None) -> Recalls:
        """Of the first `rows` queries of each direction, in its batches of 64."""
        from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

        ways = {"image": (scores, positive), "text": (scores.T, positive.T)}
        return {
            f"{way}_retrieval_recall@{k}": (batchify(recall_at_k, one[:rows], same[:rows], 64, "cpu", k=k) > 0)
            .float()
            .mean()
            .item()
            for way, (one, same) in ways.items()
            for k in KS
        }

    def seconds(self) -> float:
        """Of all rows: both directions measured on ROWS of them, scaled."""
        scores, positive = self.pairs()
        ways = {"image": (scores, positive), "text": (scores.T, positive.T)}
        total = min(alternate({"pairs": switched(self.pairs, fast_float32)}, rounds=2)["pairs"])
        for one, same in ways.values():
            part = ClipBenchmark.one_way(one[:ROWS], same[:ROWS])
            total += min(alternate({"": part}, rounds=1)[""]) * len(one) / ROWS
        return total

    @staticmethod
    def one_way(scores: Tensor, positive: Tensor) -> Callable[[], None]:
        """One direction for all k."""
        from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

        def run() -> None:
            for k in KS:
                batchify(recall_at_k, scores, positive, 64, "cpu", k=k)

        return run


def same(name: str, theirs: Recalls, mine: Recalls, queries: int) -> None:
    """Identical, but for queries that hang on a difference below fp32's rounding: those are ties to us, so misses."""
    apart = {key: round((theirs[key] - value) * queries) for key, value in mine.items()}
    assert all(0 <= count <= queries / 10_000 for count in apart.values()), (theirs, mine)
    others = ", ".join(f"{key} {count} of {queries} queries" for key, count in apart.items() if count)
    print(f"  recalls beside {name}: " + (f"identical but for {others}" if others else "identical"))


def coco(shuffled: bool = False) -> None:
    """The size of COCO's test set; `shuffled`: images and captions in any order."""
    image, text, owner = data(5000)
    if shuffled:
        rows, columns = torch.randperm(len(image)), torch.randperm(len(text))
        image, text, owner = image[rows], text[columns], rows.argsort()[owner[columns]]
    candidates: dict[str, Callable[[], object]] = {
        FLOOR: switched(product(image, text), fast_float32),
        "ours, both ways": lambda: ours(image, text, owner),
    }
    if there("faiss", "faiss-cpu"):
        candidates["faiss IndexFlatIP, both ways"] = lambda: faiss_flat(image, text, owner)
        same("faiss", faiss_flat(image, text, owner), ours(image, text, owner), len(text))
    seconds = alternate(candidates, rounds=3)
    title = "5,000 x 25,000 x 512" + (", shuffled" if shuffled else "")
    ratios = table(title, seconds, FLOOR)
    print(f"  ours / the product: {1 / ratios['ours, both ways']:.2f}")
    if there("clip_benchmark", "clip-benchmark") and not shuffled:
        whole, mine = ClipBenchmark(image, text, owner).seconds(), min(seconds["ours, both ways"])
        print(f"  CLIP_benchmark (scaled from {ROWS} rows a way): {whole:.1f} s, {whole / mine:.0f} times ours")
        small = image[:500], text[:2500], owner[:2500]
        peer = ClipBenchmark(*small)
        same("CLIP_benchmark on 500 images", peer.recalls(*peer.pairs()), ours(*small), 2500)
    print(f"  peak above the inputs: {peak_memory(candidates['ours, both ways']):.0f} MiB")


def large() -> None:
    """All images by a slice of the captions, counted in both directions; set-up and bars of that slice included."""
    image, text, owner = data(100_000)
    part = text[:SLICE]
    with fast_float32():
        pool = _Pool(image[:, None], text, torch.arange(len(image)), owner, 1024)
        bars = pool.bars()

    def counted() -> None:
        t2i, i2t = (torch.zeros_like(bar, dtype=torch.float64) for bar in bars)
        for start in range(0, SLICE, pool.columns):
            columns = slice(start, start + pool.columns)
            pool.count(columns, bars, t2i[columns], i2t)

    candidates: dict[str, Callable[[], object]] = {
        FLOOR: switched(product(image, part), fast_float32),
        "ours, both ways": switched(counted, fast_float32),
        "ours, bars of all captions": switched(pool.bars, fast_float32),
    }
    if there("faiss", "faiss-cpu"):
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(WIDTH)
        index.add(image.numpy())
        candidates["faiss IndexFlatIP, text to image alone"] = lambda: index.search(part.numpy(), max(KS))
    seconds = alternate(candidates, rounds=2)
    table(f"{SLICE} of 500,000 captions x 100,000 images x 512", seconds, FLOOR)
    parts = len(text) / SLICE
    whole = {name: min(times) * (1 if "bars" in name else parts) / 60 for name, times in seconds.items()}
    whole["ours, both ways"] += whole.pop("ours, bars of all captions")
    for name, minutes in whole.items():
        print(f"  all captions: {name:42s} {minutes:5.1f} min, {minutes / whole[FLOOR]:.2f} of the product")
    peak = peak_memory(candidates["ours, both ways"])
    print(f"  peak above the inputs: {peak:.0f} MiB, ranks and bars of all included")


def q_former() -> None:
    """32 vectors an image, of which a caption is near to one: a maximum over them, then as before."""
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(1000, 32, 256, generator=generator), dim=-1)
    owner, flat = torch.arange(1000).repeat_interleave(CAPTIONS), image.flatten(0, 1)
    like = image[owner, torch.randint(32, (len(owner),), generator=generator)]
    text = normalize(like + 0.15 * torch.randn(len(owner), 256, generator=generator), dim=-1)
    candidates: dict[str, Callable[[], object]] = {
        FLOOR: switched(product(flat, text), fast_float32),
        "ours, both ways": lambda: rank_counts(image, text, torch.arange(1000), owner),
    }
    table("1,000 x 32 x 5,000 x 256", alternate(candidates, rounds=5), FLOOR)
    print(f"  peak above the inputs: {peak_memory(candidates['ours, both ways']):.0f} MiB")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    sections = {"coco": coco, "large": large, "shuffled": lambda: coco(shuffled=True), "q-former": q_former}
    for name in sys.argv[1:] or sections:
        sections[name]()


if __name__ == "__main__":
    main()
