"""What CLIP_benchmark and torchmetrics say about one small data set; run it where both are installed to make it anew.

pip install clip-benchmark==1.6.2 torchmetrics==1.9.0 && python -m tests.eval.golden_retrieval
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

KEPT = Path(__file__).with_suffix(".json")
KS = (1, 5, 10)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts, and of each text its image: one to seven captions an image, in no order, no ties."""
    maker = np.random.RandomState(6)  # numpy keeps this stream for ever
    owner = np.repeat(np.arange(50), maker.randint(1, 8, 50))
    maker.shuffle(owner)
    image = maker.standard_normal((50, 16))
    text = image[owner] + 1.6 * maker.standard_normal((len(owner), 16))
    return torch.tensor(image).float(), torch.tensor(text).float(), torch.tensor(owner)


def main() -> None:
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR

    image, text, owner = data()
    scores = text @ image.T
    positive = owner[:, None] == torch.arange(len(image))
    found: dict[str, dict[str, float]] = {"clip_benchmark": {}, "torchmetrics": {}}
    for way, (one, same) in {"image": (scores, positive), "text": (scores.T, positive.T)}.items():
        for k in KS:
            hits = batchify(recall_at_k, one, same, 16, "cpu", k=k) > 0
            found["clip_benchmark"][f"{way}_retrieval_recall@{k}"] = hits.double().mean().item()
        query = torch.arange(len(one))[:, None].expand(one.shape)
        above = one - one.min() + 1  # torchmetrics takes what scores 0 or less for a miss
        for name, metric in {f"hit@{k}": RetrievalHitRate(top_k=k) for k in KS}.items():
            found["torchmetrics"][f"{way} {name}"] = float(metric(above, same, indexes=query))
        found["torchmetrics"][f"{way} mrr"] = float(RetrievalMRR()(above, same, indexes=query))
    KEPT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
