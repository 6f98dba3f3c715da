"""`deploy`, `models` and `infer` against three server processes over TLS, as a user types them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.bundled import bundled
from mpcserve.cli import run
from mpcserve.cli.plaintext import Plaintext
from mpcserve.plan import bill_of, load_plan
from mpcserve.serving import LocalCluster
from tests import table_cases
from tests.onnx_cases import plain
from tests.table_cases import EVERYTHING, as_csv, some_passengers

pytestmark = pytest.mark.slow

MODEL = bundled("models", "breast_cancer_mlp.onnx")
SAMPLES = np.load(bundled("models", "breast_cancer_samples.npy"))
CALIBRATION = bundled("models", "breast_cancer_calibration.npy")

Capture = pytest.CaptureFixture[str]
Mpcserve = Callable[..., int]

REPORT_KEYS = {
    *("model", "plan_digest", "ring_bits", "batch", "rounds", "bytes", "dealt_bytes", "seconds"),
    *("cpu_seconds", "peak_rss_bytes", "plaintext_seconds", "max_abs_error", "top1_agreement"),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(pool_depth=1) as made:
        yield made


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "cancer.plan"
    words = ["compile", str(MODEL), "-o", str(path), "--calibrate", str(CALIBRATION)]
    assert run([*words, "--batch", "4"]) == 0
    return path


@pytest.fixture(scope="module")
def mpcserve(cluster: LocalCluster, plan: Path) -> Mpcserve:
    """Run a command against the cluster, on which the model is deployed as `cancer`."""

    def command(name: str, *words: object) -> int:
        return run([name, *map(str, words), "--config", str(cluster.config.path)])

    assert command("deploy", plan, "--name", "cancer") == 0
    return command


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "x.npy"
    np.save(path, SAMPLES)
    return path


def float_logits() -> Any:
    plaintext = Plaintext(MODEL)
    return plaintext.run({plaintext.inputs[0].name: SAMPLES})[0]


def test_models_lists_what_is_deployed(mpcserve: Mpcserve, plan: Path, capsys: Capture) -> None:
    assert mpcserve("models") == 0
    out = capsys.readouterr().out
    assert re.search(r"cancer +input float32 4x30", out)
    assert load_plan(plan).digest[:16] in out
    assert mpcserve("models", "--json") == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert (model["name"], model["digest"]) == ("cancer", load_plan(plan).digest)


def test_infer_writes_what_the_float_model_says(
    mpcserve: Mpcserve, samples: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert mpcserve("infer", samples, "--model", "cancer", "-o", tmp_path / "y.npy") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    got = np.load(tmp_path / "y.npy")
    assert got.dtype == np.float32
    assert np.abs(got - float_logits()).max() <= 2**-8


def test_infer_prints_a_table(mpcserve: Mpcserve, samples: Path, capsys: Capture) -> None:
    assert mpcserve("infer", samples) == 0
    out = capsys.readouterr().out
    assert out.startswith("logits float32[10, 2]\n")
    rows = [line.split() for line in out.splitlines() if re.match(r" *\d", line)]
    assert [int(r[1]) for r in rows] == float_logits().argmax(axis=1).tolist()


def test_infer_prints_json_for_machines(mpcserve: Mpcserve, samples: Path, capsys: Capture) -> None:
    assert mpcserve("infer", samples, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == "cancer"
    data = np.array(answer["outputs"]["logits"]["data"])
    assert np.abs(data - float_logits()).max() <= 2**-8


def test_the_report_tells_rounds_bytes_and_seconds(
    mpcserve: Mpcserve, samples: Path, plan: Path, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    assert mpcserve("infer", samples, "--report", path) == 0
    report = json.loads(path.read_text())
    assert set(report) >= REPORT_KEYS
    bill, evaluations = bill_of(load_plan(plan)), 3  # ten rows in batches of four
    assert report["rounds"] == evaluations * bill.rounds
    assert report["bytes"] == {link: evaluations * n for link, n in bill.bytes.items()}
    assert report["dealt_bytes"] == evaluations * bill.dealt_bytes
    assert set(report["seconds"]) == {"online", "evaluation", "preprocessing", "total"}
    assert set(report["cpu_seconds"]) == set(report["peak_rss_bytes"]) == {"alice", "bob", "carol"}
    assert report["plaintext_seconds"] is None


def replaced(value: float) -> Any:
    x = SAMPLES.copy()
    x[1, 2] = value
    return x


BAD_INPUTS: dict[str, tuple[Any, str]] = {
    "shape": (SAMPLES[:, :7], "expected shape [rows, 30], got [10, 7]"),
    "dtype": (SAMPLES.astype(np.int32), "expected float32, got int32"),
    "nan": (replaced(np.nan), "not a finite number at (1, 2)"),
    "infinity": (replaced(np.inf), "not a finite number at (1, 2)"),
    "range": (replaced(1e9), "outside the range"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_a_bad_input_is_named_before_anything_is_sent(
    kind: str, mpcserve: Mpcserve, tmp_path: Path, capsys: Capture
) -> None:
    array, expected = BAD_INPUTS[kind]
    np.save(tmp_path / "x.npy", array)
    assert mpcserve("infer", tmp_path / "x.npy") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 2


def test_values_out_of_range_are_clamped_on_request(
    mpcserve: Mpcserve, tmp_path: Path, capsys: Capture
) -> None:
    np.save(tmp_path / "x.npy", replaced(1e9))
    assert mpcserve("infer", tmp_path / "x.npy", "--on-range", "clamp", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"]["logits"]["shape"] == [10, 2]


@pytest.fixture(scope="module")
def passengers(
    tmp_path_factory: pytest.TempPathFactory, mpcserve: Mpcserve
) -> Iterator[tuple[Path, Path]]:
    """A model and a .csv of text and numbers, some missing, deployed as `passengers`."""
    folder = tmp_path_factory.mktemp("passengers")
    model, rows = folder / "m.onnx", folder / "rows.csv"
    onnx.save(table_cases.passengers(), model)
    rows.write_text(as_csv(some_passengers(30)))
    disclosed = [word for what in EVERYTHING for word in ("--disclose", what)]
    assert run(["compile", str(model), "--calibrate", str(rows), *disclosed, "--batch", "8"]) == 0
    assert mpcserve("deploy", model.with_suffix(".plan"), "--name", "passengers") == 0
    yield model, rows


def test_a_table_with_text_is_answered_with_text(
    passengers: tuple[Path, Path], mpcserve: Mpcserve, tmp_path: Path, capsys: Capture
) -> None:
    model, rows = passengers
    label, chances = plain(onnx.load(model), *some_passengers(30).values())
    capsys.readouterr()
    assert mpcserve("infer", rows, "--model", "passengers", "--json") == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert outputs["label"]["data"] == label.tolist()
    for mine, theirs in zip(outputs["chances"]["data"], chances, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert mpcserve("infer", rows, "--model", "passengers") == 0
    table = capsys.readouterr().out.partition("chances")[2].splitlines()
    assert re.search(r"row +prediction +died +survived", table[1])
    predictions = [line.split()[1] for line in table if re.match(r" *\d", line)]
    assert predictions == label.tolist()


def test_models_lists_what_the_data_owner_gives(
    passengers: tuple[Path, Path], mpcserve: Mpcserve, capsys: Capture
) -> None:
    assert mpcserve("models") == 0
    listed = re.search(r"passengers .*", capsys.readouterr().out)
    assert listed is not None
    assert "age float32 8x1, fare float32 8x1, sex str 8x1, port str 8x1" in listed[0]


def test_python_gets_maps_where_the_model_makes_them(
    passengers: tuple[Path, Path], cluster: LocalCluster
) -> None:
    answer = cluster.infer(some_passengers(9), model="passengers")
    assert isinstance(answer, dict)
    assert answer["label"].dtype.kind == "U"
    assert [max(row, key=row.get) for row in answer["chances"]] == answer["label"].tolist()


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_table_with_text_is_verified_and_measured(
    command: str, passengers: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    model, rows = passengers
    disclosed = [word for what in EVERYTHING for word in ("--disclose", what)]
    labels = tmp_path / "labels.npy"
    np.save(labels, plain(onnx.load(model), *some_passengers(30).values())[0].astype(str))
    given = ["--data" if command == "verify" else "--input", str(rows)]
    more = ["--calibrate", str(rows), "--labels", str(labels), "--json"]
    more = ["--runs", "1"] if command == "bench" else more
    capsys.readouterr()
    assert run([command, str(model), *given, *disclosed, *more]) == 0
    out = capsys.readouterr().out
    if command == "bench":
        assert "as the plan's bill says" in out
        assert "top-1 agreement 100.00 %" in out
        return
    report = json.loads(out)
    assert "on the client: Imputer 'fill' (2 imputed values are public)" in report["on_the_client"]
    for output in report["outputs"]:
        assert output["accuracy"] == {"float": 1.0, "reference": 1.0, "protocol": 1.0}
        assert output["protocol"]["top1"] == 1.0


def test_text_has_no_fixed_values_to_measure_with(
    passengers: tuple[Path, Path], capsys: Capture
) -> None:
    assert run(["bench", str(passengers[0]), "--disclose", "text-categories"]) == 2
    err = capsys.readouterr().err
    assert "input 'sex' is text, for which there are no fixed values" in err
    assert "--input" in err


def test_an_unknown_model_is_refused_with_the_names_there_are(
    mpcserve: Mpcserve, samples: Path, capsys: Capture
) -> None:
    assert mpcserve("infer", samples, "--model", "dogs") == 5
    err = capsys.readouterr().err
    assert "no model 'dogs' is deployed; deployed: cancer" in err


def test_a_name_is_deployed_once_unless_replaced(
    mpcserve: Mpcserve, plan: Path, capsys: Capture
) -> None:
    assert mpcserve("deploy", plan, "--name", "cancer") == 5
    err = capsys.readouterr().err
    assert "cancer" in err
    assert "--replace" in err
    assert mpcserve("deploy", plan, "--name", "cancer", "--replace") == 0
    assert capsys.readouterr().out == "cancer: deployed\n"


def test_weights_of_another_plan_are_refused_with_both_digests(
    mpcserve: Mpcserve, plan: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other.plan"
    assert run(["compile", str(MODEL), "-o", str(other), "--batch", "2"]) == 0
    capsys.readouterr()
    assert mpcserve("deploy", plan, "--weights", other.with_suffix(".weights")) == 3
    err = capsys.readouterr().err
    assert load_plan(plan).digest in err
    assert load_plan(other).digest in err
    assert "other.weights" in err


def test_nobody_there_is_an_error_that_names_whom_and_where(
    tmp_path: Path, cluster: LocalCluster, capsys: Capture
) -> None:
    path = tmp_path / "mpcserve.yaml"
    path.write_text(
        "servers: {alice: '127.0.0.1:1', bob: '127.0.0.1:2'}\n"
        f"keys: {cluster.config.keys}\ndeadlines: {{connect: 0.2}}\n"
    )
    assert run(["models", "--config", str(path)]) == 4
    err = capsys.readouterr().err
    assert "alice at 127.0.0.1:1" in err
    assert "mpcserve: hint: " in err
