"""A connector of two layers that starts with what a few examples teach, found in closed form.

A layer, a nonlinearity and a layer are a memory of keys and values (Geva et al. 2021, arXiv 2012.14913). Here the keys
are ridge regressions of classes on image features, the values the embeddings of each class's words in the language
model that will read them. Gradients reach the same only after many passes, and with two or three examples of a class
they generalise worse; they take over from here.

Letters: P pictures, N image tokens, C image width, V = N C, K classes, Q soft tokens, D width of the language model.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from vlm.model.connector import PrefixConnector
from vlm.nn.backend import fast_float32

SHARP = 16.0  # input of the nonlinearity that a usual picture of the class gives, before the threshold


@torch.no_grad()
def recall(
    connector: PrefixConnector,
    image: Float[Tensor, "P N C"],
    classes: Int[Tensor, "P"],
    values: Float[Tensor, "K Q D"],
    ridge: float = 0.3,
    threshold: float = 0.6,
) -> float:
    """Sets both layers so that a picture of class k gives the direction of `values[k]`, seen from their mean.

    A class is as strong as its other pictures make it for one that is left out, and `threshold` of that is asked for.
    Returns the percentage of left-out pictures whose class is the strongest. ValueError: a connector of another depth
    or hidden width than the number of classes; classes of one picture.
    """
    first, last = connector.layers[0], connector.layers[-1]
    if len(connector.layers) != 3 or not isinstance(first, nn.Linear) or first.out_features != len(values):
        raise ValueError(f"recall: a connector of depth 2 and hidden={len(values)}, one unit for each class, is needed")
    assert isinstance(last, nn.Linear)
    vectors, one_hot = connector.vector(image), functional.one_hot(classes, len(values)).float()
    size = vectors.shape[1]
    with fast_float32():
        alike = vectors @ vectors.T / size
    inverse = torch.linalg.inv(alike + ridge * torch.eye(len(alike)))
    weights, share = inverse @ one_hot, 1 - (alike @ inverse).diagonal()
    left_out = one_hot - (one_hot - alike @ weights) / share[:, None]
    strength = float(left_out.gather(1, classes[:, None]).mean())
    if strength <= 0:
        raise ValueError("recall: pictures left out are not known by the others of their class: two of each are needed")
    first.weight.copy_(weights.T @ vectors * (SHARP / strength / size))
    first.bias.fill_(-SHARP * threshold)
    # All classes that answer add up; the norm behind them makes of it a step from the middle as long as to one word.
    middle = values.mean((0, 1))
    apart = values - middle
    last.weight.copy_(apart.flatten(1).T)
    last.bias.zero_()
    connector.norm.weight.fill_(float(apart.pow(2).mean().sqrt()))
    connector.norm.bias.copy_(middle)
    return 100 * float((left_out.argmax(1) == classes).float().mean())
