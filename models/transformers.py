"""Small transformers in plain torch, for tests: `python models/transformers.py`.

    bert    embeddings of secret token ids, a mask of integers, GELU       Devlin et al. 2018
    gpt2    causal blocks with tanh-GELU, next-token logits                Radford et al. 2019
    llama   RMSNorm, rotary positions, grouped queries, SwiGLU             Touvron et al. 2023
    vit     patches by a convolution, a class token, attention by torch    Dosovitskiy et al. 2020

They are written as the usual implementations are, and exported by torch's new and by its old
exporter. Weights are drawn from a seed. Beside NAME_EXPORTER.onnx lie samples to calibrate on;
those of full size are in `huggingface.py`. Needs torch, onnx and onnxscript.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as f

SEED, SAMPLES = 3, 2
EXPORTERS = ("dynamo", "legacy")
TESTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "transformers"


@dataclass(frozen=True)
class Sizes:
    """`groups`: heads of keys and values; `inner`: width between the two dense layers."""

    layers: int
    hidden: int
    heads: int
    inner: int
    tokens: int
    words: int
    groups: int = 0


class BertLayer(nn.Module):
    """Attention, then two dense layers; normalisation behind every sum."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads = s.heads
        self.query, self.key, self.value = (nn.Linear(s.hidden, s.hidden) for _ in range(3))
        self.dense = nn.Linear(s.hidden, s.hidden)
        self.up, self.down = nn.Linear(s.hidden, s.inner), nn.Linear(s.inner, s.hidden)
        self.first, self.second = nn.LayerNorm(s.hidden), nn.LayerNorm(s.hidden)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (_split(p(x), self.heads) for p in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / sqrt(q.shape[-1]) + mask
        weights = self.dropout(scores.softmax(-1))
        x = self.first(x + self.dense(_joined(torch.matmul(weights, v))))
        return self.second(x + self.down(f.gelu(self.up(x))))


class Bert(nn.Module):
    """(token ids, 1 for a token and 0 for padding, token types) → hidden states."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.words = nn.Embedding(s.words, s.hidden)
        self.positions = nn.Embedding(s.tokens, s.hidden)
        self.types = nn.Embedding(2, s.hidden)
        self.norm = nn.LayerNorm(s.hidden)
        self.layers = nn.ModuleList(BertLayer(s) for _ in range(s.layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        low = torch.finfo(torch.float32).min
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * low
        where = torch.arange(input_ids.shape[1])
        x = self.words(input_ids) + self.types(token_type_ids) + self.positions(where)
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Gpt2Layer(nn.Module):
    """Normalisation before attention and before the dense layers."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads = s.heads
        self.all, self.dense = nn.Linear(s.hidden, 3 * s.hidden), nn.Linear(s.hidden, s.hidden)
        self.up, self.down = nn.Linear(s.hidden, s.inner), nn.Linear(s.inner, s.hidden)
        self.first, self.second = nn.LayerNorm(s.hidden), nn.LayerNorm(s.hidden)
        self.register_buffer("seen", torch.ones(s.tokens, s.tokens).tril().bool()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(p, self.heads) for p in self.all(self.first(x)).chunk(3, -1))
        scores = torch.matmul(q, k.transpose(-1, -2)) / sqrt(q.shape[-1])
        low = torch.full([], torch.finfo(scores.dtype).min)
        scores = torch.where(self.seen[:, :, : x.shape[1], : x.shape[1]], scores, low)
        x = x + self.dense(_joined(torch.matmul(scores.softmax(-1), v)))
        return x + self.down(_gelu(self.up(self.second(x))))


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(sqrt(2.0 / pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Gpt2(nn.Module):
    """Token ids → logits of the next token behind each."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.words, self.positions = (nn.Embedding(n, s.hidden) for n in (s.words, s.tokens))
        self.layers = nn.ModuleList(Gpt2Layer(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.hidden)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return torch.matmul(self.norm(x), self.words.weight.T) / sqrt(x.shape[-1])


class RmsNorm(nn.Module):
    """x over the root of its mean square."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaLayer(nn.Module):
    """Rotary positions, grouped queries, SwiGLU."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads, self.groups, width = s.heads, s.groups, s.hidden // s.heads
        self.query = nn.Linear(s.hidden, s.hidden, bias=False)
        self.key, self.value = (nn.Linear(s.hidden, s.groups * width, bias=False) for _ in range(2))
        self.dense = nn.Linear(s.hidden, s.hidden, bias=False)
        self.gate, self.up = (nn.Linear(s.hidden, s.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(s.inner, s.hidden, bias=False)
        self.first, self.second = RmsNorm(s.hidden), RmsNorm(s.hidden)
        self.register_buffer("rates", 1e4 ** (-torch.arange(0, width, 2) / width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (
            _split(self.query(y), self.heads),
            *(_split(p(y), self.groups) for p in (self.key, self.value)),
        )
        angles = torch.arange(x.shape[1])[:, None] * self.rates
        cosine, sine = (t(torch.cat([angles, angles], -1)) for t in (torch.cos, torch.sin))
        q, k = (p * cosine + _half_turned(p) * sine for p in (q, k))
        k, v = (_repeated(p, self.heads // self.groups) for p in (k, v))
        mixed = f.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dense(_joined(mixed))
        y = self.second(x)
        return x + self.down(f.silu(self.gate(y)) * self.up(y))


def _half_turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def _repeated(x: Tensor, times: int) -> Tensor:
    batch, groups, length, width = x.shape
    wide = x[:, :, None].expand(batch, groups, times, length, width)
    return wide.reshape(batch, groups * times, length, width)


class Llama(nn.Module):
    """Token ids → hidden states."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.words = nn.Embedding(s.words, s.hidden)
        self.layers = nn.ModuleList(LlamaLayer(s) for _ in range(s.layers))
        self.norm = RmsNorm(s.hidden)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class VitLayer(nn.Module):
    """Queries, keys and values from one product; torch's own attention."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads = s.heads
        self.all, self.dense = nn.Linear(s.hidden, 3 * s.hidden), nn.Linear(s.hidden, s.hidden)
        self.up, self.down = nn.Linear(s.hidden, s.inner), nn.Linear(s.inner, s.hidden)
        self.first, self.second = nn.LayerNorm(s.hidden), nn.LayerNorm(s.hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        parts = self.all(self.first(x)).reshape(batch, length, 3, self.heads, size // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.dense(_joined(f.scaled_dot_product_attention(q, k, v)))
        return x + self.down(f.gelu(self.up(self.second(x))))


class Vit(nn.Module):
    """Pictures → logits of their class token; `words` are classes, `tokens` patches and one."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, s.hidden, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, s.hidden))
        self.positions = nn.Parameter(torch.randn(1, s.tokens, s.hidden))
        self.layers = nn.ModuleList(VitLayer(s) for _ in range(s.layers))
        self.norm, self.head = nn.LayerNorm(s.hidden), nn.Linear(s.hidden, s.words)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def _split(x: Tensor, heads: int) -> Tensor:
    batch, length, size = x.shape
    return x.view(batch, length, heads, size // heads).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * width)


NETS: dict[str, tuple[type[nn.Module], Sizes]] = {
    "bert": (Bert, Sizes(1, 32, 2, 64, 12, 60)),
    "gpt2": (Gpt2, Sizes(1, 32, 2, 64, 12, 60)),
    "llama": (Llama, Sizes(1, 32, 4, 48, 12, 60, 2)),
    "vit": (Vit, Sizes(1, 32, 2, 64, 17, 10)),
}


def samples(name: str, sizes: Sizes, count: int) -> dict[str, np.ndarray]:
    """Inputs drawn from a seed, the last few tokens of every other text being padding."""
    rng = np.random.default_rng(SEED)
    if name == "vit":
        side = 4 * round(sqrt(sizes.tokens - 1))
        return {"image": rng.normal(size=(count, 3, side, side)).astype(np.float32)}
    shape = (count, sizes.tokens)
    ids = rng.integers(0, sizes.words, shape)
    if name != "bert":
        return {"input_ids": ids}
    ends = rng.integers(sizes.tokens // 2, sizes.tokens + 1, (count, 1))
    ends[::2] = sizes.tokens
    mask = (np.arange(sizes.tokens) < ends).astype(np.int64)
    types = (np.arange(sizes.tokens) >= sizes.tokens // 2).astype(np.int64)
    every = {"input_ids": ids * mask, "attention_mask": mask}
    return every | {"token_type_ids": np.broadcast_to(types, shape).copy()}


def built(name: str) -> nn.Module:
    """The network with seeded weights: layers of about unit variance, embeddings as trained."""
    torch.manual_seed(SEED)
    kind, sizes = NETS[name]
    net = kind(sizes)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return net.eval()


def export(name: str, exporter: str) -> None:
    """Write the model of one sample, and samples to calibrate on."""
    path = TESTS / f"{name}_{exporter}.onnx"
    arrays = samples(name, NETS[name][1], SAMPLES)
    example = tuple(torch.from_numpy(a[:1]) for a in arrays.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"dynamo": exporter == "dynamo", "input_names": [*arrays]}
        if exporter == "dynamo":
            options |= {"external_data": False, "verbose": False}
        torch.onnx.export(built(name), example, str(path), output_names=["output"], **options)
    np.savez(path.with_suffix(".calibration.npz"), **arrays)


if __name__ == "__main__":
    for name in NETS:
        for exporter in EXPORTERS:
            export(name, exporter)
