"""Mixture of experts: a feed-forward network of which each token uses a few parts, chosen by a router.

Mixtral (arXiv 2401.04088), DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2 and -V3 (arXiv 2405.04434, 2412.19437) and
Qwen2-MoE differ in the router, in what is shared by all tokens and in the balance losses: all three are passed in.

Letters: B batch, S sequence, D width, H width inside an expert, E experts, K choices of a token, N tokens (B * S).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.nn.experts import Plan, mix
from vlm.nn.ffn import GatedMlp
from vlm.nn.route import PerRoute
from vlm.nn.tokens import Tokens


class Choice(NamedTuple):
    """What a router decided: which experts, how much of each, and how likely it finds every expert (sums to one)."""

    expert: Int[Tensor, "N K"]
    weight: Float[Tensor, "N K"]
    share: Float[Tensor, "N E"]


class Router(nn.Module):
    """Scores every expert and picks the best, in fp32 whatever the rest computes in."""

    bias: Float[Tensor, "E"] | None

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int,
        score: nn.Module,
        *,
        renormalize: bool,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        best: int = 1,
        bias: bool = False,
    ) -> None:
        """`score`: from logits to scores; `renormalize`: the chosen scores sum to one before `scale` multiplies them.

        `groups`: experts stand in that many, and a token chooses only inside its `top_groups` best ones, judged by the
        sum of their `best` highest scores. `bias`: has one that moves the choice but not the weights (`update_bias`).
        """
        super().__init__()
        _check(dim, experts, top_k, groups, top_groups)
        self.experts, self.top_k, self.score = experts, top_k, score
        self.renormalize, self.scale = renormalize, scale
        self.groups, self.top_groups, self.best = groups, top_groups, min(best, experts // groups)
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.register_buffer("bias", torch.zeros(experts) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "N D"]) -> Choice:
        """Fp32 at least: near-ties decide which weights a token meets."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            score = self.score(nn.functional.linear(x.to(wide), self.weight.to(wide)))
            expert = self._rank(score.detach()).topk(self.top_k, sorted=False).indices
            weight = score.gather(1, expert)
            if self.renormalize:
                weight = weight / (weight.sum(1, keepdim=True) + 1e-20)
            return Choice(expert, weight * self.scale, score / (score.sum(1, keepdim=True) + 1e-20))

    def _rank(self, score: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        rank: Tensor = score if self.bias is None else score + self.bias
        if self.top_groups == self.groups:
            return rank
        members = rank.unflatten(1, (self.groups, -1))
        allowed = members.topk(self.best).values.sum(2).topk(self.top_groups).indices
        open_groups = torch.zeros_like(members[..., 0], dtype=torch.bool).scatter(1, allowed, True)
        rank = members.masked_fill(~open_groups[..., None], -torch.inf).flatten(1)
        return rank

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # A conversion to bf16 would swallow the steps of the bias, a thousandth each.
        before = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias is not None and before is not None and self.bias.dtype != before.dtype:
            self.bias = before.to(self.bias.device)
        return self


def _check(dim: int, experts: int, top_k: int, groups: int, top_groups: int) -> None:
    if min(dim, experts, top_k, groups, top_groups) < 1:
        numbers = f"dim={dim}, experts={experts}, top_k={top_k}, groups={groups}, top_groups={top_groups}"
        raise ValueError(f"every number of a router must be at least 1: {numbers}")
    if experts % groups:
        raise ValueError(f"groups={groups} does not divide experts={experts}: choose groups among its divisors")
    if top_groups > groups:
        raise ValueError(f"top_groups={top_groups} exceeds groups={groups}: lower it")
    reachable = experts // groups * top_groups
    if top_k > reachable:
        where = f"experts={experts}" if top_groups == groups else f"the {reachable} experts of {top_groups} groups"
        raise ValueError(f"top_k={top_k} exceeds {where}: lower top_k")


def softmax_router(
    dim: int,
    experts: int,
    top_k: int,
    renormalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    bias: bool = False,
) -> Router:
    """Mixtral's; DeepSeekMoE's does not `renormalize`, DeepSeek-V2's has `groups`, judged by their best expert."""
    return Router(
        dim,
        experts,
        top_k,
        nn.Softmax(-1),
        renormalize=renormalize,
        scale=scale,
        groups=groups,
        top_groups=top_groups,
        best=1,
        bias=bias,
    )


def sigmoid_router(
    dim: int,
    experts: int,
    top_k: int,
    renormalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    bias: bool = True,
) -> Router:
    """DeepSeek-V3's (arXiv 2412.19437, equations 12 to 16): groups are judged by the sum of their two best experts."""
    return Router(
        dim,
        experts,
        top_k,
        nn.Sigmoid(),
        renormalize=renormalize,
        scale=scale,
        groups=groups,
        top_groups=top_groups,
        best=2,
        bias=bias,
    )


@torch.no_grad()
def update_bias(router: Router, load: Float[Tensor, "E"], rate: float) -> None:
    """One step of loss-free balancing (arXiv 2408.15664, algorithm 1), between optimizer steps.

    `load`: pairs per expert in the whole batch, summed over all processes; `rate`: 0.001 in the paper.
    """
    if router.bias is None:
        raise ValueError("the router has no bias to update: build it with bias=True")
    router.bias += rate * (load.mean() - load).sign()


@dataclass(frozen=True)
class Balance:
    """A loss that is smallest where all experts are used alike: alpha * sum_i f_i P_i; exactly alpha when they are.

    f: an expert's share of the choices, times E; P: its mean probability, which alone carries a gradient. `groups`:
    over that many groups of experts, one a device (DeepSeekMoE, equations 12 to 17). `per_row`: the mean of each row's
    own loss (DeepSeek-V3, equations 17 to 20). Mixtral's published loss is K times as large as `Balance(alpha)`.
    """

    alpha: float
    groups: int | None = None
    per_row: bool = False

    def __call__(
        self, expert: Int[Tensor, "B S K"], share: Float[Tensor, "B S E"], valid: Bool[Tensor, "B S"]
    ) -> Float[Tensor, ""]:
        """Tokens that are not `valid` do not count."""
        experts = share.shape[2]
        counted = valid[..., None]
        hits = torch.zeros_like(share).scatter_(2, expert, 1.0)
        used, likely = (hits * counted).sum(1), torch.where(counted, share, 0).sum(1)
        tokens = valid.sum(1, keepdim=True)
        if not self.per_row:
            used, likely, tokens = (part.sum(0, keepdim=True) for part in (used, likely, tokens))
        parts = (experts if self.groups is None else self.groups, -1)
        f = (used * (experts / expert.shape[2]) / tokens.clamp_min(1)).unflatten(1, parts).mean(2)
        p = (likely / tokens.clamp_min(1)).unflatten(1, parts).sum(2)
        loss: Tensor = self.alpha * (f * p).sum() / (tokens > 0).sum().clamp_min(1)
        return loss


class Routing(NamedTuple):
    """What a pass did."""

    balance: Float[Tensor, ""]  # the balance losses' sum, to be added to the loss
    load: Float[Tensor, "E"]  # how many (token, choice) pairs each expert computed; no gradient
    entropy: Float[Tensor, ""]  # of the router's probabilities, mean over valid tokens, nats; no gradient
    dropped: Float[Tensor, ""]  # choices of valid tokens less what was computed: 0, since nothing has a capacity


class MixtureOfExperts(nn.Module):
    """Routed SwiGLU experts, and optionally one network shared by all tokens (DeepSeekMoE, equations 9 to 11)."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        router: Router,
        shared: nn.Module | None = None,
        balance: Sequence[Balance] = (),
    ) -> None:
        """`hidden`: width inside one expert; `shared`: for n shared experts a GatedMlp of width n * hidden."""
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden={hidden}: an expert needs a width of at least 1")
        if router.weight.shape[1] != dim:
            raise ValueError(f"the router reads width {router.weight.shape[1]}, but dim={dim}: build it with that dim")
        for loss in balance:
            if loss.groups is not None and (loss.groups < 1 or router.experts % loss.groups):
                raise ValueError(f"groups={loss.groups} of a balance loss does not divide experts={router.experts}")
        self.router, self.shared, self.balance = router, shared, tuple(balance)
        self.gate_up = nn.Parameter(torch.empty(router.experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(router.experts, dim, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The routed experts like the linear layers around them: normal with deviation 0.02."""
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def forward(
        self, x: Float[Tensor, "B S D"], valid: Bool[Tensor, "B S"] | None = None
    ) -> tuple[Float[Tensor, "B S D"], Routing]:
        """Tokens that are not `valid` get nothing from the routed experts and count nowhere."""
        flat = x.flatten(0, 1)
        choice: Choice = self.router(flat)
        plan = Plan.of(choice.expert, self.router.experts, None if valid is None else valid.flatten())
        out = mix(flat, self.gate_up, self.down, choice.weight, plan, padded=valid is not None).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, self._routing(choice, plan, x, valid)

    def _routing(self, choice: Choice, plan: Plan, x: Tensor, valid: Tensor | None) -> Routing:
        entropy, balance = torch.special.entr(choice.share.detach()).sum(1), choice.share.new_zeros(())
        if valid is None:
            entropy = entropy.sum() / max(len(entropy), 1)
        else:
            entropy = torch.where(valid.flatten(), entropy, 0).sum() / valid.sum().clamp_min(1)
        if self.balance:
            counted = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
            expert, share = (part.unflatten(0, counted.shape) for part in (choice.expert, choice.share))
            balance = torch.stack([loss(expert, share, counted) for loss in self.balance]).sum()
        load = plan.load()
        asked = self.router.top_k * (load.new_tensor(len(choice.expert)) if valid is None else valid.sum())
        return Routing(balance, load, entropy, asked - load.sum())


def feed(ffn: nn.Module, x: Float[Tensor, "B S D"], tokens: Tokens) -> tuple[Float[Tensor, "B S D"], list[Routing]]:
    """Any feed-forward network, experts and `PerRoute` of experts among them, and what each of its mixtures did."""
    routings: list[Routing] = []

    def apply(module: nn.Module, part: Tensor, valid: Tensor | None) -> Tensor:
        if not isinstance(module, MixtureOfExperts):
            out: Tensor = module(part)
            return out
        out, routing = module(part, valid)
        routings.append(routing)
        return out

    if not isinstance(ffn, PerRoute):
        return apply(ffn, x, None if tokens.full else tokens.valid), routings
    if not any(isinstance(module, MixtureOfExperts) for module in ffn.routes.values()):
        return ffn(x, tokens), routings
    # Each mixture once, whatever the layout, so that its load is counted once; it leaves the others' tokens out itself.
    return ffn.each(x, tokens, lambda module, part, own: apply(module, part, own & tokens.valid)), routings


class GatedShared(nn.Module):
    """A shared network behind a sigmoid gate of its own, one number a token: Qwen2-MoE."""

    def __init__(self, dim: int, network: nn.Module) -> None:
        """`network` maps `dim` to `dim`."""
        super().__init__()
        self.gate, self.network = nn.Linear(dim, 1, bias=False), network

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Applied to each token on its own."""
        out: Tensor = self.gate(x).sigmoid() * self.network(x)
        return out


@torch.no_grad()
def upcycle(
    dense: GatedMlp,
    router: Router,
    pieces: int = 1,
    shared: nn.Module | None = None,
    balance: Sequence[Balance] = (),
) -> MixtureOfExperts:
    """A mixture whose experts start as copies of a trained network (sparse upcycling, arXiv 2212.05055).

    A router whose weights sum to one makes it equal to `dense` at first. With `pieces`, the hidden width is cut into
    that many and expert i copies piece i % pieces: the experts of all pieces, each with weight one, sum to `dense`.
    """
    width = dense.gate.weight.shape[0]
    if not isinstance(dense.activation, nn.SiLU) or any("bias" in name for name, _ in dense.named_parameters()):
        raise ValueError("only a GatedMlp with SiLU and without bias can be upcycled: experts have neither choice")
    if pieces < 1 or width % pieces or router.experts % pieces:
        raise ValueError(f"pieces={pieces} must divide both hidden={width} and experts={router.experts}")
    moe = MixtureOfExperts(dense.gate.weight.shape[1], width // pieces, router, shared, balance).to(dense.gate.weight)
    copies = router.experts // pieces
    halves = [half.weight.unflatten(0, (pieces, -1)) for half in (dense.gate, dense.up)]
    moe.gate_up.copy_(torch.cat(halves, 1).repeat(copies, 1, 1))
    moe.down.copy_(dense.down.weight.unflatten(1, (pieces, -1)).movedim(1, 0).repeat(copies, 1, 1))
    return moe
