"""The peer of the stage-1 benchmark: BLIP-2's losses put together from transformers' Q-Former, as its users do.

transformers ships no stage-1 loss. The recipe is LAVIS': every objective is a pass of its own over the image.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

WIDTH, HEADS, LAYERS, QUERIES, VOCABULARY, EMBED = 768, 12, 12, 32, 30522, 256


class Peer(nn.Module):
    """Q-Former, text embeddings and heads; parameter names fit our table for the Q-Former."""

    def __init__(self, image_dim: int, layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            encoder_hidden_size=image_dim,
            use_qformer_text_input=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config._attn_implementation = "sdpa"
        self.query_tokens = nn.Parameter(torch.randn(1, QUERIES, width) * 0.02)
        self.embeddings = Blip2TextEmbeddings(config)
        self.qformer = Blip2QFormerModel(config)
        self.image_proj, self.text_proj = nn.Linear(width, EMBED), nn.Linear(width, EMBED)
        self.itm_head, self.lm_head = nn.Linear(width, 2), nn.Linear(width, VOCABULARY)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, image: Tensor, ids: Tensor, dec: int) -> dict[str, Tensor]:
        """The three losses of a batch of one full-length caption per image."""
        return {**self._contrast_and_match(image, ids), "lm": self._language(image, ids, dec)}

    def _contrast_and_match(self, image: Tensor, ids: Tensor) -> dict[str, Tensor]:
        batch = len(image)
        queries = self.query_tokens.expand(batch, -1, -1)
        seen = self.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        words = self.embeddings(input_ids=ids)
        read = self.qformer(query_embeds=words, query_length=0, attention_mask=torch.ones_like(ids)).last_hidden_state
        image_vectors = normalize(self.image_proj(seen).float(), dim=-1)
        text_vectors = normalize(self.text_proj(read[:, 0]).float(), dim=-1)
        logits = torch.einsum("bqe,me->bmq", image_vectors, text_vectors).amax(-1) * self.log_scale.exp()
        target = torch.arange(batch)
        itc = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        masked = logits.detach().masked_fill(torch.eye(batch, dtype=torch.bool), -torch.inf)
        wrong_image, wrong_text = masked.argmax(0), masked.argmax(1)
        pair_image = torch.cat([image, image[wrong_image], image])
        pair_ids = torch.cat([ids, ids, ids[wrong_text]])
        both = self.embeddings(input_ids=pair_ids, query_embeds=self.query_tokens.expand(3 * batch, -1, -1))
        fused = self.qformer(
            query_embeds=both,
            query_length=QUERIES,
            attention_mask=torch.ones(both.shape[:2], dtype=torch.long),
            encoder_hidden_states=pair_image,
        ).last_hidden_state
        match = torch.cat([torch.ones(batch), torch.zeros(2 * batch)]).long()
        itm = cross_entropy(self.itm_head(fused[:, :QUERIES]).float().mean(1), match)
        return {"itc": itc, "itm": itm}

    def _language(self, image: Tensor, ids: Tensor, dec: int) -> Tensor:
        batch, length = ids.shape
        ids = torch.cat([torch.full((batch, 1), dec), ids[:, 1:]], 1)
        both = self.embeddings(input_ids=ids, query_embeds=self.query_tokens.expand(batch, -1, -1))
        mask = torch.zeros(batch, 1, QUERIES + length, QUERIES + length)
        mask[..., :QUERIES, QUERIES:] = -torch.inf
        mask[..., QUERIES:, QUERIES:] = torch.full((length, length), -torch.inf).triu(1)
        out = self.qformer(
            query_embeds=both, query_length=QUERIES, attention_mask=mask, encoder_hidden_states=image
        ).last_hidden_state
        logits = self.lm_head(out[:, QUERIES:-1]).float()
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
