"""Settings of the language model: what mixes tokens, what stands between the mixers, and where the norms are."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlm.config.section import BelowOne, Positive, Section, nothing_said, usually


class AttentionMixer(Section):
    """Softmax attention; fewer key/value heads than heads make it grouped."""

    kind: Literal["attention"] = "attention"
    kv_heads: Positive | None = None
    theta: float = Field(10_000.0, gt=0, description="base of the rotary wavelengths")
    max_positions: Positive | None = Field(None, description="learned positions, so many, in place of rotary ones")
    window: Positive | None = Field(None, description="how many of the last tokens one sees, itself among them; all")
    head_norm: bool = Field(False, description="RMSNorm on each query and key head (Qwen3)")
    bias: bool = Field(False, description="of queries, keys and values (Qwen2)")


class RetentionMixer(Section):
    """RetNet's multi-scale retention: trains in parallel, decodes at constant cost and memory."""

    kind: Literal["retention"]
    value_dim: Positive | None = Field(None, description="width of all value heads; 2 dim unless given")
    decay: Literal["powers", "geometric"] = Field("powers", description="1 - 2^(-5-h), or 1 - 1/32 ... 1 - 1/512")
    chunk: Annotated[int, Field(ge=1, le=512)] = Field(64, description="tokens of a chunk: speed alone; not for fla")
    kernel: Literal["torch", "fla"] = Field("torch", description="fla: Triton kernels, NVIDIA GPUs alone, vlm[fla]")


Mixer = Annotated[AttentionMixer | RetentionMixer, Field(discriminator="kind"), usually("attention")]


class GatedMlpFfn(Section):
    """SwiGLU."""

    kind: Literal["gated_mlp"] = "gated_mlp"
    hidden: Positive | None = Field(None, description="8/3 dim unless given")


class MoeFfn(Section):
    """A mixture of SwiGLU experts: Mixtral, and DeepSeekMoE with `shared` experts and many narrow ones."""

    kind: Literal["moe"]
    experts: Positive = 8
    top_k: Positive = Field(2, description="routed experts that one token uses")
    shared: Annotated[int, Field(ge=0)] = Field(0, description="experts that every token uses")
    hidden: Positive | None = Field(
        None, description="width inside one expert; unless given, a token's experts are as wide as the dense network"
    )
    router: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = Field(True, description="the chosen weights sum to 1 (DeepSeekMoE: false)")
    scale: float = Field(1.0, gt=0, description="what the weights are multiplied by (DeepSeek-V3: 2.5)")
    groups: Positive = Field(1, description="experts stand in so many groups ...")
    top_groups: Positive = Field(1, description="... of which a token uses the best few")
    balance: float = Field(0.01, ge=0, description="weight of the loss that keeps the experts equally used")
    device_balance: float = Field(0.0, ge=0, description="the same over `devices` groups of experts (DeepSeekMoE)")
    devices: Positive = 1
    bias_rate: float | None = Field(None, gt=0, description="balance by a bias on the choice instead (DeepSeek-V3)")
    dense_blocks: Annotated[int, Field(ge=0)] = Field(0, description="first blocks that stay dense (DeepSeekMoE: 1)")
    dense_hidden: Positive | None = Field(None, description="width inside those; 8/3 dim unless given")

    @model_validator(mode="after")
    def _numbers_fit(self) -> "MoeFfn":
        problems = []
        if self.top_k > self.experts:
            problems.append(f"top_k: {self.top_k} exceeds experts={self.experts}")
        if self.experts % self.groups:
            problems.append(f"groups: {self.groups} does not divide experts={self.experts}")
        elif self.top_groups > self.groups:
            problems.append(f"top_groups: {self.top_groups} exceeds groups={self.groups}")
        elif self.top_k > (reach := self.experts // self.groups * self.top_groups):
            problems.append(f"top_k: {self.top_k} exceeds the {reach} experts of top_groups={self.top_groups} groups")
        if self.experts % self.devices:
            problems.append(f"devices: {self.devices} does not divide experts={self.experts}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


Ffn = Annotated[GatedMlpFfn | MoeFfn, Field(discriminator="kind"), usually("gated_mlp")]


class PublishedLanguage(Section):
    """A published language model, with its weights or only its architecture."""

    kind: Literal["published"]
    name: str | None = Field(None, description="folder, file, or OWNER/NAME[@REVISION] of the hub; null: random")
    architecture: dict[str, Any] | None = Field(
        None, description="what its config.json holds (model_type, hidden_size, ...); read there unless given"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="of its weights where none of them learns")

    @property
    def source(self) -> str | None:
        """Where its weights come from; None for random ones."""
        return self.name

    @model_validator(mode="after")
    def _something_is_said(self) -> "PublishedLanguage":
        if problem := nothing_said(self.name, self.architecture):
            raise ValueError(problem)
        return self


class HuggingFaceLanguage(Section):
    """Any other causal language model of transformers, as it is: pip install 'vlm[hf]'."""

    kind: Literal["huggingface"]
    name: str = Field(description="folder, or OWNER/NAME[@REVISION] of the hub; code beside the weights is never run")
    pretrained: bool = Field(True, description="with its weights; false: random ones")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of its weights; bfloat16 where none learns")

    @property
    def source(self) -> str | None:
        """Where its weights come from; None for random ones."""
        return self.name if self.pretrained else None


class TransformerLanguage(Section):
    """A decoder, Llama-like unless told otherwise."""

    kind: Literal["transformer"]
    dim: Positive = 512
    layers: Positive = 8
    heads: Positive = 8
    mixer: Mixer = AttentionMixer()
    ffn: Ffn = GatedMlpFfn()
    norm: Literal["rms", "layer"] = "rms"
    placement: Literal["pre", "post"] = Field("pre", description="norms before the branches, or after the sums (BERT)")
    tied: bool = Field(True, description="the vocabulary head is the embedding")
    dropout: BelowOne = 0.0

    @property
    def source(self) -> str | None:
        """Where its weights come from; None for random ones."""
        return None

    @model_validator(mode="after")
    def _heads_fit(self) -> "TransformerLanguage":
        problems = []
        if self.dim % self.heads:
            problems.append(f"heads: {self.heads} does not divide dim={self.dim}")
        elif self.dim // self.heads % 2 and not (isinstance(self.mixer, AttentionMixer) and self.mixer.max_positions):
            problems.append(f"heads: a head of dim/heads={self.dim // self.heads} is odd, and rotations need pairs")
        match self.mixer:
            case AttentionMixer(kv_heads=kv_heads) if kv_heads is not None and self.heads % kv_heads:
                problems.append(f"mixer.kv_heads: {kv_heads} does not divide heads={self.heads}")
            case RetentionMixer(value_dim=value_dim) if value_dim is not None and value_dim % self.heads:
                problems.append(f"mixer.value_dim: {value_dim} is no multiple of heads={self.heads}")
            case _:
                pass
        match self.ffn:
            case MoeFfn(dense_blocks=dense) if dense >= self.layers:
                problems.append(f"ffn.dense_blocks: {dense} leaves no block with experts among layers={self.layers}")
            case _:
                pass
        if problems:
            raise ValueError("\n".join(problems))
        return self


Language = Annotated[TransformerLanguage | PublishedLanguage | HuggingFaceLanguage, Field(discriminator="kind")]
