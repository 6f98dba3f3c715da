"""The bundled models are what models/README.md says: valid, plain, accurate and reproducible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from models import data, shapes

MODELS = Path(data.__file__).parent
NAMES = ("breast_cancer_logistic", "breast_cancer_mlp", "mnist_cnn", "mnist_mlp", "mnist_resnet20")
TEST_ACCURACY = {
    "breast_cancer_logistic": 0.98,
    "breast_cancer_mlp": 0.98,
    "mnist_cnn": 0.98,
    "mnist_mlp": 0.97,
    "mnist_resnet20": 0.98,
}
"""Floors, a little under what models/README.md reports."""

PLAIN_OPS = {
    *("Sub", "Mul", "Add", "Gemm", "Conv", "BatchNormalization", "Relu", "Flatten"),
    *("MaxPool", "GlobalAveragePool", "Identity"),
}
MAX_TOTAL_BYTES = 2_500_000


def samples_of(name: str, kind: str) -> np.ndarray:
    """An array that lies beside the model: samples, labels or calibration."""
    path = MODELS / f"{name.rpartition('_')[0]}_{kind}.npy"
    return np.load(path, allow_pickle=False)


def logits_of(model: onnx.ModelProto, rows: np.ndarray) -> np.ndarray:
    """What onnxruntime gives for `rows`, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(["logits"], {"input": rows})
    return logits


@pytest.fixture(scope="module")
def splits() -> dict[str, data.Split]:
    return {"mnist": data.mnist(), "breast_cancer": data.breast_cancer()}


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_model_is_valid_and_made_of_plain_operators(name: str) -> None:
    model = onnx.load(MODELS / f"{name}.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} <= PLAIN_OPS
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_model_has_one_input_one_output_and_a_batch_named_n(name: str) -> None:
    graph = onnx.load(MODELS / f"{name}.onnx").graph
    values = [*graph.input, *graph.output]
    assert [v.name for v in values] == ["input", "logits"]
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in values] == ["N", "N"]


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_classified_as_their_labels_say(name: str) -> None:
    logits = logits_of(onnx.load(MODELS / f"{name}.onnx"), samples_of(name, "samples"))
    np.testing.assert_array_equal(logits.argmax(1), samples_of(name, "labels"))


@pytest.mark.parametrize("name", NAMES)
def test_calibration_rows_are_training_rows_and_samples_are_test_rows(
    name: str, splits: dict[str, data.Split]
) -> None:
    train_rows, _, test_rows, test_labels = splits[name.rpartition("_")[0]]
    samples = samples_of(name, "samples")
    np.testing.assert_array_equal(samples, test_rows[: len(samples)])
    np.testing.assert_array_equal(samples_of(name, "labels"), test_labels[: len(samples)])
    known = {row.tobytes() for row in train_rows}
    calibration = samples_of(name, "calibration")
    assert calibration.dtype == np.float32
    assert {row.tobytes() for row in calibration} <= known


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_on_held_out_rows_is_as_reported(name: str, splits: dict[str, data.Split]) -> None:
    _, _, rows, labels = splits[name.rpartition("_")[0]]
    logits = logits_of(onnx.load(MODELS / f"{name}.onnx"), rows)
    assert (logits.argmax(1) == labels).mean() >= TEST_ACCURACY[name]


def test_the_mnist_split_holds_every_image_once_and_cycles_through_the_digits(
    splits: dict[str, data.Split],
) -> None:
    train, train_labels, test, test_labels = splits["mnist"]
    assert (train.shape, test.shape) == ((4000, 1, 28, 28), (1000, 1, 28, 28))
    assert len({image.tobytes() for image in (*train, *test)}) == 5000
    np.testing.assert_array_equal(train_labels, np.arange(4000) % 10)
    np.testing.assert_array_equal(test_labels, np.arange(1000) % 10)
    assert (train.min(), train.max()) == (0.0, 1.0)


def test_the_breast_cancer_split_is_the_same_every_time(splits: dict[str, data.Split]) -> None:
    first, again = splits["breast_cancer"], data.breast_cancer()
    assert (first[0].shape, first[2].shape) == ((456, 30), (113, 30))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_bundled_is_small() -> None:
    files = [*MODELS.glob("*.onnx"), *MODELS.glob("*.npy")]
    assert sum(file.stat().st_size for file in files) < MAX_TOTAL_BYTES


@pytest.mark.parametrize(
    ("build", "image", "classes"),
    [
        (shapes.mlp, (784,), 10),
        (shapes.lenet5, (1, 28, 28), 10),
        (shapes.resnet20, (3, 32, 32), 10),
        pytest.param(shapes.resnet18, (3, 224, 224), 1000, marks=pytest.mark.slow),
    ],
)
def test_a_shape_runs_with_logits_of_ordinary_size(
    build: Callable[[], onnx.ModelProto], image: tuple[int, ...], classes: int
) -> None:
    rows = np.random.default_rng(1).standard_normal((2, *image)).astype(np.float32)
    logits = logits_of(build(), rows)
    assert logits.shape == (2, classes)
    assert 0.1 < logits.std() < 10
    assert np.abs(logits).max() < 50


def test_a_shape_depends_on_its_seed_and_on_nothing_else() -> None:
    first, again = shapes.resnet20(seed=3), shapes.resnet20(seed=3)
    assert first.SerializeToString() == again.SerializeToString()
    assert first.SerializeToString() != shapes.resnet20(seed=4).SerializeToString()


def test_resnet_18_has_its_published_number_of_parameters() -> None:
    running_statistics = 2 * sum((64 * 5, 128 * 5, 256 * 5, 512 * 5))
    weights = shapes.resnet18().graph.initializer
    count = sum(int(np.prod(w.dims)) for w in weights) - running_statistics
    assert count == 11_689_512
