"""Models of tables that `models.tabular` trains and measures, by family.

A family whose library is missing raises ModuleNotFoundError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A model to train. `make`: a fresh estimator. `disclose`: what its plan may tell.

    `alone`: it learns without targets.
    """

    family: str
    model: str
    dataset: str
    make: Callable[[], Any]
    disclose: tuple[Any, ...] = ()
    alone: bool = False

    @property
    def name(self) -> str:
        """What -k looks into."""
        return f"{self.family} {self.model} {self.dataset}"


def linear() -> Iterator[Case]:
    """Linear models, discriminants and naive Bayes."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis as LDA
    from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier
    from sklearn.naive_bayes import GaussianNB
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    def logistic() -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))

    yield Case("linear", "scaler + logistic regression", "breast_cancer", logistic)
    yield Case("linear", "scaler + logistic regression", "wine", logistic)
    yield Case("linear", "logistic regression", "digits", lambda: LogisticRegression(max_iter=300))
    yield Case("linear", "linear regression", "diabetes", LinearRegression)
    yield Case("linear", "ridge", "diabetes", Ridge)
    yield Case("linear", "ridge classifier", "wine", RidgeClassifier)
    yield Case("linear", "LDA", "wine", LDA)
    yield Case("linear", "linear SVC", "digits", lambda: LinearSVC(max_iter=300))
    yield Case("linear", "Gaussian naive Bayes", "wine", GaussianNB)


def machines() -> Iterator[Case]:
    """Support vector machines, networks, neighbours and Gaussian processes."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, WhiteKernel
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, LocalOutlierFactor
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC, SVR, OneClassSVM

    def scaled(estimator: Any) -> Callable[[], Any]:
        return lambda: make_pipeline(StandardScaler(), estimator)

    yield Case("SVM", "SVC linear", "breast_cancer", scaled(SVC(kernel="linear")))
    yield Case("SVM", "SVC RBF", "breast_cancer", scaled(SVC()))
    yield Case("SVM", "SVC RBF", "wine", scaled(SVC()))
    yield Case("SVM", "SVC RBF", "digits", SVC)
    yield Case("SVM", "SVC polynomial", "wine", scaled(SVC(kernel="poly", coef0=0.5)))
    yield Case("SVM", "SVC sigmoid", "wine", scaled(SVC(kernel="sigmoid")))
    yield Case("SVM", "SVR RBF", "diabetes", scaled(SVR(C=100.0)))
    yield Case("SVM", "SVR linear", "diabetes", scaled(SVR(kernel="linear")))
    yield Case("SVM", "one class", "breast_cancer", scaled(OneClassSVM(nu=0.1)), alone=True)
    hidden = {"hidden_layer_sizes": (32, 16), "random_state": 0, "max_iter": 400}
    yield Case("MLP", "MLP 64-32-16-10", "digits", lambda: MLPClassifier(**hidden))
    yield Case("MLP", "MLP tanh", "wine", scaled(MLPClassifier(activation="tanh", **hidden)))
    yield Case("MLP", "MLP", "diabetes", scaled(MLPRegressor(**hidden)))
    yield Case("neighbours", "5 nearest", "wine", scaled(KNeighborsClassifier()))
    yield Case("neighbours", "5 nearest", "diabetes", scaled(KNeighborsRegressor()))
    weighted = scaled(KNeighborsClassifier(weights="distance"))
    yield Case("neighbours", "5 nearest, weighted", "wine", weighted)
    outliers = scaled(LocalOutlierFactor(novelty=True))
    yield Case("neighbours", "local outliers", "wine", outliers, alone=True)
    smooth = GaussianProcessRegressor(RBF(3.0) + WhiteKernel(), normalize_y=True, random_state=0)
    yield Case("Gaussian process", "RBF", "diabetes", scaled(smooth))


def trees() -> Iterator[Case]:
    """Trees and ensembles of them."""
    from sklearn import ensemble as of
    from sklearn import tree

    for dataset in ("breast_cancer", "digits"):
        yield Case("trees", "decision tree", dataset, seeded(tree.DecisionTreeClassifier))
    yield Case("trees", "decision tree", "diabetes", seeded(tree.DecisionTreeRegressor))
    for dataset in ("breast_cancer", "wine", "digits"):
        yield Case("trees", "random forest, 100", dataset, seeded(of.RandomForestClassifier))
    forest = seeded(of.RandomForestRegressor, max_leaf_nodes=128)
    yield Case("trees", "random forest, 100", "diabetes", forest)
    yield Case("trees", "extra trees, 100", "breast_cancer", seeded(of.ExtraTreesClassifier))
    isolation = seeded(of.IsolationForest, n_estimators=20, max_samples=64)
    yield Case("trees", "isolation forest, 20", "breast_cancer", isolation, alone=True)
    for dataset in ("breast_cancer", "wine"):
        boosted = seeded(of.GradientBoostingClassifier)
        yield Case("boosting", "gradient boosting, 100", dataset, boosted)
        boosted = seeded(of.HistGradientBoostingClassifier, max_iter=50)
        yield Case("boosting", "histogram boosting, 50", dataset, boosted)
        boosted = seeded(of.AdaBoostClassifier, n_estimators=20)
        yield Case("boosting", "AdaBoost, 20", dataset, boosted)
    median = seeded(of.AdaBoostRegressor, n_estimators=20)
    yield Case("boosting", "AdaBoost, 20", "diabetes", median)
    regressor = seeded(of.GradientBoostingRegressor)
    yield Case("boosting", "gradient boosting, 100", "diabetes", regressor)
    regressor = seeded(of.HistGradientBoostingRegressor, max_iter=50)
    yield Case("boosting", "histogram boosting, 50", "diabetes", regressor)


def seeded(estimator: Any, **options: Any) -> Callable[[], Any]:
    """A fresh estimator, whose random numbers are always the same."""
    return lambda: estimator(random_state=0, **options)


def xgboosted() -> Iterator[Case]:
    """Of xgboost."""
    import onnxmltools  # noqa: F401, which exports them
    import xgboost as of

    few: dict[str, Any] = {"n_estimators": 50, "max_depth": 4, "n_jobs": 1}
    for dataset in ("breast_cancer", "wine", "digits"):
        yield Case("xgboost", "classifier, 50", dataset, lambda: of.XGBClassifier(**few))
    yield Case("xgboost", "regressor, 50", "diabetes", lambda: of.XGBRegressor(**few))


def lightgbms() -> Iterator[Case]:
    """Of lightgbm."""
    import lightgbm as of
    import onnxmltools  # noqa: F401, which exports them

    quiet: dict[str, Any] = {"verbose": -1, "n_estimators": 50, "n_jobs": 1}
    for dataset in ("breast_cancer", "wine", "digits"):
        yield Case("lightgbm", "classifier, 50", dataset, lambda: of.LGBMClassifier(**quiet))
    yield Case("lightgbm", "regressor, 50", "diabetes", lambda: of.LGBMRegressor(**quiet))


def pipelines() -> Iterator[Case]:
    """Several steps."""
    from sklearn import preprocessing as by
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    def reduced() -> Any:
        return make_pipeline(by.StandardScaler(), PCA(16), LogisticRegression(max_iter=500))

    def squares() -> Any:
        return make_pipeline(by.StandardScaler(), by.PolynomialFeatures(2), Ridge(10.0))

    def directions() -> Any:
        return make_pipeline(by.MinMaxScaler(), by.Normalizer(), LogisticRegression(max_iter=500))

    yield Case("pipelines", "scaler + PCA + logistic regression", "digits", reduced)
    yield Case("pipelines", "scaler + squares + ridge", "diabetes", squares)

    def quantiles() -> Any:
        return make_pipeline(by.QuantileTransformer(n_quantiles=50), Ridge())

    def powers() -> Any:
        return make_pipeline(by.PowerTransformer(), LogisticRegression())

    def calibrated() -> Any:
        return CalibratedClassifierCV(
            make_pipeline(by.StandardScaler(), LogisticRegression()), cv=3
        )

    yield Case("pipelines", "min-max + norm + logistic regression", "wine", directions)
    yield Case("pipelines", "quantiles + ridge", "diabetes", quantiles)
    yield Case("pipelines", "powers + logistic regression", "wine", powers)
    yield Case("pipelines", "calibrated logistic regression", "wine", calibrated)


def texts() -> Iterator[Case]:
    """Tables with text and gaps, a column an input: what needs no secret runs on the client."""
    from sklearn import preprocessing as by
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    numbers, categories = [0, 1], [2, 3, 4, 5]
    text = ("text-categories", "imputed-values")

    def table(encoder: Any, estimator: Any, columns: Any = categories) -> Callable[[], Any]:
        filled = make_pipeline(SimpleImputer(), by.StandardScaler())
        parts = [("numbers", filled, numbers), ("categories", encoder, columns)]
        return lambda: make_pipeline(ColumnTransformer(parts), estimator)

    one_hot = by.OneHotEncoder(handle_unknown="ignore")
    logistic = LogisticRegression(max_iter=500)
    forest = RandomForestClassifier(50, max_depth=6, random_state=0)
    boosted = GradientBoostingClassifier(n_estimators=50, random_state=0)
    order = by.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    target = by.TargetEncoder(target_type="binary", random_state=0)
    every = (*text, "number-categories")
    for told, disclose in (("", every), (", class secret", text)):
        make = table(one_hot, logistic)
        yield Case("tables", f"one-hot + logistic regression{told}", "passengers", make, disclose)
    yield Case("tables", "one-hot + forest, 50", "passengers", table(one_hot, forest), every)
    make = table(order, boosted, [3, 4, 5])
    yield Case("tables", "ordinal + gradient boosting, 50", "passengers", make, text)
    make = table(target, logistic, [3, 4, 5])
    yield Case("tables", "target + logistic regression", "passengers", make, text)


FAMILIES = (linear, machines, trees, texts, pipelines, xgboosted, lightgbms)
