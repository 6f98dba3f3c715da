"""The command line's pieces: units, tables, drawings, arrays, comparisons, processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from mpcserve.arrays import fitted, read_arrays
from mpcserve.bundled import bundled
from mpcserve.cli.arrays import batches, load_one, uniform
from mpcserve.cli.drawing import draw, side_by_side
from mpcserve.cli.output import table
from mpcserve.cli.plaintext import Plaintext, compare, predictions
from mpcserve.cli.results import outputs_json, print_outputs, save_outputs
from mpcserve.cli.signals import sigterm_interrupts
from mpcserve.errors import ConfigError, InputError
from mpcserve.plan.client import RawInput
from mpcserve.units import human_bytes, human_seconds

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (5e13, "50 TB")],
)
def test_bytes_are_told_in_decimal_units(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5e-6, "5 µs"), (0.0123, "12.3 ms"), (2.5, "2.5 s"), (600, "10.0 min")],
)
def test_seconds_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_a_table_in_a_pipe_has_no_escape_codes_and_no_trailing_blanks(capsys: Capture) -> None:
    table(("name", "n"), [("a" * 100, 1), ("b", 22)], title="things", footer=("total", 23))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines())
    assert out.startswith("things\n")
    assert "a" * 100 in out


def test_markup_in_a_name_is_shown_as_it_is(capsys: Capture) -> None:
    table(("layer",), [("[bold]/conv[/bold]",)])
    assert "[bold]/conv[/bold]" in capsys.readouterr().out


def test_drawings_put_two_pixels_in_a_character() -> None:
    image = np.zeros((8, 8))
    image[0:2, 0:2] = image[2:4, 2:4] = image[0:4, 4:6] = 1.0
    assert draw(image) == ["▀▄█ ", "    "]
    assert side_by_side([image, image], gap="|") == ["▀▄█ |▀▄█ ", "    |    "]


def test_batches_repeat_the_last_row_to_be_full() -> None:
    rows = np.arange(10).reshape(5, 2)
    cut = [(used, a.tolist()) for used, (a,) in batches({"x": rows}, 3)]
    assert cut == [(3, [[0, 1], [2, 3], [4, 5]]), (2, [[6, 7], [8, 9], [8, 9]])]


def test_arrays_are_matched_to_inputs_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, b=np.ones(2), a=np.zeros(2))
    loaded = read_arrays(path)
    a, b, c = (RawInput(name, "float32", (2,)) for name in "abc")
    assert list(fitted(loaded, [a, b], path)) == ["a", "b"]
    with pytest.raises(InputError, match="expected arrays named a, c, got b, a"):
        fitted(loaded, [a, c], path)
    with pytest.raises(InputError, match="expected one array, got b, a"):
        load_one(path)
    assert list(fitted(np.zeros(3), [a], path)) == ["a"]
    with pytest.raises(InputError, match=r"got \(unnamed\)"):
        fitted(np.zeros(3), [a, b], path)
    with pytest.raises(InputError, match="input 'a': expected numbers, got <U1"):
        fitted(np.array(["x", "y"]), [a], path)


def test_fixed_benchmark_values_spread_evenly() -> None:
    values = uniform((100, 100), -2, 2)
    assert values.dtype == np.float32
    assert (values == uniform((100, 100), -2, 2)).all()
    counts, _ = np.histogram(values, bins=10, range=(-2, 2))
    assert counts.sum() == 10_000
    assert counts.min() > 850


def test_comparison_measures_error_and_agreement() -> None:
    a = np.array([[0.0, 1.0], [2.0, 1.0]])
    result = compare(a + np.array([[0.5, 0.0], [-2.0, 0.0]]), a)
    assert (result.max_error, result.mean_error, result.top1) == (2.0, 0.625, 0.5)
    assert compare(np.zeros((3, 1)), np.zeros((3, 1))).top1 is None


def test_predictions_are_classes_where_there_are_any() -> None:
    assert predictions(np.array([[1.0, 3.0, 2.0]])) is not None
    labels = predictions(np.array([[4], [5]], np.int64))
    assert labels is not None and labels.tolist() == [4, 5]
    assert predictions(np.zeros((4, 1))) is None


def test_the_float_model_takes_any_number_of_rows() -> None:
    model = Plaintext(bundled("models", "mnist_cnn.onnx"), threads=1)
    images = np.load(bundled("models", "mnist_samples.npy"))
    (logits,) = model.run({"input": images})
    assert predictions(logits) is not None
    assert (logits.argmax(axis=1) == np.load(bundled("models", "mnist_labels.npy"))).all()
    with pytest.raises(InputError, match="expected input"):
        model.run({"input": images[:, :, :20]})


def test_outputs_are_printed_saved_and_told_as_json(tmp_path: Path, capsys: Capture) -> None:
    one = {"logits": np.array([[0.5, -1.0], [2.0, 3.0]], np.float32)}
    print_outputs(one)
    out = capsys.readouterr().out
    assert "logits float32[2, 2]" in out
    assert "-1.0000" in out
    save_outputs(tmp_path / "y.npy", one)
    assert (np.load(tmp_path / "y.npy") == one["logits"]).all()
    assert outputs_json(one)["logits"]["data"] == [[0.5, -1.0], [2.0, 3.0]]
    two = {**one, "label": np.array([0, 1])}
    with pytest.raises(ConfigError, match=r"ends in \.npz|2 outputs"):
        save_outputs(tmp_path / "z.npy", two)
    save_outputs(tmp_path / "z.npz", two)
    assert set(np.load(tmp_path / "z.npz").files) == {"logits", "label"}
    with pytest.raises(ConfigError, match="cannot write"):
        save_outputs(tmp_path / "no" / "y.npy", one)


def test_sigterm_is_as_ctrl_c_while_servers_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_bundled_file_is_in_the_wheel() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    files = [
        path for kind in ("onnx", "npy", "csv") for path in (ROOT / "models").glob(f"*.{kind}")
    ]
    assert len(files) >= 4
    for path in files:
        name = f"models/{path.name}"
        assert f'"{name}" = "mpcserve/{name}"' in listed


def test_a_bundled_file_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="models/none: not among the files"):
        bundled("models", "none")


def test_ci_runs_the_line_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in ("run", "test"):
        block = readme.split(f"<!-- {name}-command -->")[1].split(f"<!-- /{name}-command -->")[0]
        assert len([line for line in block.splitlines() if line.startswith("python3")]) == 1
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
