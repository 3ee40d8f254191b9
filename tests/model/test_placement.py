"""Nothing in a forward pass is pinned to the CPU: the same passes with fake CUDA tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.model.small import PATCHES, asked, blip2, llava, pictures, seq2seq, words
from vlm.data.batch import Text
from vlm.model.generate import Sampling, choose
from vlm.model.seq2seq import EncoderDecoder
from vlm.model.vlm import VisionLanguageModel, last_valid
from vlm.nn.tokens import Tokens


def on_fake_cuda(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces parameters and buffers in place by fake ones that claim to be on a GPU."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = mode.from_tensor(parameter.detach()).to("cuda")
            setattr(module, name, nn.Parameter(fake, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(buffer).to("cuda"))


def test_an_encoder_decoder_stays_on_the_device() -> None:
    """Reading and writing padded rows, and going on with reordered ones."""
    model, images = seq2seq(), pictures(2)
    given = asked(words(model, [5, 3]), [[2, 4], [2, 4, 7]])
    language = model.language
    assert isinstance(language, EncoderDecoder)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_fake_cuda(model, mode)
        read, reply = (
            Text(*(mode.from_tensor(part).to("cuda") for part in (text.ids, text.valid, text.labels)))
            for text in (given, given.written)
        )
        soft = model.see(mode.from_tensor(images).to("cuda")).soft
        x = torch.cat([soft, language.embed(read.ids[:, PATCHES:])], 1)
        memory = language.read(Tokens.of(x, causal=False, valid=read.valid))
        out = language(Tokens.of(language.embed(reply.ids), valid=reply.valid), None, memory)
        logits, state = model.proceed(reply.ids[:, :1], out.state.reorder(torch.arange(2, device="cuda")))
        assert {part.device.type for part in (out.hidden, logits, state.position)} == {"cuda"}


@pytest.mark.parametrize("make", [blip2, llava])
def test_forward_stays_on_the_device(make: Callable[[], VisionLanguageModel]) -> None:
    model = make()
    images, text = pictures(2), words(model, [5, 5])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_fake_cuda(model, mode)
        text = Text(*(mode.from_tensor(part).to("cuda") for part in (text.ids, text.valid, text.labels)))
        seen = model.see(mode.from_tensor(images).to("cuda"))
        found: list[Tensor] = [seen.soft]
        if model.contrast is not None:
            found += [model.embed_image(seen), model.embed_text(text), model.match_logits(seen, text)]
            out = model.write(seen, text)
            hidden, state = out.hidden, out.state
            logits = model.logits(last_valid(hidden, text.valid))
            chosen = choose(logits, torch.zeros_like(logits, dtype=torch.bool), Sampling(temperature=0.7, top_p=0.9))
            one = torch.ones_like(chosen[:, None], dtype=torch.bool)
            more = model.connector.write(chosen[:, None], one, state, state.position)  # type: ignore[attr-defined]
            found += [hidden, logits, chosen, more.hidden]
        else:
            assert model.language is not None
            found.append(model.language.embed(text.ids))
        assert {part.device.type for part in found} == {"cuda"}
