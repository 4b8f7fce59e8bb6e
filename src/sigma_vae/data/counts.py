"""Counts, and sparse matrices of numbers: AnnData (.h5ad) and SciPy's .npz files."""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sigma_vae.config import DataConfig, replacing
from sigma_vae.data.archives import check_unpacked
from sigma_vae.data.cache import file_record
from sigma_vae.data.files import damaged, needed
from sigma_vae.data.splits import Names, Raw, few
from sigma_vae.data.stores import Array, Generated, InMemory, Mapped, Sparse, Store, UnreadableError, check_kind
from sigma_vae.registry import register

if TYPE_CHECKING:
    from anndata import AnnData

LARGEST = 2**24
"""Counts from here on are not all whole numbers of float32."""
PIECE = 2**22
"""Values that are checked together."""
LATENTS, EXPRESSION = "X_sigma_vae", "sigma_vae"
"""Key of the latents in ``obsm``, and of the decoded means in ``layers``."""


def count_store(part: Array | Mapped | Sparse | Generated, name: str) -> Store:
    """Check that all values are counts, and keep them in the smallest integers that tensors have.

    >>> count_store(np.array([[0.0, 3.0], [700.0, 1.0]]), "genes").take(torch.tensor([1]))
    tensor([[700,   1]], dtype=torch.int16)

    Raises:
        ValueError: a value is negative, no whole number, not finite, or 2²⁴ or more.
    """
    if isinstance(part, Generated):
        return part
    if isinstance(part, Sparse):
        _check_counts(part.matrix.data, name)
        return part
    array = part.array if isinstance(part, Mapped) else part
    largest = max(_check_counts(some, name) for some in _pieces(array))
    if isinstance(part, Mapped):
        return part
    kind = np.uint8 if largest < 2**8 else np.int16 if largest < 2**15 else np.int32
    return InMemory(torch.from_numpy(np.require(array, kind, ["C", "W"])))


def _pieces(array: Array) -> Iterator[Array]:
    rows = max(1, PIECE // max(1, array[:1].size))
    return (array[start : start + rows] for start in range(0, len(array), rows))


def _check_counts(values: Array, name: str) -> float:
    """The largest of some counts."""
    check_kind(values.dtype, name)
    if values.size == 0:
        return 0.0
    least, largest = float(values.min()), float(values.max())
    if not (least >= 0 and largest < LARGEST and (values.dtype.kind != "f" or bool((values == np.rint(values)).all()))):
        raise ValueError(
            f"{name} needs counts, whole numbers from 0 to 2²⁴ − 1, but its values go from {least:.6g} to {largest:.6g}"
            f"{'' if values.dtype.kind != 'f' else ', perhaps with fractions'}; leave --counts out and take a likelihood of real"
            " values, such as gaussian/optimal"
        )
    return largest


@register.source("anndata", options={"layer", "columns", "exclude"}, endings=(".h5ad",))
def read_h5ad(config: DataConfig) -> Raw:
    """Read the matrix of an AnnData file, or one of its layers: rows (cells) by columns (genes).

    A sparse matrix stays sparse; rows are made dense batch by batch. ``columns`` and ``exclude`` choose among the names of
    the columns. Values are counts (--counts), or real values, standardised by default.

    Raises:
        ValueError: anndata is not installed, the file is damaged, or it has no such layer or columns.
    """
    path = config.path
    if not path.is_file():
        raise ValueError(f"expected an .h5ad file at {path}, got no such file; check the path")
    raw = from_anndata(_opened(path), config, str(path))
    return replace(raw, files=[file_record(path)])


def _opened(path: Path) -> "AnnData":
    anndata = needed("anndata", path)
    try:
        with damaged():
            data: AnnData = anndata.read_h5ad(path)
    except UnreadableError as error:
        raise ValueError(f"{path} cannot be read as an AnnData file: {error}") from error
    return data


def from_anndata(data: "AnnData", config: DataConfig, name: str) -> Raw:
    """Read an AnnData object as :func:`read_h5ad` reads a file; columns of ``obs`` are its labels.

    Raises:
        ValueError: it has no such layer or columns, or no matrix.
    """
    if config.layer is not None and config.layer not in data.layers:
        raise ValueError(
            f"{name} has no layer {config.layer!r}, it has {few(list(data.layers)) or 'none'}; give one, or leave --layer out"
        )
    matrix = data.X if config.layer is None else data.layers[config.layer]
    if matrix is None:
        raise ValueError(
            f"{name} has no matrix X; give one of its layers by --layer: {few(list(data.layers)) or 'it has none'}"
        )
    names = [str(each) for each in data.var_names]
    if len(set(names)) < len(names):
        from anndata.utils import make_index_unique

        names = [str(each) for each in make_index_unique(data.var_names.astype(str))]
    chosen = _chosen(names, config, name)
    if len(chosen) < len(names):
        matrix = matrix[:, chosen]
    columns = tuple(names[i] for i in chosen)
    words = [f"layer {config.layer}" if config.layer else "matrix X", f"{len(columns)} of {len(names)} columns"]
    rows = np.array([str(each) for each in data.obs_names], dtype=object)
    if len(set(rows)) < len(rows):
        rows = np.arange(len(rows))
    labels = {str(column): data.obs[column].to_numpy() for column in data.obs}
    made = replace(from_sparse(matrix, name), preprocessing=words, columns=columns)
    return replace(made, names={"train": rows}, labels={"train": labels})


def _chosen(names: list[str], config: DataConfig, name: str) -> list[int]:
    places = {each: i for i, each in enumerate(names)}
    if unknown := [each for each in (*config.columns, *config.exclude) if each not in places]:
        raise ValueError(f"{name} has no column {unknown[0]!r}, it has {few(names)}; choose among these")
    chosen = [places[each] for each in config.columns or names if each not in config.exclude]
    if not chosen:
        raise ValueError(f"{name} has no column left; exclude fewer")
    return chosen


def from_sparse(matrix: Any, name: str) -> Raw:
    """Read a matrix ``(rows, columns)``, dense or sparse (of SciPy).

    Raises:
        ValueError: it is no matrix of numbers, or broken.
    """
    if not hasattr(matrix, "tocsr"):
        return Raw(name, {"train": np.asarray(matrix)}, standardise=True)
    matrix = matrix.tocsr()
    check_kind(matrix.dtype, name)
    try:
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise ValueError(f"{name} holds a broken sparse matrix: {error}; save it anew") from error
    if 0 in matrix.shape:
        raise ValueError(f"{name} needs at least one row and one column, got shape {matrix.shape}")
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    filled = f"sparse: {matrix.nnz / (matrix.shape[0] * matrix.shape[1]):.1%} of the values are stored"
    return Raw(name, {"train": Sparse(matrix)}, preprocessing=[filled], standardise=True)


def holds_sparse(path: Path, config: DataConfig) -> bool:
    """Whether a path is an .npz file that SciPy wrote of a sparse matrix, compressed by rows or by columns."""
    if path.suffix.lower() != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"data.npy", "indices.npy", "indptr.npy", "shape.npy", "format.npy"} <= set(archive.namelist())


@register.source("sparse", reads=holds_sparse, rank=-1)
def read_sparse(config: DataConfig) -> Raw:
    """Read a sparse matrix (rows, columns) that scipy.sparse.save_npz wrote; rows are made dense batch by batch.

    Raises:
        ValueError: the file is damaged.
    """
    from scipy.sparse import load_npz

    path = config.path
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            check_unpacked(f"{path} ({member.filename})", member.file_size, member.compress_size)
    try:
        with damaged():
            matrix = load_npz(path)
    except UnreadableError as error:
        raise ValueError(f"{path} cannot be read as a sparse matrix: {error}") from error
    return replace(from_sparse(matrix, str(path)), files=[file_record(path)])


def write_h5ad(
    path: Path,
    source: Path,
    names: Names,
    columns: Sequence[str],
    latents: Mapping[str, Array],
    expression: Array | None = None,
) -> None:
    """Write latents, and perhaps decoded means, beside the data that they are of.

    The file has the rows ``names`` of ``source`` where that is an .h5ad file, else rows of nothing. ``obsm`` gets
    ``X_sigma_vae`` and ``X_sigma_vae_std``, ``layers`` gets ``sigma_vae``.

    Raises:
        ValueError: anndata is not installed, or the source cannot be read.
    """
    anndata = needed("anndata", path)
    import pandas as pd

    rows, variables = pd.Index([str(each) for each in names]), pd.Index(list(columns))
    if source.suffix.lower() == ".h5ad" and source.is_file():
        data = _opened(source)
        known = data.obs_names.astype(str)
        places = known.get_indexer(rows) if known.is_unique else np.asarray(names, dtype=np.int64)
        data = (
            data[places, data.var_names.astype(str).isin(variables)].copy() if expression is not None else data[places].copy()
        )
    else:
        data = anndata.AnnData(obs=pd.DataFrame(index=rows), var=pd.DataFrame(index=variables))
    for key, values in latents.items():
        data.obsm[LATENTS if key == "mean" else f"{LATENTS}_{key}"] = values
    if expression is not None:
        data.layers[EXPRESSION] = expression[:, variables.get_indexer(data.var_names.astype(str))]
    data.obs, data.var = _plain(data.obs), _plain(data.var)
    with replacing(path) as aside:
        data.write_h5ad(aside)


def _plain(frame: Any) -> Any:
    """The same frame with Python's strings: not every version of anndata writes those of Arrow, which pandas 3 makes."""
    import pandas as pd

    def plain(column: Any) -> Any:
        kinds = column.astype("category")
        if not pd.api.types.is_string_dtype(kinds.cat.categories.dtype):
            return column
        words = kinds.cat.categories.astype(object)
        return pd.Categorical.from_codes(kinds.cat.codes, words, ordered=kinds.cat.ordered)

    return frame.assign(**{name: plain(column) for name, column in frame.items()}).set_axis(frame.index.astype(object), axis=0)
