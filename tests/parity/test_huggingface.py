"""Models of transformers behind our protocol: equal to our own decoder, to their own `generate`, and to themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

from tests.parity import test_beam, test_generate
from tests.parity.decoder_folders import loaded_from, padding_gap, same_texts
from tests.parity.decoders import filled, ids, left_padding, logits, token_by_token, worst_gap
from tests.parity.noise import gap
from tests.parity.test_published_language import OPT, SIZES, SLIDING
from vlm.model.beam import Beams
from vlm.model.generate import Sampling
from vlm.model.huggingface import HuggingFaceLanguage, huggingface_language
from vlm.model.language import Language
from vlm.nn.tokens import Tokens

OWN: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES, **SLIDING, max_window_layers=1),
    "opt": OPTConfig(**OPT),
}
GPT = {"vocab_size": 99, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
OTHERS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(**GPT, n_embd=48, n_layer=3, n_head=6, n_positions=32),
    "gpt_neox": GPTNeoXConfig(
        **GPT, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=80, rotary_pct=0.5
    ),
}


def made(config: PretrainedConfig) -> Any:
    return filled(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def pair(name: str, folder: Path) -> tuple[Any, HuggingFaceLanguage]:
    """Our decoder and theirs behind our protocol, with the same weights."""
    made(OWN[name]).save_pretrained(folder)
    return loaded_from(folder), huggingface_language(str(folder)).eval()


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_it_is_our_decoder(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name, tmp_path)
    assert isinstance(theirs, Language) and (theirs.dim, theirs.vocabulary) == (48, 99)
    valid = left_padding()
    everything = torch.ones_like(valid)
    for kept in (everything, valid):
        assert gap(logits(theirs, ids(), kept)[kept], logits(ours, ids(), kept)[kept]) < 1e-4
        assert gap(token_by_token(theirs, ids(), kept)[kept], token_by_token(ours, ids(), kept)[kept]) < 1e-4
    assert padding_gap(theirs) < 1e-4


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 3, 6]])
def test_it_writes_what_our_decoder_writes(name: str, padding: list[int], tmp_path: Path) -> None:
    ours, theirs = pair(name, tmp_path)
    prompt, valid = test_generate.prompt(padding)
    eos = test_generate.written(ours, prompt, valid, 98, Sampling(8))[0][4]
    for sampling in (Sampling(8), Sampling(8, repetition_penalty=1.4)):
        expected = test_generate.written(ours, prompt, valid, eos, sampling)
        assert test_generate.written(theirs, prompt, valid, eos, sampling) == expected
    beams = Beams(3, max_new=8, length_penalty=0.7, returned=2)
    expected = test_beam.written(ours, prompt, valid, [eos], beams)
    assert test_beam.same(test_beam.written(theirs, prompt, valid, [eos], beams), expected)


@pytest.mark.parametrize("name", OTHERS)
def test_a_family_without_parts_of_ours(name: str) -> None:
    theirs = made(OTHERS[name])
    ours = HuggingFaceLanguage(theirs)
    assert worst_gap(ours, theirs) < 1e-4
    assert padding_gap(ours) < 1e-4
    assert same_texts(ours, theirs)


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
def test_gradients_reach_what_stands_in_the_text(name: str) -> None:
    theirs = made({**OWN, **OTHERS}[name])
    ours = HuggingFaceLanguage(theirs)
    weight = torch.randn(3, 17, 99, generator=torch.Generator().manual_seed(2))
    grads = []
    for run in (
        lambda x: ours.logits(ours(Tokens.of(x)).hidden),
        lambda x: theirs(inputs_embeds=x).logits,
    ):
        x = ours.embed(ids()).detach().requires_grad_()
        (run(x) * weight).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert float(grads[1].abs().max()) > 1e-2
    assert gap(grads[0], grads[1]) < 1e-4 * float(grads[1].abs().max())


@torch.no_grad()
def prefix(model: Any, size: int, causal: bool) -> Tensor:
    """Logits of a text whose first tokens may see each other both ways."""
    x = model.embed(ids())
    tokens = Tokens.of(x[:, :size], causal=causal).concat(Tokens.of(x[:, size:]))
    position = torch.arange(x.shape[1]).expand(len(x), -1)
    return model.logits(model(Tokens(x, tokens.route, tokens.valid, tokens.causal, position, tokens.runs)).hidden)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_prefix_that_sees_both_ways(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name, tmp_path)
    expected = prefix(ours, 6, causal=False)
    assert gap(prefix(theirs, 6, causal=False), expected) < 1e-4
    assert gap(prefix(theirs, 6, causal=True), expected) > 1e-3


class Deaf(torch.nn.Module):
    """A model that takes a mask of four dimensions and does not heed it."""

    def __init__(self, inner: Any, fails: bool) -> None:
        super().__init__()
        self.inner, self.fails, self.embed_tokens = inner, fails, inner.embed_tokens

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any, use_cache: bool
    ) -> Any:
        if attention_mask.ndim == 4 and self.fails:
            raise ValueError("a mask of two dimensions, please")
        mask = attention_mask if attention_mask.ndim == 2 else None
        return self.inner(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
        )


@pytest.mark.parametrize("fails", [True, False])
def test_a_prefix_that_a_family_cannot_be_told_of_is_refused(fails: bool) -> None:
    theirs = made(OWN["llama"])
    ours = HuggingFaceLanguage(theirs)
    theirs.model = Deaf(theirs.model, fails)
    with pytest.raises(ValueError, match=r"family llama .*: it takes no mask .* \(a bidirectional prefix\)"):
        prefix(ours, 6, causal=False)
    assert prefix(ours, 6, causal=True).shape == (3, 17, 99)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_what_windows_cannot_do_is_refused(name: str) -> None:
    ours = HuggingFaceLanguage(made(OWN[name]))
    with pytest.raises(ValueError, match="it has windows, and takes no mask"):
        prefix(ours, 6, causal=False)
    valid = torch.arange(17) < torch.tensor([17, 9, 4])[:, None]
    with pytest.raises(ValueError, match="its windows count padding between tokens; pad prompts on the left"):
        token_by_token(ours, ids(), valid)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2), "bloom .*: it takes no position_ids"),
        (MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2), "mamba .*: it takes no "),
        (
            Gemma2Config(
                vocab_size=99,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=4,
                intermediate_size=8,
            ),
            "gemma2 .*: it scales or caps embeddings or logits itself",
        ),
        (
            CohereConfig(
                vocab_size=9,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                intermediate_size=8,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            ),
            "cohere .*: it scales or caps embeddings or logits itself",
        ),
    ],
)
def test_a_family_that_cannot_be_passed_all_is_refused(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=f"language.kind=huggingface: the family {message}"):
        HuggingFaceLanguage(made(config))


def test_a_state_of_another_model_is_refused() -> None:
    small, large = (HuggingFaceLanguage(made(LlamaConfig(**{**SIZES, "num_hidden_layers": n}))) for n in (2, 3))
    out = small(Tokens.of(small.embed(ids())))
    with pytest.raises(ValueError, match="this state is of another model: 2 layers, not 3 of keys and values"):
        large(Tokens.of(large.embed(ids())), out.state)


def test_a_past_can_be_continued_twice() -> None:
    ours = HuggingFaceLanguage(made(OWN["llama"]))
    with torch.no_grad():
        start = ours(Tokens.of(ours.embed(ids()[:, :9]))).state
        first, again = (
            ours(Tokens.of(ours.embed(ids()[:, 9:]), position=torch.arange(9, 17).expand(3, -1)), start).hidden
            for _ in range(2)
        )
    assert torch.equal(first, again)
    short = start.crop(2).reorder(torch.tensor([2, 2, 0]))
    assert short.layers[0].key.shape == (3, 2, 7, 8) and short.position.tolist() == [7, 7, 7]  # type: ignore[attr-defined]


def test_names_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"language\.name=.*none: transformers cannot open it \("):
        huggingface_language(str(tmp_path / "none"))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match=r"language\.kind=huggingface needs transformers: pip install 'vlm\[hf\]'"):
        huggingface_language(str(tmp_path))


def test_architecture_alone(tmp_path: Path) -> None:
    made(OWN["llama"]).save_pretrained(tmp_path)
    one, other = (huggingface_language(str(tmp_path), pretrained=kept) for kept in (True, False))
    assert set(one.state_dict()) == set(other.state_dict())
    assert not torch.equal(one.logits(torch.ones(48)), other.logits(torch.ones(48)))
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in huggingface_language(str(tmp_path)).parameters())
