"""torchscale's RetNet from the arguments of its RetNetConfig."""

from torch import nn

from vlm.model.published.part import Part, Settings
from vlm.model.retnet import retnet
from vlm.model.weights.retnet import retnet_table

RETNET = {
    "vocab_size": -1,
    "decoder_embed_dim": 768,
    "decoder_value_embed_dim": 1280,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 1280,
    "decoder_layers": 12,
    "decoder_normalize_before": True,
    "activation_fn": "gelu",
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "moe_freq": 0,
    "deepnorm": False,
    "subln": True,
    "multiway": False,
    "share_decoder_input_output_embed": False,
    "no_output_layer": False,
    "layernorm_eps": 1e-6,
    "xpos_rel_pos": False,
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "swish": nn.SiLU, "relu": nn.ReLU}


def retnet_part(s: Settings) -> Part:
    """The decoder of torchscale 0.3. Errors: arguments that change what our parts compute."""
    s.expect(
        decoder_normalize_before=(True,),
        activation_fn=tuple(_ACTIVATIONS),
        no_scale_embedding=(True,),
        layernorm_embedding=(False,),
        moe_freq=(0,),
        deepnorm=(False,),
        multiway=(False,),
        no_output_layer=(False,),
        xpos_rel_pos=(False,),
    )
    if s["vocab_size"] < 1:
        raise ValueError(f"{s.where}: vocab_size={s['vocab_size']}: it has to say how many tokens there are")
    tied = bool(s["share_decoder_input_output_embed"])
    module = retnet(
        s["vocab_size"],
        s["decoder_embed_dim"],
        s["decoder_layers"],
        s["decoder_retention_heads"],
        s["decoder_value_embed_dim"],
        s["decoder_ffn_embed_dim"],
        eps=s["layernorm_eps"],
        tied=tied,
        activation=_ACTIVATIONS[s["activation_fn"]](),
    )
    return Part(module, retnet_table(tied))
