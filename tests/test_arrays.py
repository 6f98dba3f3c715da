"""Inputs from files: arrays by name, and tables whose cells are what the model's inputs are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpcserve.arrays import Columns, read_arrays
from mpcserve.errors import InputError
from mpcserve.plan.client import RawInput

INPUTS = (
    RawInput("age", "float32", (4, 1)),
    RawInput("sex", "str", (4, 1)),
    RawInput("grade", "int64", (4,)),
)
TABLE = 'age,sex,grade\n3.5,male,1\n,"fe,male",-2\n'


def table(tmp_path: Path, text: str) -> Columns:
    path = tmp_path / "x.csv"
    path.write_text(text)
    read = read_arrays(path)
    assert isinstance(read, Columns)
    return read


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        "\ufeff" + TABLE,
        TABLE.replace("\n", "\r\n"),
        'grade,id,sex,age\n1,x,male,3.5\n-2,y,"fe,male",\n',
        "a,b,c\n" + TABLE.partition("\n")[2],
    ],
    ids=["plain", "with a mark", "of Windows", "by name", "in order"],
)
def test_columns_go_to_inputs_by_name_or_in_order(text: str, tmp_path: Path) -> None:
    arrays = table(tmp_path, text).fitted(INPUTS)
    assert list(arrays) == ["age", "sex", "grade"]
    np.testing.assert_array_equal(arrays["age"], np.array([[3.5], [np.nan]], np.float32))
    assert arrays["sex"].tolist() == [["male"], ["fe,male"]]
    np.testing.assert_array_equal(arrays["grade"], [1, -2])
    assert [a.dtype.kind for a in arrays.values()] == ["f", "U", "i"]


def test_a_single_input_takes_all_columns(tmp_path: Path) -> None:
    arrays = table(tmp_path, "a,b,c\n1,2,3\n4,5,6\n").fitted([RawInput("x", "float32", (1, 3))])
    np.testing.assert_array_equal(arrays["x"], [[1, 2, 3], [4, 5, 6]])


def test_arrays_of_text_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([["a"], ["bc"]]))
    np.savez(tmp_path / "x.npz", age=np.ones((2, 1)), sex=np.array([["a"], ["bc"]]))
    one, several = read_arrays(tmp_path / "x.npy"), read_arrays(tmp_path / "x.npz")
    assert isinstance(one, np.ndarray) and one.tolist() == [["a"], ["bc"]]
    assert isinstance(several, dict) and several["sex"].tolist() == one.tolist()


def test_truth_is_spelt_out(tmp_path: Path) -> None:
    arrays = table(tmp_path, "a\nTrue\nfalse\n").fitted([RawInput("a", "bool", (1, 1))])
    assert arrays["a"].tolist() == [[True], [False]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age,sex,grade\n1,m,x\n", "row 0, column 'grade': 'x' is no number"),
        ("age,sex,grade\n1,m,1\n2,m,\n", "row 1, column 'grade': '' is no number"),
        ("age,sex\n1,m\n", r"columns age, sex do not fit the inputs age \(1\), sex \(1\)"),
    ],
)
def test_cells_that_do_not_fit_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        table(tmp_path, text).fitted(INPUTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows below the header"),
        ("a,b\n", "no rows below the header"),
        ("a,b\n1,2\n1\n", "row 1 has 1 cells below 2 names"),
    ],
)
def test_a_file_that_is_no_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"x.csv: not a readable .*{message}"):
        table(tmp_path, text)
