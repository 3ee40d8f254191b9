"""The settings of a run: pure data, checked when read, free of torch.

`Run` is the root. Choices are closed unions tagged by `kind`. What can be derived (widths, image sizes, token counts)
is derived in `vlm.build` and has no setting.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.config.language import HuggingFaceLanguage, Language
from vlm.config.pictures import PictureData, Template
from vlm.config.section import BelowOne, Fraction, Positive, Section, usually
from vlm.config.vision import Vision

Part = Literal["vision", "connector", "text", "language", "contrast", "match"]


# --- model -----------------------------------------------------------------------------------------------------------


class LinearConnector(Section):
    """One linear layer (LLaVA)."""

    kind: Literal["linear"]


class MlpConnector(Section):
    """Linear layers with GELU between them (LLaVA-1.5: depth 2)."""

    kind: Literal["mlp"]
    depth: Positive = 2
    hidden: Positive | None = Field(None, description="width between; the language model's unless given")


class PoolConnector(Section):
    """One vector per image: the mean of its tokens, or its first token (CLIP)."""

    kind: Literal["mean", "first"]


class QFormerConnector(Section):
    """Learned queries with cross-attention to the image (BLIP-2)."""

    kind: Literal["qformer"]
    queries: Positive = 32
    dim: Positive = 768
    layers: Positive = 12
    heads: Positive = 12
    hidden: Positive | None = Field(None, description="width inside the FFN; 4 dim unless given")
    cross_every: Positive = Field(2, description="cross-attention in every k-th block")
    text: bool = Field(True, description="text branch: stage 1 needs it, stage 2 does not, InstructBLIP reads with it")
    text_head: Literal["linear", "bert", "none"] = Field(
        "linear", description="what writes: a layer; BERT's, tied to the embedding; none in a branch that only reads"
    )
    dropout: BelowOne = 0.1


Connector = Annotated[LinearConnector | MlpConnector | PoolConnector | QFormerConnector, Field(discriminator="kind")]


class TextTower(Section):
    """CLIP's text encoder."""

    dim: Positive = 512
    layers: Positive = 12
    heads: Positive = 8
    hidden: Positive | None = None
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    dropout: BelowOne = 0.0


class Lora(Section):
    """Adapters of low rank (LoRA, by peft) beside the linear layers whose name matches; the layers are frozen."""

    match: str = Field(description="regular expression on a layer's whole name; the first that matches decides")
    rank: Positive = 8
    alpha: float = Field(16.0, gt=0, description="adapters count alpha / rank times")
    dropout: BelowOne = 0.0


class Model(Section):
    """The parts of a vision-language model; a language model on text alone has only `language`."""

    vision: Vision | None = None
    connector: Connector | None = None
    text: TextTower | None = None
    language: Language | None = None
    embed_dim: Positive = Field(256, description="width of the contrastive space")
    temperature: float = Field(0.07, gt=0, description="where the learned temperature starts")
    init: dict[Part, str | None] = Field(
        default_factory=dict,
        description="parts whose weights come from the folder of another run, or from a published checkpoint",
    )
    lora: list[Lora] = Field(default_factory=list, description="adapters, which learn in place of what they stand in")


# --- data ------------------------------------------------------------------------------------------------------------


class FileTokenizer(Section):
    """A published tokenizer: tokenizer.json, SentencePiece's model, vocab.json with merges.txt, BERT's vocab.txt."""

    kind: Literal["file"]
    path: str = Field(description="the folder of a model, or one of these files")


class PublishedTokenizer(Section):
    """The tokenizer of a published model."""

    kind: Literal["published"]
    name: str = Field(description="folder, or OWNER/NAME[@REVISION] of the hub")
    add: list[str] = Field(default_factory=list, description="control tokens that it lacks, such as [DEC]")


class ClipTokenizer(Section):
    """CLIP's byte-pair encoding, as open_clip ships it."""

    kind: Literal["clip"]


class BpeTokenizer(Section):
    """A byte-pair encoding learned from the training captions."""

    kind: Literal["bpe"]
    vocab: Positive = 2000


Tokenizer = Annotated[FileTokenizer | PublishedTokenizer | ClipTokenizer | BpeTokenizer, Field(discriminator="kind")]


class Instruction(Section):
    """What a Q-Former reads beside a picture: the last words of the question about it."""

    tokenizer: Tokenizer | None = Field(None, description="its own vocabulary; that of the run unless given")
    max_tokens: Annotated[int, Field(ge=3)] = Field(128, description="of the question, with its start and end")


class PairData(PictureData):
    """Pictures with captions: where they come from and what is made of them."""

    kind: Literal["pairs"] = "pairs"
    template: Template = Field("{image}{text}", description="how image and caption stand in the language model's text")
    max_tokens: Positive = Field(32, description="longest text; captions are cut, image tokens never")
    captions_per_image: Positive = Field(1, description="drawn anew for each sample of a batch")
    keep_first_caption: bool = Field(False, description="the first caption is always among those drawn")


class ChatData(PictureData):
    """Conversations about any number of pictures each: LLaVA's records and chat messages, or captions as answers."""

    kind: Literal["chats"]
    template: Template = Field(description="how a conversation stands in the language model's text")
    max_tokens: Positive = Field(
        2048, description="longest text, images not counted: the last answer is cut, what follows left out"
    )
    turns: Positive | None = Field(None, description="at most so many answers of a conversation; all unless given")
    system: str | None = Field(None, description="of conversations without one; the template's own unless given")
    questions: list[str] = Field(
        default_factory=list, description="asked about pictures that have captions, one drawn for each sample"
    )
    instruction: Instruction | None = Field(None, description="the question goes to the Q-Former too (InstructBLIP)")


class TextData(Section):
    """Text alone, packed into blocks of equal length: pretraining of a language model."""

    kind: Literal["text"]
    train: str | list[str] = Field(
        description="documents: .txt, .jsonl, .jsonl.gz or tar files; a folder, a glob, braces or a list of these"
    )
    val: str | list[str] | None = None
    field: str = Field("text", description="field of a JSON document that holds its text")
    length: Annotated[int, Field(ge=2)] = Field(256, description="tokens of a block")
    max_bad_fraction: Fraction = Field(0.05, description="stop when more of the documents than this are unusable")


Data = Annotated[PairData | ChatData | TextData, Field(discriminator="kind"), usually("pairs")]


# --- losses ----------------------------------------------------------------------------------------------------------


class ItcLoss(Section):
    """Image-text contrastive."""

    kind: Literal["itc"]
    weight: float = Field(1.0, gt=0)
    label_smoothing: Fraction = 0.0
    over: Literal["pass", "step"] = Field(
        "pass", description="step: images and texts of all passes of a step together, for a second forward pass each"
    )


class ItmLoss(Section):
    """Image-text matching with hard negatives."""

    kind: Literal["itm"]
    weight: float = Field(1.0, gt=0)
    label_smoothing: Fraction = Field(0.0, description="keeps it from being surer than a small data set warrants")


class LmLoss(Section):
    """Language modelling of the caption."""

    kind: Literal["lm"]
    weight: float = Field(1.0, gt=0)
    label_smoothing: Fraction = 0.0


Loss = Annotated[ItcLoss | ItmLoss | LmLoss, Field(discriminator="kind")]


# --- training --------------------------------------------------------------------------------------------------------


class Group(Section):
    """Parameters by name; the first pattern that matches a parameter decides."""

    match: str = Field(description="regular expression on the whole name")
    lr: float | None = Field(gt=0, description="peak learning rate; null freezes")
    weight_decay: float | None = Field(None, ge=0, description="train.weight_decay unless given")
    muon: float | None = Field(
        None,
        gt=0,
        description="rate of Muon for their matrices (adapters': if match names lora); the rest by AdamW at lr",
    )


class Train(Section):
    """How the weights are learned."""

    steps: Positive
    batch_size: Positive = Field(description="samples of one forward pass")
    accumulate: Positive = Field(1, description="forward passes per step, shared out to the processes of torchrun")
    params: list[Group] = Field([Group(match=".*", lr=1e-4)], description="who learns, and how fast", min_length=1)
    weight_decay: float = Field(0.05, ge=0, description="on matrices; never on biases, norms and single vectors")
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0, description="AdamW's, beside the root of the second moment")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: Fraction = Field(0.0, description="where the schedule ends, as a fraction of the peak")
    drops: dict[Fraction, float] = Field(
        default_factory=dict, description="from these shares of the steps on the rate is multiplied by these factors"
    )
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of an average of the weights, used from then on")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 where it is faster")
    parallel: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp",
        description="several processes: the model in each; divided among all; among those of a machine",
    )
    activation_checkpointing: bool = Field(False, description="less memory for one more forward pass of what learns")
    compile: bool = Field(False, description="torch.compile, block by block")
    timeout: Positive = Field(600, description="seconds after which a process that does not answer is given up")
    seed: int = 0
    log_every: Positive = 20
    eval_every: Positive | None = Field(
        None, description="steps between validations: losses and, but over divided weights, captions of a few pictures"
    )
    save_every: Positive | None = Field(None, description="only at the end unless given")
    max_bad_steps: Positive = Field(5, description="steps in a row without a finite gradient before the run gives up")
    keep: Positive = Field(2, description="checkpoints to keep")
    keep_best: bool = Field(False, description="keep the checkpoint of the lowest validation loss too, and use it")
    report_to: list[Literal["tensorboard"]] = Field(default_factory=list)


class Run(Section):
    """Everything that decides what a run does."""

    model: Model
    tokenizer: Tokenizer
    data: Data
    losses: list[Loss] = Field(min_length=1)
    train: Train

    @property
    def pairs(self) -> PairData:
        """The data of a run on pictures with captions. Errors: another run."""
        if not isinstance(self.data, PairData):
            what = "no pictures" if isinstance(self.data, TextData) else "conversations in place of captions"
            raise ValueError(f"data.kind={self.data.kind}: this run has {what}")
        return self.data

    @property
    def pictures(self) -> PairData | ChatData:
        """The data of a run on pictures. Errors: a run on text alone."""
        return self.data if isinstance(self.data, ChatData) else self.pairs

    @model_validator(mode="after")
    def _parts_fit_losses(self) -> "Run":
        problems = list(_misfits(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _misfits(run: Run) -> list[str]:
    kinds = [loss.kind for loss in run.losses]
    problems = [f"losses: {kind} stands there twice" for kind in sorted(set(kinds)) if kinds.count(kind) > 1]
    if isinstance(run.data, TextData):
        problems += _text_misfits(run)
    else:
        problems += _pair_misfits(run.model, kinds, run.data.kind)
    problems += _chat_misfits(run, run.data) if isinstance(run.data, ChatData) else []
    if run.train.accumulate == 1 and any(isinstance(loss, ItcLoss) and loss.over == "step" for loss in run.losses):
        problems.append("losses: itc over=step: a step is one pass with train.accumulate=1; raise that, or leave over")
    if run.train.warmup >= run.train.steps:
        problems.append(f"train.warmup: {run.train.warmup} is not below train.steps={run.train.steps}")
    vision = run.model.vision
    if vision is not None and vision.dtype is not None and not vision.frozen:
        problems.append("model.vision.dtype: only for a frozen encoder; a trained one follows train.precision")
    if run.train.keep_best and run.data.val is None:
        problems.append("train.keep_best: the best is told by data.val, which is not set")
    if run.train.activation_checkpointing and isinstance(run.model.language, HuggingFaceLanguage):
        problems.append("train.activation_checkpointing: model.language.kind=huggingface has no means for it")
    return problems


def _text_misfits(run: Run) -> list[str]:
    model = run.model
    parts = {"vision": model.vision, "connector": model.connector, "text": model.text}
    problems = [f"model.{name}: data.kind=text has no pictures" for name, part in parts.items() if part is not None]
    if model.language is None:
        problems.append("model.language: not set, and it is what learns from data.kind=text")
    problems += [f"losses: {loss.kind} needs pictures" for loss in run.losses if loss.kind != "lm"]
    return problems


def _chat_misfits(run: Run, data: ChatData) -> list[str]:
    connector = run.model.connector
    problems = [f"losses: {loss.kind} is for data.kind=pairs" for loss in run.losses if loss.kind != "lm"]
    if run.model.language is None:
        problems.append("model.language: not set, and it is what learns from data.kind=chats")
    if data.instruction is not None and not (isinstance(connector, QFormerConnector) and connector.text):
        problems.append("data.instruction: only model.connector.kind=qformer with text=true reads one")
    return problems


def _pair_misfits(model: Model, kinds: Sequence[str], data: str) -> list[str]:
    qformer = model.connector if isinstance(model.connector, QFormerConnector) else None
    reads = qformer is not None and qformer.text
    problems = [
        f"model.{name}: not set, and data.kind={data} has pictures"
        for name, part in (("vision", model.vision), ("connector", model.connector))
        if part is None
    ]
    if "itc" in kinds and model.text is None and not reads:
        problems.append("losses: itc needs model.text, or model.connector.kind=qformer with text=true")
    if "itm" in kinds and not reads:
        problems.append("losses: itm needs model.connector.kind=qformer with text=true")
    if "itm" in kinds and "itc" not in kinds:
        problems.append("losses: itm draws its hard negatives by itc, which is not among the losses")
    if "lm" in kinds and model.language is None and qformer is not None and reads and qformer.text_head == "none":
        problems.append("losses: lm is written by the Q-Former, which has model.connector.text_head=none")
    if "lm" in kinds and model.language is None and not reads:
        problems.append("losses: lm needs model.language, or model.connector.kind=qformer with text=true")
    if model.language is not None and isinstance(model.connector, PoolConnector):
        problems.append("model.connector: a pooled image is for itc; a language model reads linear, mlp or qformer")
    return problems
