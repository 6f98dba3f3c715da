"""The model in the clear, by onnxruntime: what an encrypted result is compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.arrays import Array
from mpcserve.cli.arrays import batches
from mpcserve.errors import InputError, ModelError


@dataclass(frozen=True, slots=True)
class ModelInput:
    """An input as the model declares it; None stands for a dimension left open.

    `dtype`: NumPy's name; "str" for text.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Plaintext:
    """A float model on `threads` threads (0: all)."""

    def __init__(self, model: Path, threads: int = 0) -> None:
        """Raises: ModelError when onnxruntime cannot load it."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = options.inter_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:  # onnxruntime's exceptions have no public common class
            raise ModelError(
                f"{model}: onnxruntime cannot load it: {str(e).splitlines()[0]}",
                "run `mpcserve check` on it",
            ) from None
        self.model = model
        self.inputs = tuple(
            ModelInput(
                i.name,
                _dtype(i.type),
                tuple(d if isinstance(d, int) else None for d in i.shape),
            )
            for i in self._session.get_inputs()
        )

        maps = any(o.type.startswith("seq(map") for o in self._session.get_outputs())
        self._classes = _classes_of(model) if maps else {}

    @property
    def batch(self) -> int | None:
        """The leading dimension that the model insists on, or None."""
        first = self.inputs[0].shape
        return first[0] if first else None

    def run(self, arrays: Mapping[str, Array]) -> list[NDArray[Any]]:
        """All outputs for any number of rows. Raises: InputError."""
        feed = {i.name: arrays[i.name].astype(i.dtype) for i in self.inputs}
        rows = len(next(iter(feed.values())))
        size = self.batch or rows
        if size == rows:  # also of models whose results have no rows
            return self._once(feed)
        parts = [
            [o[:used] for o in self._once(dict(zip(feed, cut, strict=True)))]
            for used, cut in batches(feed, size)
        ]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def seconds(self, arrays: Mapping[str, Array], runs: int) -> list[float]:
        """Wall seconds of each of `runs` evaluations of all rows, after one to warm up."""
        self.run(arrays)
        taken = []
        for _ in range(runs):
            begin = time.perf_counter()
            self.run(arrays)
            taken.append(time.perf_counter() - begin)
        return taken

    def _once(self, feed: Mapping[str, Array]) -> list[NDArray[Any]]:
        try:
            names = [o.name for o in self._session.get_outputs()]
            outputs = self._session.run(names, dict(feed))
        except Exception as e:  # as above
            shapes = ", ".join(f"{n} {a.shape}" for n, a in feed.items())
            expected = ", ".join(f"{i.name} {i.shape}" for i in self.inputs)
            raise InputError(
                f"{self.model}: expected {expected}, got {shapes}: {str(e).splitlines()[0]}",
                "give inputs of the model's shape, one row per sample",
            ) from None
        return [_matrix(o, self._classes.get(n, ())) for n, o in zip(names, outputs, strict=True)]


def _dtype(kind: str) -> str:
    """onnxruntime's name of an element type, "tensor(float)", as NumPy's."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "bfloat16": "float32", "double": "float64", "string": "str"}.get(
        name, name
    )


def _classes_of(model: Path) -> Mapping[str, tuple[str, ...] | tuple[int, ...]]:
    """Output that a ZipMap makes → its classes."""
    import onnx

    from mpcserve.compiler.importing import zipped

    return zipped(onnx.load(str(model), load_external_data=False).graph)


def _matrix(output: Any, classes: Sequence[str | int]) -> NDArray[Any]:
    """An output; maps of probabilities by class become rows, as in a compiled model."""
    if isinstance(output, list):
        return np.array([[row[c] for c in classes] for row in output])
    return np.asarray(output)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results, element by element; `top1` is the share of rows with the same largest logit."""

    max_error: float
    mean_error: float
    top1: float | None


def compare(got: NDArray[Any], expected: NDArray[Any]) -> Comparison:
    """Absolute errors, and the agreement of the predictions where there are classes."""
    if expected.dtype.kind in "OU":  # names of classes: wrong or right
        wrong = float(np.mean(got != expected))
        return Comparison(float(wrong > 0), wrong, 1 - wrong)
    error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    mine, theirs = predictions(got), predictions(expected)
    same = None if mine is None or theirs is None else float(np.mean(mine == theirs))
    return Comparison(
        float(error.max(initial=0.0)), float(error.mean()) if error.size else 0.0, same
    )


def predictions(logits: NDArray[Any]) -> NDArray[np.int64] | None:
    """Class of each row: where its largest value is, or the value itself where it is a label."""
    if logits.ndim == 0 or logits.dtype.kind in "OU":
        return None
    rows = logits.reshape(len(logits), -1)
    if logits.dtype.kind in "iu":
        return rows[:, 0].astype(np.int64) if rows.shape[1] == 1 else None
    return rows.argmax(axis=1) if rows.shape[1] > 1 else None
