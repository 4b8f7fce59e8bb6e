"""Counts beside scvi-tools: held-out nats per row, and seconds; and the memory that a large sparse matrix takes.

    pip install lda scanpy scvi-tools
    python -m benchmarks.counts prepare --out counts-data       # Reuters (lda) and PBMC (scanpy) as files of counts
    python -m benchmarks.counts compare --data counts-data/reuters.npz --out counts.json
    python -m benchmarks.counts memory                          # 200 000 × 2 000 at 5 %: prints the peak of resident memory

Where scvi-tools is not importable, ``compare`` runs our side alone. Both sides have the same split, latents, layers, width, batch
size, epochs, one thread, and the row's total given; the weights with the best validation ELBO are taken where a side can.
"""

import argparse
import importlib.util
import json
import math
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import keep
from sigma_vae import models
from sigma_vae.config import DataConfig, ModelConfig, TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.data.counts import _plain
from sigma_vae.evaluation import evaluate
from sigma_vae.training import fit

SIZES = {"latents": 10, "width": 128, "layers": 2}
BATCH = 128
OURS = ("multinomial", "poisson:library", "negative-binomial:library/optimal", "negative-binomial:library/optimal-channel")
ROWS, COLUMNS, FILLED = 200_000, 2_000, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("prepare", "compare", "memory"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--likelihoods", nargs="*", default=list(OURS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.task == "prepare":
        prepare(options.out)
    elif options.task == "memory":
        print(json.dumps(memory()))
    else:
        found = compare(options.data, options.epochs, options.seeds, options.likelihoods, options.out)
        print(json.dumps(found["summary"], indent=2))


# -- data ------------------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Write the counts that installed packages bundle."""
    import scipy.sparse

    folder.mkdir(parents=True, exist_ok=True)
    if (lda := importlib.util.find_spec("lda")) is not None:
        lines = (Path(lda.origin).parent / "tests" / "reuters.ldac").read_text(encoding="utf-8").splitlines()
        triples = [(row, *map(int, pair.split(":"))) for row, line in enumerate(lines) for pair in line.split()[1:]]
        rows, columns, counts = np.array(triples).T
        scipy.sparse.save_npz(folder / "reuters.npz", scipy.sparse.csr_matrix((counts.astype(np.int32), (rows, columns))))
    if (scanpy := importlib.util.find_spec("scanpy")) is not None:
        write_pbmc(Path(scanpy.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad", folder / "pbmc.h5ad")


def write_pbmc(source: Path, path: Path) -> None:
    """Undo the normalisation of the 700 cells in scanpy: log(1 + 10⁴ count / total), rounded to three digits."""
    import anndata
    import scipy.sparse

    read = anndata.read_h5ad(source)
    scaled = np.expm1(np.asarray(read.raw.X.todense(), np.float64)) * np.asarray(read.obs["n_counts"])[:, None] / 1e4
    counts = np.rint(scaled)
    print(f"pbmc: the largest distance from a whole number is {np.abs(scaled - counts).max():.3f}")
    made = anndata.AnnData(
        scipy.sparse.csr_matrix(counts.astype(np.float32)),
        obs=_plain(read.obs[["bulk_labels"]]),
        var=_plain(read.raw.var[[]]),
    )
    made.write_h5ad(path)


def read(path: Path) -> Splits:
    return models.data(DataConfig(str(path), counts=True, validation_fraction=0.15, test_fraction=0.2))


# -- both sides ------------------------------------------------------------------------------------------------------------


def compare(path: Path, epochs: int, seeds: int, likelihoods: list[str], out: Path | None) -> dict[str, Any]:
    data = read(path)
    rows: list[dict[str, Any]] = []
    for row in runs(data, epochs, seeds, likelihoods):
        print(json.dumps(row), flush=True)
        rows.append(row)
        found = {"about": about(data, path, epochs), "summary": summary(rows), "runs": rows}
        if out is not None:
            keep(out, f"{path.stem}, {epochs} epochs", found)
    return found


def runs(data: Splits, epochs: int, seeds: int, likelihoods: list[str]) -> Iterator[dict[str, Any]]:
    for seed in range(seeds):
        for name in likelihoods:
            yield ours(data, name, epochs, seed)
        if importlib.util.find_spec("scvi") is not None:
            for warmup in (None, 1):
                yield theirs(data, epochs, seed, warmup)


def ours(data: Splits, name: str, epochs: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    sizes = ModelConfig(network="mlp", likelihood=name, latent_dim=SIZES["latents"], width=SIZES["width"])
    vae = models.vae(sizes, data.shape, data.scaling)
    began, cpu = time.monotonic(), time.process_time()
    done = fit(vae, data, TrainingConfig(epochs=epochs, batch_size=BATCH, patience=None), seed=seed, progress=False)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    nats = -evaluate(vae, data, seed=seed).elbo_nats.mean
    return {"name": name, "seed": seed, "nats": nats, "seconds": seconds, "cpu_seconds": cpu, "best_step": done.best_step}


def theirs(data: Splits, epochs: int, seed: int, warmup: int | None) -> dict[str, Any]:
    """SCVI with a negative binomial, and its dispersion for each gene; KL warm-up of 400 epochs by default, or none."""
    import anndata
    import scvi

    scvi.settings.seed = seed
    torch.set_num_threads(1)
    parts = [data.stored(split).float().numpy() for split in ("train", "validation", "test")]
    table = anndata.AnnData(np.concatenate(parts))
    ends = np.cumsum([len(part) for part in parts])
    train, validation, test = np.split(np.arange(ends[-1]), ends[:-1])
    scvi.model.SCVI.setup_anndata(table)
    model = scvi.model.SCVI(
        table, n_hidden=SIZES["width"], n_latent=SIZES["latents"], n_layers=SIZES["layers"], gene_likelihood="nb"
    )
    plan = {} if warmup is None else {"n_epochs_kl_warmup": warmup}
    began, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        model.train(
            max_epochs=epochs,
            batch_size=BATCH,
            accelerator="cpu",
            enable_progress_bar=False,
            datasplitter_kwargs={"external_indexing": [train, validation, test]},
            check_val_every_n_epoch=1,
            plan_kwargs=plan,
            enable_checkpointing=True,
            callbacks=[scvi.train.SaveCheckpoint(folder, monitor="elbo_validation", load_best_on_end=True)],
        )
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    nats = abs(float(model.get_elbo(indices=test)))
    name = "scvi" if warmup is None else "scvi, no warm-up"
    return {"name": name, "seed": seed, "nats": nats, "seconds": seconds, "cpu_seconds": cpu, "version": scvi.__version__}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds."""
    found = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        found[name] = {
            f"{key}_{word}": float(f([row[key] for row in own], **how))
            for key in ("nats", "seconds", "cpu_seconds")
            for word, f, how in (("mean", np.mean, {}), ("std", np.std, {"ddof": min(1, len(own) - 1)}))
        }
    return found


def about(data: Splits, path: Path, epochs: int) -> dict[str, Any]:
    counts = data.record["counts"]
    return {"data": path.name, "counts": counts, "shape": data.shape, "epochs": epochs, **SIZES, "torch": torch.__version__}


# -- memory ----------------------------------------------------------------------------------------------------------------


def memory() -> dict[str, Any]:
    """Train a few steps on a sparse matrix, evaluate on a part, and say what it took."""
    import scipy.sparse

    random = np.random.default_rng(0)
    per_row = round(COLUMNS * FILLED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.npz"
        columns = np.concatenate([np.sort(random.choice(COLUMNS, per_row, replace=False)) for _ in range(ROWS)]).astype(
            np.int32
        )
        values = (1 + random.geometric(0.5, ROWS * per_row)).astype(np.int32)
        large = scipy.sparse.csr_matrix((values, columns, np.arange(ROWS + 1) * per_row), shape=(ROWS, COLUMNS))
        scipy.sparse.save_npz(path, large, compressed=False)
        del columns, values, large
        began = time.monotonic()
        data = models.data(DataConfig(str(path), counts=True))
        read_seconds = time.monotonic() - began
        config = ModelConfig(network="mlp", likelihood="negative-binomial:library/optimal", latent_dim=10, width=128)
        vae = models.vae(config, data.shape, data.scaling)
        fit(vae, data, TrainingConfig(max_steps=20, validate_every=20), progress=False)
        nats = evaluate(vae, data.batches("test", 512, limit=2_000)).elbo_nats.mean
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    dense = ROWS * COLUMNS * 4 / 2**30
    assert math.isfinite(nats)
    return {
        "rows": ROWS,
        "columns": COLUMNS,
        "peak_gib": peak,
        "dense_gib": dense,
        "read_seconds": read_seconds,
        "elbo_nats": nats,
    }


if __name__ == "__main__":
    main()
