"""A trained network of depth 20, products mod 2^32: what it costs in accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from models import data
from mpcserve.compiler import compile_model
from mpcserve.plan import bill_of
from mpcserve.plan.ops import PRODUCTS
from mpcserve.protocol import Together
from mpcserve.reference import evaluate_clear

MODELS = Path(__file__).parent.parent / "models"
BATCH = 100
THROUGH_THE_PROTOCOL = 200


@pytest.mark.slow
def test_in_32_bits_a_trained_resnet20_classifies_as_in_float() -> None:
    _, _, images, labels = data.mnist()
    model = MODELS / "mnist_resnet20.onnx"
    calibration = np.load(MODELS / "mnist_calibration.npy")
    compiled = compile_model(model, calibrate=calibration, batch=BATCH)
    products = [i for i in compiled.plan.instructions if i.op in PRODUCTS]
    assert len(products) >= 20
    assert all(i.attrs["ring"] <= 32 for i in products)
    session = ort.InferenceSession(model)
    together = Together(compiled.plan, compiled.weights)
    right = dict.fromkeys(("float", "fixed point"), 0)
    for k in range(0, len(images), BATCH):
        x = images[k : k + BATCH].astype(np.float32)
        (logits,) = session.run(None, {"input": x})
        (fixed,) = evaluate_clear(compiled.plan, compiled.weights, [x])
        for name, y in (("float", logits), ("fixed point", fixed)):
            right[name] += int((y.argmax(axis=1) == labels[k : k + BATCH]).sum())
        if k < THROUGH_THE_PROTOCOL:
            (secret,), bill = together.infer([x])
            assert bill == bill_of(compiled.plan)
            assert np.abs(secret - logits).max() <= 2**-8
            assert np.array_equal(secret.argmax(axis=1), logits.argmax(axis=1))
    assert len(images) >= 1000
    assert right["float"] - right["fixed point"] <= 0.003 * len(images)
