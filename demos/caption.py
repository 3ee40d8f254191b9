"""Captions of pictures by a trained run: python demos/caption.py runs/quickstart/3-caption photo.jpg …"""

import sys
from pathlib import Path

import torch

from vlm.data.image import decode
from vlm.model.describe import describe
from vlm.model.generate import Sampling
from vlm.restore import restore


def main(run: str, *pictures: str) -> None:
    """Prints a greedy caption and three sampled ones for each picture."""
    trained = restore(Path(run))  # settings, tokenizer and weights; frozen parts come from where the settings say
    data = trained.data

    # The encoder owns its transform: size, crop and normalisation are those it was trained with.
    transform = trained.model.vision.transform
    images = torch.stack([transform(decode(Path(picture).read_bytes())) for picture in pictures])

    greedy = Sampling(max_new=data.max_tokens)
    sampled = Sampling(max_new=data.max_tokens, temperature=0.7, top_p=0.9)
    generator = torch.Generator().manual_seed(0)
    columns = [
        describe(trained.model, trained.tokenizer, images, data.template, data.max_tokens, sampling, generator)
        for sampling in (greedy, sampled, sampled, sampled)
    ]
    for picture, (caption, *others) in zip(pictures, zip(*columns, strict=True), strict=True):
        print(f"{picture}: {caption}\n    or: {' | '.join(others)}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python demos/caption.py RUN PICTURE …")
    main(*sys.argv[1:])
