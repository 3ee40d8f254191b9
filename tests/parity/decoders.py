"""What every decoder of transformers is compared by: logits whole, padded and cached, loss, gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.parity.noise import gap, noise
from vlm.loss.language import language, supervised
from vlm.model.language import Decoder
from vlm.nn.tokens import Tokens, count_positions

VOCABULARY, LENGTH = 99, 17


def filled(theirs: nn.Module) -> nn.Module:
    """Ready to compare: noise everywhere."""
    noise(theirs)
    theirs.tie_weights()  # type: ignore[operator]
    return theirs.eval()


def ids(rows: int = 3) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def left_padding(rows: int = 3) -> Tensor:
    """The first row is padded a little, the last a lot."""
    valid = torch.ones(rows, LENGTH, dtype=torch.bool)
    valid[0, :5] = valid[2, :11] = False
    return valid


def logits(model: Decoder, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    return model.logits(model(Tokens.of(model.embed(tokens), valid=valid)).hidden)


@torch.no_grad()
def token_by_token(model: Decoder, tokens: Tensor, valid: Tensor, cut: int = 12) -> Tensor:
    """Logits of a prompt and of the rest after it, one by one from the cache; all tokens of the rest are valid."""
    full = None if bool(valid.all()) else valid[:, :cut]
    out = model(Tokens.of(model.embed(tokens[:, :cut]), valid=full))
    rows = [model.logits(out.hidden)]
    for i in range(cut, tokens.shape[1]):
        out = model(Tokens.of(model.embed(tokens[:, i : i + 1]), position=out.state.position[:, None]), out.state)
        rows.append(model.logits(out.hidden))
    return torch.cat(rows, 1)


def logit_gap(ours: Decoder, theirs: nn.Module) -> float:
    """Of plain rows."""
    return gap(logits(ours, ids()), theirs(ids()).logits)


def worst_gap(ours: Decoder, theirs: nn.Module) -> float:
    """Of plain and of padded rows, at once and from the cache."""
    gaps = []
    for valid in (torch.ones(3, LENGTH, dtype=torch.bool), left_padding()):
        wanted = theirs(ids(), attention_mask=valid.long(), position_ids=count_positions(valid)).logits[valid]
        gaps += [gap(logits(ours, ids(), valid)[valid], wanted), gap(token_by_token(ours, ids(), valid)[valid], wanted)]
    return max(*gaps, logit_gap(ours, theirs))


def loss_and_gradient_gap(ours: Decoder, theirs: nn.Module, names: Mapping[str, str]) -> float:
    """Of the loss, and of the gradients of parameters: our name to theirs."""
    labels = ids().clone()
    labels[:, :6] = -100
    hidden, target = supervised(ours(Tokens.of(ours.embed(ids()))).hidden, labels)
    loss, expected = language(ours.logits(hidden), target), theirs(ids(), labels=labels).loss
    loss.backward()
    expected.backward()
    gaps = [gap(loss, expected)]
    for mine, other in names.items():
        first, second = ours.get_parameter(mine).grad, theirs.get_parameter(other).grad
        assert first is not None and second is not None and float(second.abs().max()) > 1e-5
        gaps.append(gap(first, second))
    return max(gaps)
