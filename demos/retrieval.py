"""Finds pictures by words: python demos/retrieval.py runs/quickstart/2-qformer folder "a red apple" …"""

import sys
from pathlib import Path

import torch

from vlm.captioning.run import find_images
from vlm.data.batch import pad
from vlm.data.image import decode
from vlm.data.text import encode_caption
from vlm.loss.contrastive import similarity
from vlm.restore import restore


@torch.no_grad()
def main(run: str, folder: str, *queries: str, best: int = 3) -> None:
    """Prints the best pictures of a folder for each query, with their cosine similarity."""
    trained = restore(Path(run))
    model, tokenizer = trained.model, trained.tokenizer

    paths = list(find_images([folder]))
    images = torch.stack([model.vision.transform(decode(path.read_bytes())) for path in paths])
    pictures = torch.cat([model.embed_image(model.see(part)) for part in images.split(64)])  # N Q E, unit vectors

    longest = trained.data.max_tokens
    words = model.embed_text(pad([encode_caption(tokenizer, query, longest) for query in queries], tokenizer.pad))

    # A text is compared with the image vector that answers it best: one for CLIP, several for a Q-Former.
    for query, scores in zip(queries, similarity(pictures, words).T, strict=True):
        print(query)
        for score, i in zip(*scores.topk(min(best, len(paths))), strict=True):
            print(f"  {score:.2f}  {paths[i]}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit('usage: python demos/retrieval.py RUN FOLDER "WORDS" …')
    main(*sys.argv[1:])
