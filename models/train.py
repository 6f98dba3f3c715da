"""Train the bundled models and write them with their samples: `python models/train.py [NAME ...]`.

Needs scikit-learn, mlxtend, onnx, onnxruntime and torch (the CPU build is enough). Seeds are fixed
and one thread is used, so one machine and one set of versions give the same files every time.
The test split is only ever used for the accuracy that is printed at the end.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from data import Images, Split, breast_cancer, mnist
from numpy.typing import NDArray
from shapes import INPUT, LOGITS, OPSET, GraphBuilder
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
SEED = 0
SAMPLES = 10
CALIBRATION_ROWS = {"mnist": 16, "breast_cancer": 64}

EPOCHS = {"mnist_mlp": 80, "mnist_cnn": 80, "mnist_resnet20": 20}
BATCH = 64
PEAK_RATE = 3e-3
WEIGHT_DECAY = 1e-4
LABEL_SMOOTHING = 0.05

SHIFT = 2 / 14
"""Two pixels, in the units of affine_grid: the image is 28 pixels and 2 units wide."""
ROTATION = np.deg2rad(15)
ZOOM = 0.1
SHEAR = 0.15
ELASTIC_GRID = 7
ELASTIC = 1.2 / 14


# Breast cancer: scikit-learn trains, the graph is built by hand.


def breast_cancer_logistic(split: Split) -> onnx.ModelProto:
    """Logistic regression on standardised measurements."""
    rows, labels, _, _ = split
    scaler = StandardScaler().fit(rows)
    fitted = LogisticRegression(C=0.1).fit(scaler.transform(rows), labels)
    layers = [(fitted.coef_.T, fitted.intercept_)]
    return tabular_model("breast_cancer_logistic", scaler, layers)


def breast_cancer_mlp(split: Split) -> onnx.ModelProto:
    """Two hidden layers of 16 on standardised measurements."""
    rows, labels, _, _ = split
    scaler = StandardScaler().fit(rows)
    network = MLPClassifier((16, 16), alpha=1.0, max_iter=2000, random_state=SEED)
    fitted = network.fit(scaler.transform(rows), labels)
    layers = list(zip(fitted.coefs_, fitted.intercepts_, strict=True))
    return tabular_model("breast_cancer_mlp", scaler, layers)


def tabular_model(
    name: str, scaler: StandardScaler, layers: list[tuple[NDArray[np.float64], NDArray[np.float64]]]
) -> onnx.ModelProto:
    """Standardisation, then dense layers with Relu between them, as plain ONNX operators.

    scikit-learn's last layer gives one number z, the log-odds of class 1; the model gives the two
    logits −z/2 and z/2, whose softmax is the same probability and whose argmax is the class.
    """
    g = GraphBuilder(name)
    x = g.add("Sub", INPUT, g.weight(scaler.mean_))
    x = g.add("Mul", x, g.weight(1 / scaler.scale_))
    for weights, bias in layers[:-1]:
        x = g.add("Relu", g.add("Gemm", x, g.weight(weights), g.weight(bias)))
    weights, bias = layers[-1]
    halves = np.array([[-0.5, 0.5]])
    g.add("Gemm", x, g.weight(weights @ halves), g.weight((bias * halves)[0]), output=LOGITS)
    return g.model([len(scaler.mean_)], 2)


# MNIST: torch trains and exports.


class Normalise(nn.Module):
    """(x − mean) / deviation, of the training images."""

    def __init__(self, images: Images) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(images.mean())))
        self.register_buffer("scale", torch.tensor(1 / float(images.std())))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


def mnist_mlp(split: Split) -> onnx.ModelProto:
    """784-128-128-10, the network of SecureML (Mohassel and Zhang 2017)."""
    network = nn.Sequential(
        Normalise(split[0]),
        nn.Flatten(),
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    return image_model("mnist_mlp", network, split)


def mnist_cnn(split: Split) -> onnx.ModelProto:
    """2 convolutions, 2 max poolings, 2 dense layers: the network of MiniONN (Liu et al. 2017)."""
    network = nn.Sequential(
        Normalise(split[0]),
        nn.Conv2d(1, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    return image_model("mnist_cnn", network, split)


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut: a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.path(x) + self.shortcut(x))


def mnist_resnet20(split: Split) -> onnx.ModelProto:
    """ResNet-20 (He et al. 2015) on one channel of 28×28: stages of 16, 32 and 64 channels."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    network = nn.Sequential(
        Normalise(split[0]),
        nn.Conv2d(1, widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
        *(Block(inputs, outputs) for inputs, outputs in pairwise(widths)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], 10),
    )
    return image_model("mnist_resnet20", network, split)


def image_model(name: str, network: nn.Module, split: Split) -> onnx.ModelProto:
    """Train `network` on distorted images and export it."""
    epochs = EPOCHS[name]
    images, labels = torch.from_numpy(split[0]), torch.from_numpy(split[1])
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps)
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(images)).split(BATCH):
            logits = network(distorted(images[rows]))
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        if epoch % 10 == 9:
            print(
                f"{name}: epoch {epoch + 1}/{epochs}, mean loss {np.mean(losses):.3f}", flush=True
            )
    return exported(name, network.eval(), images[:1])


def distorted(images: Tensor) -> Tensor:
    """Each image shifted, rotated, zoomed, sheared and bent by a smooth random field."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * ROTATION
    zoom = 1 + (torch.rand(count, 2) * 2 - 1) * ZOOM
    shear = (torch.rand(count) * 2 - 1) * SHEAR
    cos, sin = torch.cos(angle), torch.sin(angle)
    top = torch.stack([cos, shear - sin], 1) * zoom[:, :1]
    bottom = torch.stack([sin, cos], 1) * zoom[:, 1:]
    shift = (torch.rand(count, 2, 1) * 2 - 1) * SHIFT
    affine = torch.cat([torch.stack([top, bottom], 1), shift], 2)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    coarse = (torch.rand(count, 2, ELASTIC_GRID, ELASTIC_GRID) * 2 - 1) * ELASTIC
    size = list(images.shape[2:])
    bend = functional.interpolate(coarse, size, mode="bicubic", align_corners=True)
    return functional.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)


def exported(name: str, network: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The network as torch's exporter writes it, with a dynamic batch dimension N."""
    path = HERE / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network,
            (example,),
            path,
            input_names=[INPUT],
            output_names=[LOGITS],
            dynamic_axes={INPUT: {0: "N"}, LOGITS: {0: "N"}},
            opset_version=OPSET,
            # Keeps the BatchNormalization nodes of a network in evaluation mode as they are.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamo=False,
        )
    model = onnx.load(path)
    model.graph.name = name
    return model


# Common to both.

TRAINERS: Mapping[str, tuple[str, Callable[[Split], onnx.ModelProto]]] = {
    "breast_cancer_logistic": ("breast_cancer", breast_cancer_logistic),
    "breast_cancer_mlp": ("breast_cancer", breast_cancer_mlp),
    "mnist_mlp": ("mnist", mnist_mlp),
    "mnist_cnn": ("mnist", mnist_cnn),
    "mnist_resnet20": ("mnist", mnist_resnet20),
}


def accuracy(model: onnx.ModelProto, rows: Images, labels: NDArray[np.int64]) -> float:
    """Share of `rows` for which onnxruntime's largest logit is the label's."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (logits,) = session.run([LOGITS], {INPUT: rows})
    return float((logits.argmax(1) == labels).mean())


def write_samples(data: str, split: Split) -> None:
    """The first test rows with their labels, and training rows from all over the split."""
    rows, _, test_rows, test_labels = split
    np.save(HERE / f"{data}_samples.npy", test_rows[:SAMPLES])
    np.save(HERE / f"{data}_labels.npy", test_labels[:SAMPLES])
    spread = np.linspace(0, len(rows) - 1, CALIBRATION_ROWS[data]).astype(int)
    np.save(HERE / f"{data}_calibration.npy", rows[spread])


def train(name: str, splits: Mapping[str, Split]) -> None:
    """Train one model, write it and print its accuracies."""
    data, trainer = TRAINERS[name]
    split = splits[data]
    torch.manual_seed(SEED)
    model = trainer(split)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, HERE / f"{name}.onnx")
    parameters = sum(int(np.prod(w.dims)) for w in model.graph.initializer)
    training, test = accuracy(model, *split[:2]), accuracy(model, *split[2:])
    print(f"{name}: {parameters} parameters, accuracy {training:.2%} training, {test:.2%} test")


def main() -> int:
    """Parse the names, train, write; 0 when all went well."""
    parser = argparse.ArgumentParser(description="Train the bundled models.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(TRAINERS)}; all when none is given"
    )
    names = parser.parse_args().names or list(TRAINERS)
    if unknown := sorted(set(names) - set(TRAINERS)):
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(TRAINERS)}")
    torch.set_num_threads(1)
    loaders = {"mnist": mnist, "breast_cancer": breast_cancer}
    splits = {data: loaders[data]() for data in {TRAINERS[name][0] for name in names}}
    for data, split in splits.items():
        write_samples(data, split)
    for name in names:
        train(name, splits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
