"""What `--model` names, ready for use: the folder of a run, or a published checkpoint with all that comes with it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from vlm.checkpoint import CONFIG
from vlm.config import schema
from vlm.data.talk_batch import Reader
from vlm.data.text import Tokenizer, clip_tokenizer, load_tokenizer
from vlm.data.vocabulary import FILES
from vlm.model.coca import CaptionDecoder, CoCa
from vlm.model.published.hub import find, read_json
from vlm.model.published.load import Checkpoint, load
from vlm.model.published.tokens import has_tokenizer, published_tokenizer
from vlm.model.published.usage import Usage, as_said, usage_of
from vlm.model.qformer import QFormer
from vlm.model.seq2seq import EncoderDecoder
from vlm.model.text import TextEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.layout import PICKLES, SAFE
from vlm.restore import Ready, restore

READER = "qformer_tokenizer"  # where Hugging Face's folders of InstructBLIP keep the Q-Former's vocabulary
WRITING = "generation_config.json"


def open_model(name: str, device: torch.device | None = None, parts: Mapping[str, str] | None = None) -> Ready:
    """The folder of a run, a published folder or file, or OWNER/NAME[@REVISION] of the hub.

    `parts`: as of `vlm.model.published.load.load`. ValueError: none of these; the errors of `restore` and `load`.
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        if parts:
            raise ValueError(f"{name} is the folder of a run, which says itself where its parts come from")
        return restore(folder, device)
    if folder.is_dir() and not any(file.suffix in _PUBLISHED for file in folder.iterdir()):
        raise ValueError(f"{name} is neither the folder of a run (no {CONFIG}) nor a published checkpoint")
    return published(name, device, parts)


_PUBLISHED = (".json", SAFE, *PICKLES)


TOKENIZERS = ("tokenizer", "qformer_tokenizer")  # parts without weights


def published(name: str, device: torch.device | None = None, parts: Mapping[str, str] | None = None) -> Ready:
    """A published checkpoint with its tokenizer, image transform, template and ways of writing."""
    given = dict(parts or {})
    vocabularies = {part: find(given.pop(part)) for part in TOKENIZERS if part in given}
    found = load(name, given, device="cpu" if device is None else device)
    model = found.model
    tokenizer = tokenizer_of(found, given, vocabularies.get("tokenizer"))
    usage = _usage(found, tokenizer)
    reads = _reader(found, vocabularies.get("qformer_tokenizer"))
    return Ready(name, model, tokenizer, _settings(model, usage), _writes(model), usage=usage, reads=reads)


def tokenizer_of(found: Checkpoint, parts: Mapping[str, str], given: Path | None = None) -> Tokenizer:
    """As given, or of the language model, or the folder's; CLIP's own vocabulary for its files without one."""
    add = ("[DEC]",) if _writes_itself(found.model) else ()
    if given is not None:
        return published_tokenizer(given, add)
    folders = [*([find(parts["language"])] if "language" in parts else []), found.path]
    if (folder := next(filter(has_tokenizer, folders), None)) is not None:
        return published_tokenizer(folder, add)
    if (reads := _reads(found.model)) is not None and reads.embedding.num_embeddings == _CLIP:
        return clip_tokenizer()
    raise ValueError(
        f"{folders[0]}: no tokenizer in it (none of {', '.join(FILES)}): copy its files there from where the model is "
        "published, or say where they are (--part tokenizer=FOLDER)"
    )


def _reads(model: VisionLanguageModel) -> TextEncoder | CaptionDecoder | None:
    """What reads texts in CLIP and CoCa."""
    if isinstance(model, CoCa):
        return model.caption
    return model.text if isinstance(model.text, TextEncoder) else None


_CLIP = 49_408


def _usage(found: Checkpoint, tokenizer: Tokenizer) -> Usage | None:
    """None for what writes no captions, or has no template; as generation_config.json says, else as the authors do."""
    if found.model.language is None or found.model.vision is None:
        return None
    language = "t5" if isinstance(found.model.language, EncoderDecoder) else "opt"
    usage = usage_of(_system(found), language, tokenizer)
    if not (found.path / WRITING).is_file():
        return usage
    return as_said(usage, read_json(found.path, WRITING), str(found.path / WRITING))


def _system(found: Checkpoint) -> str:
    """The model_type, which is in no file of LAVIS or MiniGPT-4."""
    if (named := found.values.get("model_type")) is not None:
        return str(named)
    reads = isinstance(found.model.connector, QFormer) and found.model.connector.text is not None
    alone = "query_tokens" not in found.sources[0].weights
    return "minigpt4" if alone else "instructblip" if reads else "blip-2"


def _settings(model: VisionLanguageModel, usage: Usage | None) -> schema.Data:
    if usage is not None:
        return schema.ChatData(kind="chats", train="", template=usage.template)
    if model.vision is None:
        return schema.TextData(kind="text", train="")
    longest = 32
    if isinstance(model.text, TextEncoder):
        longest = model.text.max_tokens
    elif isinstance(model, CoCa):
        longest = model.caption.max_tokens
    return schema.PairData(train="", max_tokens=longest)


def _writes(model: VisionLanguageModel) -> bool:
    if model.vision is None:
        return False
    return model.language is not None or isinstance(model, CoCa) or _writes_itself(model)


def _writes_itself(model: VisionLanguageModel) -> bool:
    """Whether its Q-Former has a vocabulary head (stage 1 of LAVIS)."""
    qformer = model.connector
    return isinstance(qformer, QFormer) and qformer.text is not None and qformer.text.writes


def _reader(found: Checkpoint, given: Path | None) -> Reader | None:
    """InstructBLIP's. ValueError: its vocabulary is nowhere."""
    qformer = found.model.connector
    if found.model.language is None or not isinstance(qformer, QFormer) or qformer.text is None:
        return None
    folder = found.path / READER if given is None else given
    if not has_tokenizer(folder):
        raise ValueError(
            f"{found.path}: its Q-Former reads questions in BERT's words, and there is no {READER} in it: say where "
            f"that vocabulary is (--part {READER}=FOLDER, such as google-bert/bert-base-uncased)"
        )
    return Reader(load_tokenizer(folder), min(128, qformer.text.max_tokens))
