"""Parts of published checkpoints as the starting weights of parts of one's own."""

import torch
from torch import Tensor, nn

from vlm.model.bert import Bert
from vlm.model.published.load import fill_piece, lone_qformer, open_checkpoint
from vlm.model.qformer import QFormer
from vlm.model.weights.fill import Source


@torch.no_grad()
def starting_weights(module: nn.Module, part: str, source: str) -> tuple[dict[str, Tensor], str]:
    """Weights for a part of a model by its names, from the same part of a published checkpoint, and a word on them.

    A Q-Former starts from another one, whose projection to a language model of another width is left behind, or from
    BERT, as BLIP-2's did. ValueError: a checkpoint without that part, what cannot be had of it.
    """
    if isinstance(module, QFormer) and (alone := lone_qformer(source)) is not None:
        return _fitting(module, _filled(*alone).state_dict()), ""
    found = open_checkpoint(source)
    if isinstance(module, QFormer) and isinstance(found.model.text, Bert):
        return _from_bert(module, _filled(*found.piece("text"))), ", which is BERT"
    weights = _filled(*found.piece(part)).state_dict()
    return (_fitting(module, weights) if isinstance(module, QFormer) else weights), ""


def _fitting(qformer: QFormer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a projection to another width."""
    own = qformer.state_dict()
    fits = {name: name not in own or own[name].shape == tensor.shape for name, tensor in weights.items()}
    return {name: tensor for name, tensor in weights.items() if fits[name] or not name.startswith("out.")}


def _filled(module: nn.Module, sources: list[Source]) -> nn.Module:
    fill_piece(module, sources)
    return module


def _from_bert(qformer: QFormer, bert: nn.Module) -> dict[str, Tensor]:
    """Self-attention and both networks are BERT's; queries, cross-attention and heads new (arXiv 2301.12597, 3.1)."""
    given, weights = bert.state_dict(), dict[str, Tensor]()
    for name, own in qformer.state_dict().items():
        plain = name.replace("routes.query.", "").replace("routes.text.", "").removeprefix("text.")
        tensor = given.get(plain)
        if tensor is None or "cross" in name or name.startswith("text.head"):
            continue
        if name.startswith("text.") and tensor.shape[0] != own.shape[0]:  # tokens that BERT lacks; fewer positions
            tensor = torch.cat([tensor[: len(own)], own[len(tensor) :].to(tensor)])
        weights[name] = tensor
    return weights
