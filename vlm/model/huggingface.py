"""Any causal language model of `transformers` as a `Language`, for families that have no parts of ours.

Letters: B batch, S sequence, P past tokens, T text tokens, D width, V vocabulary, K chosen positions.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.nn.block import Output
from vlm.nn.state import State
from vlm.nn.tokens import Tokens

_MEMORIES = {"DynamicLayer": False, "DynamicSlidingWindowLayer": True}  # True: looks back over a window


class HuggingFaceLanguage(nn.Module):
    """A model of transformers behind our protocol: embeddings, positions, padding and memory are passed on to it.

    Its memory is our `KeyValue`, so beams, cropping and several texts of one image work as with our own decoder.
    """

    def __init__(self, module: nn.Module) -> None:
        """`module`: as from AutoModelForCausalLM. ValueError: a family of which something cannot be passed on."""
        super().__init__()
        self.module = module
        model: Any = module
        self.family = str(model.config.model_type)
        self.dim = int(model.get_input_embeddings().weight.shape[1])
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        accepted = inspect.signature(model.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"  # renamed in transformers 5.24
        wanted = ("inputs_embeds", "attention_mask", "position_ids", self._cache_name)
        if missing := [name for name in wanted if name not in accepted]:
            raise self._refusal(f"it takes no {', '.join(missing)}")
        self._memories = self._layers()
        self._takes_masks: bool | None = None  # not tried yet
        self._copies = _copies(module)
        self.register_state_dict_post_hook(_leave_out_copies)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_put_back_copies)  # type: ignore[no-untyped-call]
        if not model.get_input_embeddings().weight.is_meta:
            self._refuse_other_ends()

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings of token ids; a negative id (an image's placeholder) gives any row, to be overwritten."""
        model: Any = self.module
        out: Tensor = model.get_input_embeddings()(ids.clamp_min(0))
        return out

    def forward(self, tokens: Tokens, state: State | None = None) -> Output:
        """Hidden states after the final norm. ValueError: tokens seen in a way that the family cannot be told."""
        past = None if state is None else state.valid
        self._refuse_gaps(past, state)
        valid = tokens.valid if past is None else torch.cat([past, tokens.valid], 1)
        mask = valid.long() if _causal(tokens) else self._mask(tokens, past)
        hidden, layers = self._run(tokens.x, mask, tokens.position, state)
        # Row by row, because padding on the right must not move the next token away.
        position = torch.where(tokens.valid, tokens.position + 1, 0).amax(1)
        if state is not None:
            position = torch.maximum(position, state.position)
        return Output(hidden, State(layers, valid, position, tokens.full and (state is None or state.full)))

    def logits(self, hidden: Float[Tensor, "*K D"]) -> Float[Tensor, "*K V"]:
        """Next-token logits."""
        model: Any = self.module
        out: Tensor = model.get_output_embeddings()(hidden)
        return out

    def _run(self, x: Tensor, mask: Tensor, position: Tensor, state: State | None) -> tuple[Tensor, Any]:
        from vlm.model.huggingface_cache import Memory

        cache = Memory(None if state is None else state.layers, len(self._memories))
        model: Any = self.module
        given = {"inputs_embeds": x, "attention_mask": mask, "position_ids": position, self._cache_name: cache}
        hidden: Tensor = model.base_model(**given, use_cache=True).last_hidden_state
        return hidden, cache.remembered()

    def _layers(self) -> list[bool]:
        """For each layer, whether it looks back over a window."""
        from vlm.model.huggingface_cache import kinds_of_memory

        model: Any = self.module
        kinds = kinds_of_memory(model.config)
        if strange := sorted(set(kinds) - set(_MEMORIES)):
            raise self._refusal(f"it remembers more than keys and values ({', '.join(strange)})")
        return [_MEMORIES[kind] for kind in kinds]

    @torch.no_grad()
    def _refuse_other_ends(self) -> None:
        """Embeddings or logits may be changed inside the model, where they do not pass through here."""
        model: Any = self.module
        ids = torch.tensor([[0, 1, 2]], device=model.get_input_embeddings().weight.device) % self.vocabulary
        training = self.module.training
        self.module.eval()
        expected = model(input_ids=ids).logits
        found = self.logits(self.forward(Tokens.of(self.embed(ids))).hidden)
        self.module.train(training)
        near = (1e-4 if expected.dtype == torch.float32 else 2e-2) * float(expected.abs().max())
        # A cap hardly shows while logits are small.
        capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
        if capped or not torch.allclose(found, expected, rtol=0, atol=near):
            raise self._refusal("it scales or caps embeddings or logits itself")

    def _refuse_gaps(self, past: Tensor | None, state: State | None) -> None:
        if past is None or state is None or state.full or not any(self._memories):
            return
        if bool((past[:, :-1] & ~past[:, 1:]).any()) or not bool(past[:, -1].all()):
            raise self._refusal("its windows count padding between tokens; pad prompts on the left")

    def _mask(self, tokens: Tokens, past: Tensor | None) -> Float[Tensor, "B 1 S T"]:
        """What is added to the scores of tokens that may not be seen."""
        if any(self._memories):
            raise self._refusal("it has windows, and takes no mask that says who sees whom inside them")
        if self._takes_masks is None:
            self._takes_masks = self._tries_masks(tokens.x)
        if not self._takes_masks:
            raise self._refusal(
                "it takes no mask that says who sees whom, so tokens cannot see later ones (a bidirectional prefix)"
            )
        return _added(tokens.mask(past), tokens.x.dtype)

    @torch.no_grad()
    def _tries_masks(self, like: Tensor) -> bool:
        """Does a mask of four dimensions do what it says?"""
        x = self.embed(torch.tensor([[0, 1, 2]], device=like.device) % self.vocabulary)
        position = torch.arange(3, device=like.device)[None]
        seen = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=like.device)
        training = self.module.training
        self.module.eval()
        try:
            plain, _ = self._run(x, torch.ones_like(position), position, None)
            causal, _ = self._run(x, _added(seen.tril(), x.dtype), position, None)
            both, _ = self._run(x, _added(seen, x.dtype), position, None)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # each family fails in its own way
            return False
        finally:
            self.module.train(training)
        return torch.allclose(plain, causal, rtol=1e-2, atol=1e-4) and not torch.allclose(plain[:, 0], both[:, 0])

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"language.kind=huggingface: the family {self.family} of transformers: {reason}")


def huggingface_language(name: str, pretrained: bool = True, dtype: torch.dtype = torch.float32) -> HuggingFaceLanguage:
    """The causal language model of a folder, or of the hub by OWNER/NAME[@REVISION]; code beside it is never run.

    `pretrained`: False takes its architecture with random weights. On the meta device only shapes are made.
    ValueError: transformers is missing, the model is not there, or something of it cannot be passed on.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError("language.kind=huggingface needs transformers: pip install 'vlm[hf]'") from None
    place, _, revision = name.partition("@")
    options = {"revision": revision or None, "trust_remote_code": False}
    try:
        if pretrained and torch.get_default_device().type != "meta":
            module = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
        else:
            config = AutoConfig.from_pretrained(place, **options)
            module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"language.name={name}: transformers cannot open it ({reason})") from None
    return HuggingFaceLanguage(module)


def _causal(tokens: Tokens) -> bool:
    if tokens.runs is not None:
        return all(run.causal for run in tokens.runs if run.length)
    return bool(tokens.causal.all())


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _copies(module: nn.Module) -> dict[str, str]:
    """Second names of tied parameters, by which a file would hold them twice: to their first names."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in module.named_parameters(prefix="module", remove_duplicate=False):
        if (known := first.setdefault(id(parameter), name)) != name:
            found[name] = known
    return found


def _leave_out_copies(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, HuggingFaceLanguage)
    for name in module._copies:
        state.pop(prefix + name, None)


def _put_back_copies(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, HuggingFaceLanguage)
    for name, first in module._copies.items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])
