"""A transformer encoder through the real protocol."""

from __future__ import annotations

import numpy as np
import onnxruntime

from models.encoders import BERT_TINY, Sizes, encoder
from mpcserve.compiler import compile_model
from mpcserve.plan import bill_of
from mpcserve.protocol.together import simulate


def test_an_encoder_gives_the_hidden_states_that_onnxruntime_gives() -> None:
    model = encoder("small", Sizes(layers=2, hidden=32, heads=2, inner=64, tokens=16))
    x = np.random.default_rng(3).standard_normal((1, 16, 32)).astype(np.float32)
    compiled = compile_model(model, calibrate={"input": x})
    (hidden,), bill = simulate(compiled.plan, compiled.weights, [x])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    np.testing.assert_allclose(hidden, session.run(None, {"input": x})[0], atol=5e-3)
    assert bill == bill_of(compiled.plan)


def test_bert_tiny_costs_less_than_25_mb_online() -> None:
    model = encoder("tiny", BERT_TINY)
    x = np.random.default_rng(3).standard_normal((1, 128, 128)).astype(np.float32)
    bill = bill_of(compile_model(model, calibrate={"input": x}).plan)
    assert bill.online_bytes < 25e6
    assert bill.rounds <= 130


def test_an_encoder_needs_no_samples() -> None:
    model = encoder("small", Sizes(layers=1, hidden=32, heads=2, inner=64, tokens=16))
    x = np.random.default_rng(3).standard_normal((1, 16, 32)).astype(np.float32)
    compiled = compile_model(model, input_range=(-5.0, 5.0))
    (hidden,), _ = simulate(compiled.plan, compiled.weights, [x])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    np.testing.assert_allclose(hidden, session.run(None, {"input": x})[0], atol=5e-3)
