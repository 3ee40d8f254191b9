"""CLIP's weights for our two towers: in the layout of OpenAI and open_clip, and in Hugging Face's."""

from vlm.model.weights.conversion import SCALAR, Reshaped, Transposed
from vlm.model.weights.rows import Row, Subtree, linear
from vlm.model.weights.table import Table, system

VISUAL, TRUNK = "vision.backbone.visual.", "vision.backbone.model."


def mha_rows(theirs: str, ours: str) -> list[Row]:
    """torch's `MultiheadAttention` over tokens of one kind, for our attentions."""
    parts = ("query", "key", "value")
    return [
        Row(f"{theirs}.in_proj_weight", tuple(f"{ours}.{part}.weight" for part in parts)),
        Row(f"{theirs}.in_proj_bias", tuple(f"{ours}.{part}.bias" for part in parts)),
        *linear(f"{theirs}.out_proj", f"{ours}.out"),
    ]


def block_rows(theirs: str, ours: str) -> list[Row]:
    """A residual block of open_clip without cross-attention."""
    return [
        *mha_rows(f"{theirs}.attn", f"{ours}.mixer"),
        *linear(f"{theirs}.ln_1", f"{ours}.mixer_residual.norm"),
        *linear(f"{theirs}.ln_2", f"{ours}.ffn_residual.norm"),
        *linear(f"{theirs}.mlp.c_fc", f"{ours}.ffn.up"),
        *linear(f"{theirs}.mlp.c_proj", f"{ours}.ffn.down"),
    ]


def open_clip_text_table() -> Table:
    """open_clip's text tower without its projection, for `TextEncoder`."""
    rows = [
        *block_rows("transformer.resblocks.{i}", "stack.blocks.{i}"),
        *linear("ln_final", "stack.norm"),
        Row("token_embedding.weight", "embedding.weight"),
        Row("positional_embedding", "position"),
    ]
    return Table("open_clip text tower", tuple(rows), ignored=(r"attn_mask",))


def open_clip_table(image: Table | None = None, text: str = "", bias: bool = False, logit_bias: bool = False) -> Table:
    """OpenAI's and open_clip's two towers; `image`: table of the image tower, open_clip's own ViT unless given.

    `text`: what the names of the text tower start with ("text." in `CustomTextCLIP`); `bias`: its projection has one.
    OpenAI's files also hold three numbers that are no weights.
    """
    rows = [Row("logit_scale", "contrast.log_scale", SCALAR)]
    rows += [Row("logit_bias", "contrast.logit_bias", SCALAR)] if logit_bias else []
    projection = f"{text}text_projection"
    rows += linear(projection, "contrast.text") if bias else [Row(projection, "contrast.text.weight", Transposed())]
    numbers = ("input_resolution", "context_length", "vocab_size")
    return system(
        "open_clip",
        own_vit_table() if image is None else image,
        open_clip_text_table().under(text, "text."),
        Table("", tuple(rows), ignored=numbers),
    )


def own_vit_table() -> Table:
    """open_clip's ViT, which runs here as it is, without its projection."""
    rows = Subtree("visual.", VISUAL, but=("proj",)), Row("visual.proj", "contrast.image.weight", Transposed())
    return Table("open_clip image tower", rows)


def timm_token_table() -> Table:
    """A tower of timm's in open_clip whose class token is projected by the classifier."""
    body = Subtree("visual.trunk.", TRUNK, but=(r"head\..*",))
    return Table("open_clip image tower of timm", (body, *linear("visual.trunk.head", "contrast.image")))


def timm_map_table(width: int) -> Table:
    """A tower of timm's in open_clip whose patches an attention pool makes one vector of: SigLIP."""
    theirs, ours = "visual.trunk.attn_pool", "connector"
    rows = [
        Row(f"{theirs}.latent", f"{ours}.queries", Reshaped((1, 1, width), (1, width))),
        *linear(f"{theirs}.q", f"{ours}.attention.query"),
        *(
            Row(f"{theirs}.kv.{part}", tuple(f"{ours}.attention.{name}.{part}" for name in ("key", "value")))
            for part in ("weight", "bias")
        ),
        *linear(f"{theirs}.proj", f"{ours}.attention.out"),
        *linear(f"{theirs}.norm", f"{ours}.ffn_norm"),
        *linear(f"{theirs}.mlp.fc1", f"{ours}.ffn.up"),
        *linear(f"{theirs}.mlp.fc2", f"{ours}.ffn.down"),
    ]
    return Table("open_clip image tower of timm", (Subtree("visual.trunk.", TRUNK, but=(r"attn_pool\..*",)), *rows))


def hf_clip_table() -> Table:
    """Hugging Face's `CLIPModel`, for the same."""
    heads = [
        Row("visual_projection.weight", "contrast.image.weight"),
        Row("text_projection.weight", "contrast.text.weight"),
        Row("logit_scale", "contrast.log_scale", SCALAR),
    ]
    return system(
        "clip",
        hf_clip_vision_table().under("vision_model.", VISUAL),
        hf_text_table().under("text_model.", "text."),
        Table("", tuple(heads)),
    )


def hf_text_table() -> Table:
    """The text tower of Hugging Face's CLIP and SigLIP (`text_model.` already taken off) for `TextEncoder`."""
    theirs, ours = "encoder.layers.{i}", "stack.blocks.{i}"
    attention = f"{theirs}.self_attn"
    pairs = [
        *((f"{attention}.{name[0]}_proj", f"{ours}.mixer.{name}") for name in ("query", "key", "value")),
        (f"{attention}.out_proj", f"{ours}.mixer.out"),
        (f"{theirs}.layer_norm1", f"{ours}.mixer_residual.norm"),
        (f"{theirs}.layer_norm2", f"{ours}.ffn_residual.norm"),
        (f"{theirs}.mlp.fc1", f"{ours}.ffn.up"),
        (f"{theirs}.mlp.fc2", f"{ours}.ffn.down"),
        ("final_layer_norm", "stack.norm"),
    ]
    rows = [row for a, b in pairs for row in linear(a, b)]
    rows += [
        Row("embeddings.token_embedding.weight", "embedding.weight"),
        Row("embeddings.position_embedding.weight", "position"),
    ]
    return Table("text tower", tuple(rows), ignored=(r"embeddings\.position_ids",))


def hf_clip_vision_table() -> Table:
    """Hugging Face's CLIP image tower (`vision_model.` already taken off) for open_clip's `VisionTransformer`."""
    theirs, ours = "encoder.layers.{i}", "transformer.resblocks.{i}"
    attention = f"{theirs}.self_attn"
    fused = [
        Row(tuple(f"{attention}.{name}_proj.{part}" for name in "qkv"), f"{ours}.attn.in_proj_{part}")
        for part in ("weight", "bias")
    ]
    pairs = [
        (f"{attention}.out_proj", f"{ours}.attn.out_proj"),
        (f"{theirs}.layer_norm1", f"{ours}.ln_1"),
        (f"{theirs}.layer_norm2", f"{ours}.ln_2"),
        (f"{theirs}.mlp.fc1", f"{ours}.mlp.c_fc"),
        (f"{theirs}.mlp.fc2", f"{ours}.mlp.c_proj"),
        ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"),
    ]
    rows = fused + [row for a, b in pairs for row in linear(a, b)]
    rows += [
        Row("embeddings.class_embedding", "class_embedding"),
        Row("embeddings.position_embedding.weight", "positional_embedding"),
        Row("embeddings.patch_embedding.weight", "conv1.weight"),
    ]
    return Table("CLIP image tower", tuple(rows), ignored=(r"embeddings\.position_ids",))


def hf_siglip_table(width: int) -> Table:
    """Hugging Face's `SiglipModel` for timm's ViT, our attention pool and two towers; `width`: of the image tower."""
    head, pool = "vision_model.head", "connector"
    rows = [
        Row(f"{head}.probe", f"{pool}.queries", Reshaped((1, 1, width), (1, width))),
        *mha_rows(f"{head}.attention", f"{pool}.attention"),
        *linear(f"{head}.layernorm", f"{pool}.ffn_norm"),
        *linear(f"{head}.mlp.fc1", f"{pool}.ffn.up"),
        *linear(f"{head}.mlp.fc2", f"{pool}.ffn.down"),
        *linear("text_model.head", "contrast.text"),
        Row("logit_scale", "contrast.log_scale"),
        Row("logit_bias", "contrast.logit_bias"),
    ]
    return system(
        "siglip",
        hf_siglip_vision_table(width).under("vision_model.", "vision.backbone.model."),
        hf_text_table().under("text_model.", "text."),
        Table("", tuple(rows)),
    )


def hf_siglip_vision_table(width: int) -> Table:
    """SigLIP's image tower without its pooling head (`vision_model.` already taken off) for timm's ViT."""
    theirs, ours = "encoder.layers.{i}", "blocks.{i}"
    attention = f"{theirs}.self_attn"
    fused = [
        Row(tuple(f"{attention}.{name}_proj.{part}" for name in "qkv"), f"{ours}.attn.qkv.{part}")
        for part in ("weight", "bias")
    ]
    pairs = [
        (f"{attention}.out_proj", f"{ours}.attn.proj"),
        (f"{theirs}.layer_norm1", f"{ours}.norm1"),
        (f"{theirs}.layer_norm2", f"{ours}.norm2"),
        (f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1"),
        (f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2"),
        ("post_layernorm", "norm"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
    ]
    rows = fused + [row for a, b in pairs for row in linear(a, b)]
    rows.append(Row("embeddings.position_embedding.weight", "pos_embed", Reshaped((-1, width), (1, -1, width))))
    return Table("SigLIP image tower", tuple(rows), ignored=(r"embeddings\.position_ids",))
