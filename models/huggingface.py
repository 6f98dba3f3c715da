"""Networks of HuggingFace's `transformers`, as torch exports them: `python -m models.huggingface`.

The classes are that package's own; their configurations are written here, so that nothing is
loaded, and weights are drawn from a seed: dense layers keep a variance of one, embeddings and
normalisations spread as trained ones do. All inputs are secret: token ids, masks, pictures, sounds.
`models/zoo.py --of huggingface` measures them; `--tests` writes the small ones that tests read.
Needs torch, onnx, onnxscript and transformers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from models.nets import CALIBRATION, EXPORTERS, SEED, asked, stripped

SAMPLES = 128
EMBEDDED = 0.125
"""Standard deviation of embeddings; GPT-2's trained ones have 0.14."""

TESTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "transformers"

Rows = dict[str, np.ndarray]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """What a configuration says, and the inputs that go with it: count → rows."""

    config: Settings
    rows: Callable[[int], Rows]


@dataclass(frozen=True)
class Kind:
    """`last`: of the logits only those behind the last token are wanted, as for the next one."""

    family: str
    net: Callable[[Any], nn.Module]
    config: type
    tiny: Size
    full: Size | None = None
    last: bool = False


class Exported(nn.Module):
    """Inputs in their order → the one output that is wanted."""

    def __init__(self, net: nn.Module, names: list[str], last: bool) -> None:
        super().__init__()
        self.net, self.names, self.last = net, names, last

    def forward(self, *inputs: Tensor) -> Tensor:
        found = self.net(**dict(zip(self.names, inputs, strict=True)))
        wanted: Tensor = found.logits if "logits" in found else found.last_hidden_state
        return wanted[:, -1] if self.last else wanted


def texts(tokens: int, words: int, padding: int = 0) -> Callable[[int], Rows]:
    """Texts and their masks; every other one is shorter. Words 0 to 2 are special ones."""

    def rows(count: int) -> Rows:
        rng = np.random.default_rng(SEED)
        ids = rng.integers(3, words, (count, tokens))
        ends = rng.integers(tokens // 2, tokens + 1, (count, 1))
        ends[::2] = tokens
        mask = (np.arange(tokens) < ends).astype(np.int64)
        return {"input_ids": np.where(mask, ids, padding), "attention_mask": mask}

    return rows


def pairs(tokens: int, words: int) -> Callable[[int], Rows]:
    """Two texts each: which token is of which, too."""

    def rows(count: int) -> Rows:
        made = texts(tokens, words)(count)
        second = np.arange(tokens) >= tokens // 2
        return made | {"token_type_ids": made["attention_mask"] * second}

    return rows


def prompts(tokens: int, words: int) -> Callable[[int], Rows]:
    """Texts all of one length: no mask."""
    return lambda count: {"input_ids": texts(tokens, words)(count)["input_ids"]}


def whole(tokens: int, words: int) -> Callable[[int], Rows]:
    """The same with a mask that hides nothing."""

    def rows(count: int) -> Rows:
        ids = texts(tokens, words)(count)["input_ids"]
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    return rows


def normal(name: str, *shape: int) -> Callable[[int], Rows]:
    """Pictures, spectra."""

    def rows(count: int) -> Rows:
        drawn = np.random.default_rng(SEED).standard_normal((count, *shape))
        return {name: drawn.astype(np.float32)}

    return rows


def _bert(layers: int, hidden: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **more,
    }


SMALL = _bert(1, 16, 2, 32, vocab_size=40, max_position_embeddings=12)
GROUPED = _bert(1, 16, 4, 24, vocab_size=40, max_position_embeddings=12, num_key_value_heads=2)
PATCHES = _bert(1, 16, 2, 32, image_size=12, patch_size=4)

KINDS: dict[str, Kind] = {
    "bert_tiny": Kind(
        "encoders of text",
        hf.BertModel,
        hf.BertConfig,
        Size(SMALL, pairs(8, 40)),
        Size(_bert(2, 128, 2, 512), pairs(128, 30522)),
    ),
    "bert_base": Kind(
        "encoders of text",
        hf.BertModel,
        hf.BertConfig,
        Size(_bert(2, 16, 4, 32, vocab_size=40), texts(8, 40)),
        Size({}, pairs(128, 30522)),
    ),
    "distilbert": Kind(
        "encoders of text",
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig,
        Size({"n_layers": 1, "dim": 16, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40},
             texts(8, 40)),
        Size({"num_labels": 4}, texts(128, 30522)),
    ),
    "roberta": Kind(
        "encoders of text",
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig,
        Size(SMALL, texts(8, 40, 1)),
        Size({"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
              "num_labels": 4}, texts(128, 50265, 1)),
    ),
    "deberta": Kind(
        "encoders of text",
        hf.DebertaV2Model,
        hf.DebertaV2Config,
        Size({**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
              "position_buckets": 4}, texts(8, 40)),
    ),
    "t5": Kind(
        "encoders of text",
        hf.T5EncoderModel,
        hf.T5Config,
        Size({"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1,
              "num_heads": 2}, texts(8, 40)),
        Size({}, texts(64, 32128)),
    ),
    "gpt2": Kind(
        "next token",
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        Size({"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": 40,
              "use_cache": False}, whole(8, 40)),
        Size({"use_cache": False}, whole(64, 50257)),
        last=True,
    ),
    "gpt_neox": Kind(
        "next token",
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig,
        Size({**SMALL, "use_cache": False}, whole(8, 40)),
        last=True,
    ),
    "opt": Kind(
        "next token",
        hf.OPTForCausalLM,
        hf.OPTConfig,
        Size({"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 32,
              "num_attention_heads": 2, "max_position_embeddings": 12, "word_embed_proj_dim": 16,
              "use_cache": False}, whole(8, 40)),
        last=True,
    ),
    "llama": Kind(
        "next token",
        hf.LlamaModel,
        hf.LlamaConfig,
        Size({**GROUPED, "use_cache": False}, whole(8, 40)),
        Size(_bert(1, 2048, 32, 5632, num_key_value_heads=4, vocab_size=32000, use_cache=False),
             whole(64, 32000)),
    ),
    "mistral": Kind(
        "next token",
        hf.MistralForCausalLM,
        hf.MistralConfig,
        Size({**GROUPED, "use_cache": False, "sliding_window": 4, "head_dim": 4}, whole(8, 40)),
    ),
    "gemma": Kind(
        "next token",
        hf.GemmaForCausalLM,
        hf.GemmaConfig,
        Size({**GROUPED, "use_cache": False, "head_dim": 4}, whole(8, 40)),
        last=True,
    ),
    "vit": Kind(
        "pictures",
        hf.ViTForImageClassification,
        hf.ViTConfig,
        Size({**PATCHES, "num_labels": 10}, normal("pixel_values", 3, 12, 12)),
        Size({"num_labels": 1000}, normal("pixel_values", 3, 224, 224)),
    ),
    "swin": Kind(
        "pictures",
        hf.SwinForImageClassification,
        hf.SwinConfig,
        Size({"embed_dim": 8, "depths": [2], "num_heads": [2], "image_size": 16, "patch_size": 2,
              "window_size": 4, "num_labels": 10}, normal("pixel_values", 3, 16, 16)),
    ),
    "whisper": Kind(
        "sounds",
        WhisperEncoder,
        hf.WhisperConfig,
        Size({"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
              "encoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 8,
              "vocab_size": 40, "pad_token_id": 0}, normal("input_features", 8, 16)),
    ),
}  # fmt: skip
"""Name → what is exported. Those without a full size are only tried in small."""


def built(kind: Kind, size: Size) -> nn.Module:
    """The network with seeded weights."""
    torch.manual_seed(SEED)
    net = kind.net(kind.config(**size.config))
    for module in net.modules():
        if isinstance(module, hf.pytorch_utils.Conv1D):
            nn.init.normal_(module.weight, std=module.weight.shape[0] ** -0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    for module in net.modules():  # last: a head may share its weights with them
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDED)
    return net.eval()


def export(name: str, path: Path, exporter: str, tiny: bool) -> dict[str, Any]:
    """Write the model and its samples; what there is to know of it."""
    kind = KINDS[name]
    size = kind.tiny if tiny else kind.full
    assert size is not None, f"{name} has no full size"
    rows = size.rows(CALIBRATION + SAMPLES)
    model = Exported(built(kind, size), [*rows], kind.last).eval()
    example = tuple(torch.from_numpy(v[:1]) for v in rows.values())
    names: dict[str, Any] = {"input_names": [*rows], "output_names": ["output"]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            torch.onnx.export(
                model, example, path, dynamo=True, verbose=False, external_data=False, **names
            )
        else:
            torch.onnx.export(model, example, path, dynamo=False, **names)
        shape = model(*example).shape
    for part, of in (("calibration", slice(CALIBRATION)), ("samples", slice(CALIBRATION, None))):
        np.savez(path.with_suffix(f".{part}.npz"), **{k: v[of] for k, v in rows.items()})
    return {
        "family": kind.family,
        "model": name,
        "exporter": exporter,
        "size": "tiny" if tiny else "full",
        "input": "×".join(map(str, next(iter(rows.values())).shape[1:])),
        "parameters": sum(p.numel() for p in model.parameters()),
        "axis": len(shape) - 1,
    }


def write_test(name: str, exporter: str) -> None:
    """The small network as the tests read it, and some samples."""
    path = TESTS / f"hf_{name}_{exporter}.onnx"
    export(name, path, exporter, tiny=True)
    stripped(path)
    path.with_suffix(".samples.npz").unlink()


def main() -> None:
    """Export one network; print what there is to know of it."""
    given = asked(__doc__, KINDS)
    if given.list:
        print(json.dumps({"names": [n for n, k in KINDS.items() if k.full is not None]}))
    elif given.tests:
        for name in KINDS:
            for exporter in EXPORTERS:
                write_test(name, exporter)
    else:
        print(json.dumps(export(given.name, given.file, given.exporter, given.tiny)))


if __name__ == "__main__":
    main()
