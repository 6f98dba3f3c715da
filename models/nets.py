"""Networks that people export, by torch: `python models/nets.py NAME FILE.onnx [--tiny]`.

Weights are drawn from a seed and scaled layer by layer so that every layer's result has about unit
variance, as that of a trained network has; BatchNormalization has the statistics of its input.
Beside FILE.onnx lie FILE.calibration.npz and FILE.samples.npz. Needs torch, torchvision, onnx and
onnxscript; those of `transformers` need that too.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torchvision import models as vision
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.inception import InceptionA, InceptionB

SEED = 7
CALIBRATION, SAMPLES = 16, 4
LOGIT_SPREAD = 4.0
"""Standard deviation of the last layer's results."""

TESTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "zoo"
EXPORTERS = ("dynamo", "legacy")


class UNet(nn.Module):
    """Down by max pooling, up by ConvTranspose or Resize, with skips; Ronneberger et al. 2015."""

    def __init__(self, width: int, depth: int, up: str, channels: int = 1, classes: int = 2):
        super().__init__()
        widths = [width << k for k in range(depth + 1)]
        pairs = list(pairwise(widths))
        self.first = _double(channels, width)
        self.down = nn.ModuleList(_double(a, b) for a, b in pairs)
        self.up = nn.ModuleList(_upsample(b, a, up) for a, b in pairs)
        self.join = nn.ModuleList(_double(2 * a, a) for a, _ in pairs)
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.first(x)]
        for block in self.down:
            skips.append(block(nn.functional.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        return self.last(x)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    """Twice convolution, normalisation, Relu."""
    layers: list[nn.Module] = []
    for a, b in ((inputs, outputs), (outputs, outputs)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


def _upsample(inputs: int, outputs: int, how: str) -> nn.Module:
    if how == "transpose":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
    resize = nn.Upsample(
        scale_factor=2, mode=how, align_corners=None if how == "nearest" else False
    )
    return nn.Sequential(resize, nn.Conv2d(inputs, outputs, 1))


class Crnn(nn.Module):
    """Convolutions, then a bidirectional LSTM along a line of text; Shi et al. 2015."""

    def __init__(self, widths: tuple[int, ...], hidden: int, height: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for k, (a, b) in enumerate(zip((1, *widths), widths, strict=False)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
            layers.append(nn.MaxPool2d(2 if k < 2 else (2, 1)))
        self.cnn = nn.Sequential(*layers)
        rows = height >> len(widths)
        self.rnn = nn.LSTM(widths[-1] * rows, hidden, bidirectional=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cnn(x)
        x, _ = self.rnn(x.flatten(1, 2).permute(2, 0, 1))
        return self.head(x)


class EcgCnn(nn.Module):
    """1-d convolutions on a series of one or more leads."""

    def __init__(self, widths: tuple[int, ...], leads: int = 1, classes: int = 5):
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in zip((leads, *widths), widths, strict=False):
            layers += [nn.Conv1d(a, b, 7, padding=3), nn.BatchNorm1d(b), nn.ReLU()]
            layers.append(nn.MaxPool1d(2))
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class EcgLstm(nn.Module):
    """LSTM layers on a series, the last state classified."""

    def __init__(self, hidden: int, layers: int, leads: int = 1, classes: int = 5):
        super().__init__()
        self.rnn = nn.LSTM(leads, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(x)
        return self.head(x[:, -1])


class InceptionBlocks(nn.Module):
    """One block of each of two kinds of Inception v3, and a classifier."""

    def __init__(self, classes: int):
        super().__init__()
        stem = [nn.Conv2d(3, 64, 3, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        self.body = nn.Sequential(*stem, InceptionA(64, pool_features=32), InceptionB(256))
        self.fc = nn.Linear(384 + 96 + 256, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(self.body(x), 1).flatten(1))


def _vgg(layers: list[int | str], classes: int) -> nn.Module:
    net = vision.VGG(vision.vgg.make_layers(layers), num_classes=classes, init_weights=False)
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier = nn.Sequential(
        nn.Linear(4 * int(layers[-2]), 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, classes)
    )
    return net


def _squeezenet(classes: int) -> nn.Module:
    fire = vision.squeezenet.Fire
    net = vision.squeezenet1_1(num_classes=classes)
    net.features = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        fire(16, 4, 8, 8),
        fire(16, 4, 8, 8),
    )
    net.classifier[1] = nn.Conv2d(16, classes, 1)
    return net


def _convnext(tiny: bool) -> nn.Module:
    if not tiny:
        return vision.convnext_tiny()
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return vision.ConvNeXt(blocks, num_classes=10, layer_scale=1e-1)


def _efficientnet(tiny: bool) -> nn.Module:
    if not tiny:
        return vision.efficientnet_b0()
    block = partial(MBConvConfig, width_mult=1.0, depth_mult=1.0)
    setting = [block(1, 3, 1, 8, 8, 1), block(4, 5, 2, 8, 16, 2)]
    return vision.EfficientNet(setting, dropout=0.2, last_channel=32, num_classes=10)


def _mobilenet(tiny: bool) -> nn.Module:
    if not tiny:
        return vision.mobilenet_v2()
    setting = [[1, 16, 1, 1], [4, 32, 2, 2]]
    net = vision.MobileNetV2(10, width_mult=0.5, inverted_residual_setting=setting)
    net.features[-1] = vision.mobilenetv2.Conv2dNormActivation(
        16, 32, kernel_size=1, activation_layer=nn.ReLU6
    )
    net.classifier[1] = nn.Linear(32, 10)
    return net


def _resnet(tiny: bool, block: Any, layers: list[int]) -> nn.Module:
    if not tiny:
        return vision.ResNet(block, layers)
    net = vision.ResNet(block, [1, 1, 1, 1], num_classes=10)
    return _narrowed(net, 32)


def _narrowed(net: nn.Module, by: int) -> nn.Module:
    """The same network with a part of the channels of every layer but the first and the last."""
    for path, layer in list(net.named_modules()):
        parent = net.get_submodule(path.rpartition(".")[0]) if path else net
        name, last = path.rpartition(".")[2], path == "fc"
        if isinstance(layer, nn.Conv2d):
            first = layer.in_channels == 3
            inputs = 3 if first else layer.in_channels // by
            new: nn.Module = nn.Conv2d(
                inputs, layer.out_channels // by, layer.kernel_size, layer.stride,
                layer.padding, bias=layer.bias is not None,
            )  # fmt: skip
        elif isinstance(layer, nn.BatchNorm2d):
            new = nn.BatchNorm2d(layer.num_features // by)
        elif isinstance(layer, nn.Linear) and last:
            new = nn.Linear(layer.in_features // by, layer.out_features)
        else:
            continue
        setattr(parent, name, new)
    return net


def _inception(tiny: bool) -> nn.Module:
    if tiny:
        return _narrowed(InceptionBlocks(10), 16)
    return vision.inception_v3(aux_logits=False, init_weights=False, transform_input=False)


def _unet(up: str, tiny: bool) -> nn.Module:
    return UNet(4, 2, up) if tiny else UNet(32, 4, up)


def _wav2vec2(tiny: bool) -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    small = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "conv_dim": (8, 8), "conv_kernel": (10, 3),
        "conv_stride": (5, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    config = Wav2Vec2Config(**(small if tiny else {}), attn_implementation="eager")

    class Logits(nn.Module):
        """Logits alone, as exports of it give them."""

        def __init__(self) -> None:
            super().__init__()
            self.net = Wav2Vec2ForCTC(config)

        def forward(self, waveform: Tensor) -> Tensor:
            return self.net(waveform).logits

    return Logits()


@dataclass(frozen=True, slots=True)
class Net:
    """`build(tiny)`; `shape`, `tiny_shape`: of one input, without the batch; `axis`: of classes."""

    build: Callable[[bool], nn.Module]
    shape: tuple[int, ...]
    tiny_shape: tuple[int, ...]
    family: str
    axis: int = 1


IMAGE = (3, 224, 224)
RESIDUAL, PLAIN, MOBILE = "residual networks", "plain convolutions", "mobile networks"
DENSE, MODERN, SEGMENT = "dense and inception blocks", "modern convolutions", "segmentation"
TEXT, SERIES, SPEECH = "lines of text", "series", "speech"
NETS: dict[str, Net] = {
    "resnet18": Net(
        lambda t: _resnet(t, vision.resnet.BasicBlock, [2, 2, 2, 2]), IMAGE, (3, 32, 32), RESIDUAL
    ),
    "resnet50": Net(
        lambda t: _resnet(t, vision.resnet.Bottleneck, [3, 4, 6, 3]), IMAGE, (3, 32, 32), RESIDUAL
    ),
    "vgg16": Net(
        lambda t: _vgg([8, "M", 16, "M"], 10) if t else vision.vgg16(), IMAGE, (3, 16, 16), PLAIN
    ),
    "squeezenet1_1": Net(
        lambda t: _squeezenet(10) if t else vision.squeezenet1_1(), IMAGE, (3, 32, 32), PLAIN
    ),
    "mobilenet_v2": Net(_mobilenet, IMAGE, (3, 32, 32), MOBILE),
    "efficientnet_b0": Net(_efficientnet, IMAGE, (3, 32, 32), MOBILE),
    "densenet121": Net(
        lambda t: vision.DenseNet(8, (2, 2), 8, num_classes=10) if t else vision.densenet121(),
        IMAGE,
        (3, 32, 32),
        DENSE,
    ),
    "inception_v3": Net(_inception, (3, 299, 299), (3, 15, 15), DENSE),
    "convnext_tiny": Net(_convnext, IMAGE, (3, 32, 32), MODERN),
    "unet_transpose": Net(partial(_unet, "transpose"), (1, 128, 128), (1, 16, 16), SEGMENT),
    "unet_bilinear": Net(partial(_unet, "bilinear"), (1, 128, 128), (1, 16, 16), SEGMENT),
    "unet_nearest": Net(partial(_unet, "nearest"), (1, 128, 128), (1, 16, 16), SEGMENT),
    "crnn": Net(
        lambda t: Crnn((4, 8), 8, 8, 11) if t else Crnn((32, 64, 128, 128), 128, 32, 80),
        (1, 32, 128),
        (1, 8, 16),
        TEXT,
        axis=2,
    ),
    "ecg_cnn": Net(
        lambda t: EcgCnn((4, 8)) if t else EcgCnn((32, 64, 128, 128)), (1, 360), (1, 64), SERIES
    ),
    "ecg_lstm": Net(lambda t: EcgLstm(8, 1) if t else EcgLstm(64, 2), (187, 1), (12, 1), SERIES),
    "wav2vec2": Net(_wav2vec2, (16000,), (200,), SPEECH, axis=2),
}


@torch.no_grad()
def settled(net: nn.Module, batch: Tensor) -> nn.Module:
    """The network, its layers scaled to unit variance on a batch one after the other."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            fan = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
        else:
            jitter = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + jitter if parameter.dim() else parameter)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Conv1d | nn.Linear)]
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = 1.0
            layer.register_forward_pre_hook(_statistics)
    for layer in layers:
        layer.register_forward_hook(_scaled)
    net.eval()(batch)
    spread = net(batch).std()
    last = layers[-1]
    last.weight.mul_(LOGIT_SPREAD / spread)
    for layer in net.modules():
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
    return net.eval()


def _statistics(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0]
    axes = [k for k in range(x.dim()) if k != 1]
    norm.running_mean.copy_(x.mean(axes))
    norm.running_var.copy_(x.var(axes) + 1e-3)


def _scaled(layer: Any, _: Any, result: Tensor) -> Tensor:
    """Once: weights divided by the deviation of what they make."""
    if not hasattr(layer, "settled"):
        layer.settled = True
        spread = result.std()
        layer.weight.div_(spread)
        return result / spread
    return result


def export(name: str, path: Path, exporter: str, tiny: bool) -> dict[str, Any]:
    """Write the model and its samples; what there is to know of it."""
    net, shape = NETS[name], NETS[name].tiny_shape if tiny else NETS[name].shape
    rng = np.random.default_rng(SEED)
    rows = rng.standard_normal((CALIBRATION + SAMPLES, *shape)).astype(np.float32)
    torch.manual_seed(SEED)
    model = settled(net.build(tiny), torch.from_numpy(rows[:CALIBRATION]))
    example = (torch.from_numpy(rows[:1]),)
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            torch.onnx.export(
                model, example, path, dynamo=True, verbose=False, external_data=False, **names
            )
        else:
            torch.onnx.export(model, example, path, dynamo=False, **names)
    np.savez(path.with_suffix(".calibration.npz"), input=rows[:CALIBRATION])
    np.savez(path.with_suffix(".samples.npz"), input=rows[CALIBRATION:])
    return {
        "family": NETS[name].family,
        "model": name,
        "exporter": exporter,
        "size": "tiny" if tiny else "full",
        "input": "×".join(map(str, shape)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "axis": NETS[name].axis,
    }


def write_test(name: str, exporter: str) -> dict[str, Any]:
    """The small network as the tests read it, without remarks; what there is to know of it."""
    path = TESTS / f"{name}.{exporter}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    card = export(name, path, exporter, tiny=True)
    path.with_suffix(".calibration.npz").unlink()
    path.with_suffix(".samples.npz").unlink()
    stripped(path)
    return card


def stripped(path: Path) -> None:
    """Drop the exporters' remarks from a file."""
    model = onnx.load(path)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save(model, path)


def asked(about: str | None, names: Iterable[str]) -> argparse.Namespace:
    """The command line of a module that exports one network: name, file, and what else to do."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("name", nargs="?", choices=names)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--list", action="store_true", help="print the names of full size")
    parser.add_argument("--tests", action="store_true", help="write those that the tests read")
    parser.add_argument("--exporter", choices=EXPORTERS, default="dynamo")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Export one network; print what there is to know of it."""
    given = asked(__doc__, NETS)
    if given.list:
        print(json.dumps({"names": list(NETS)}))
    elif given.tests:
        cards = [write_test(name, exporter) for name in NETS for exporter in EXPORTERS]
        (TESTS / "cards.json").write_text("".join(json.dumps(card) + "\n" for card in cards))
    else:
        print(json.dumps(export(given.name, given.file, given.exporter, given.tiny)))


if __name__ == "__main__":
    main()
