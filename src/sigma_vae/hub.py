"""Models on the Hugging Face Hub: safetensors and JSON with a model card. Loading runs no code (extra ``hub``)."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sigma_vae import models
from sigma_vae.config import EvaluationSettings, ModelConfig, RunConfig, write, write_whole
from sigma_vae.data import names
from sigma_vae.evaluation import Evaluation
from sigma_vae.evaluation.suite import meaning, report_rows
from sigma_vae.registry import needed_by
from sigma_vae.types import Likelihood, Network
from sigma_vae.vae import VAE

__all__ = ["PREFIX", "card", "fetch", "from_pretrained", "push", "push_to_hub", "save_pretrained", "stage"]

PREFIX = "hub:"
"""Before the name of a repository where a run is expected: ``hub:OWNER/NAME``, or ``hub:OWNER/NAME@REVISION``."""
NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.safetensors", "*.yaml", "*.png", "README.md")
"""Files that are fetched: none of them holds code."""
PICTURES = {
    "samples.png": "Samples, latents drawn from the model's prior.",
    "reconstructions.png": "Test examples, each above its reconstruction.",
    "calibration.png": "Calibration on test data. Diagonal and level lines are a model whose uncertainty is right.",
}
HEADER = """---
library_name: sigma-vae
tags:
- sigma-vae
- variational-autoencoder
- calibrated-decoder
---
"""


def save_pretrained(vae: VAE, folder: str | Path, evaluation: Evaluation | None = None) -> Path:
    """Write weights, description and a model card into a folder, which :func:`from_pretrained` opens.

    Args:
        vae: trained by :func:`~sigma_vae.training.fit`, made by :func:`sigma_vae.models.vae`, or loaded.
        folder: made where it does not exist.
        evaluation: numbers for the card.

    Raises:
        ValueError: nothing says what data the model is for, or a part cannot be saved.
    """
    return _saved(vae, Path(folder), evaluation, "OWNER/NAME")


def _saved(vae: VAE, folder: Path, evaluation: Evaluation | None, name: str) -> Path:
    if not isinstance(vae.origin, models.Origin):
        raise ValueError(
            "this VAE does not know the shape and scaling of its data; train it with sigma_vae.training.fit, or set vae.origin ="
            " sigma_vae.models.Origin.of(vae, data)"
        )
    models.save(folder, vae, *vae.origin)
    write_whole(folder / "README.md", card(vae.origin.config, evaluation, name=name))
    return folder


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    network: Network | None = None,
    likelihood: Likelihood | None = None,
) -> VAE:
    """Open a model from a folder, or from the Hub by its name ``OWNER/NAME``; in eval mode.

    Args:
        name: of a folder, or a repository.
        revision: branch, tag or commit; the main branch unless given.
        cache_dir: folder of downloads; the usual one of huggingface_hub unless given.
        token: for a private repository, unless you are logged in.
        local_files_only: use what was downloaded before; so does the environment variable ``HF_HUB_OFFLINE=1``.
        network: of your own, for a model that was trained with it.
        likelihood: likewise.

    Raises:
        ValueError: there is no such repository or folder, or it holds no model.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = fetch(str(name), revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    return models.load(folder, network, likelihood).vae


def push_to_hub(
    vae: VAE, name: str, *, evaluation: Evaluation | None = None, private: bool = False, token: str | None = None
) -> str:
    """Write a model with its card to the Hub, and return its address; the repository is made where there is none.

    Raises:
        ValueError: see :func:`save_pretrained`; or the Hub refuses.
    """
    _check_name(name)
    with tempfile.TemporaryDirectory() as folder:
        return _upload(_saved(vae, Path(folder), evaluation, name), name, private, token)


def push(run: Path, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Write a finished run to the Hub: model, configuration, evaluation, pictures and card, without your paths."""
    _check_name(name)
    with tempfile.TemporaryDirectory() as folder:
        return _upload(stage(run, Path(folder), name), name, private, token)


def stage(run: Path, folder: Path, name: str) -> Path:
    """Copy what :func:`push` uploads of a finished run, and write its card.

    Calibration is measured first where it was not, if the data can be read. The source of the data is cut to its name,
    and the environment to what reading other data needs.

    Raises:
        ValueError: there is no finished run.
    """
    from sigma_vae import runs
    from sigma_vae.runs.evaluate import read_evaluation
    from sigma_vae.runs.folder import model_digest, save_refitted, sigma_fitted_on

    vae = runs.open_model(run, "cpu").vae
    if not (run / "calibration.png").exists():
        with suppress(ValueError, OSError):  # without the data there is no plot
            runs.evaluate_run(run, EvaluationSettings(metrics=("calibration",)))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run / "model", folder / "model", dirs_exist_ok=True)
    for path in (*(run / name for name in PICTURES), run / "samples-standard-prior.png"):
        if path.is_file():
            shutil.copy(path, folder)
    config, found = runs.config_of(run), read_evaluation(run)
    shared = replace(config, data=replace(config.data, source=_shown(config.data.source), root=None, cache=None))
    write(folder / "config.yaml", shared)
    if (record := sigma_fitted_on(run)) is not None:
        save_refitted(folder, vae, record | {"data": _shown(str(record.get("data")))})
    found.about |= _without_places(found.about, model_digest(folder))
    write_whole(folder / "evaluation.json", json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "environment.json", json.dumps(_environment(run), indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "README.md", card(config.model, found, shared, name, folder))
    return folder


def _shown(source: str) -> str:
    """The source of data without folders; names of data sets stay."""
    return source if source in names() or source.startswith(PREFIX) else Path(source).name


def _without_places(about: dict[str, Any], digest: str) -> dict[str, Any]:
    """The record of an evaluation without the folders of its data, and with the digest of the weights in their new file."""
    records = ("sigma_fitted_on", "prior_fitted_on")
    cut = {
        key: about[key] | {"data": _shown(str(about[key].get("data")))} for key in records if isinstance(about.get(key), dict)
    }
    return cut | {"data": _shown(about["data"]), "how": about["how"] | {"model_sha256": digest}}


def _environment(run: Path) -> dict[str, Any]:
    known = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    data = known.get("data") or {}
    kept = {name: data[name] for name in ("counts", "preprocessing", "fingerprint", "columns") if name in data}
    return {name: known.get(name) for name in ("sigma_vae", "torch", "python", "seed")} | {"data": kept}


def card(
    model: ModelConfig,
    evaluation: Evaluation | None = None,
    config: RunConfig | None = None,
    name: str = "OWNER/NAME",
    folder: Path | None = None,
) -> str:
    """The model card: what it was trained on, its numbers with their meaning, how to use it, how to train it again."""
    return HEADER + "\n".join(_lines(model, evaluation, config, name, folder)) + "\n"


def _lines(
    model: ModelConfig, evaluation: Evaluation | None, config: RunConfig | None, name: str, folder: Path | None
) -> Iterator[str]:
    data = None if config is None else config.data.source
    yield f"# {name.rpartition('/')[2]}: a VAE with a calibrated decoder" + (f", trained on {data}" if data else "")
    yield f"\nA variational autoencoder of the library sigma-vae. Its decoder is a likelihood: `{model.likelihood}`."
    parts = (("network", model.network), ("likelihood", model.likelihood))
    yours = "".join(f", {kind}=your_{kind}" for kind, part in parts if part == models.UNNAMED)
    yield f'\n```python\nfrom sigma_vae import VAE\n\nvae = VAE.from_pretrained("{name}"{yours})\nexamples = vae.sample(16)\n```'
    if config is not None:
        yield f"\nOn the command line: `sigma-vae sample {PREFIX}{name} --out samples.png`"
    if evaluation is not None:
        yield from _numbers(evaluation)
    for picture, caption in PICTURES.items() if folder is not None else ():
        if (folder or Path()).joinpath(picture).is_file():
            yield f"\n{caption}\n\n![{caption}]({picture})"
    if config is not None:
        yield f"\n## Train it again\n\nWith the data `{data}`, and `config.yaml` of this repository:"
        yield "\n```console\n$ sigma-vae replay config.yaml --out again\n```"


def _numbers(evaluation: Evaluation) -> Iterator[str]:
    yield f"\n## Numbers\n\nMean ± standard error over {evaluation.bounds.examples} held-out examples.\n"
    yield "| number | value | meaning |\n| --- | --- | --- |"
    for row in report_rows(evaluation):
        error = f" ± {row.standard_error}" if row.standard_error else ""
        yield f"| {row.name} | {row.value}{error} | {meaning(row.name)} |"


@needed_by("sigma_vae.hub")
def fetch(
    name: str,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download a repository ``OWNER/NAME`` once, and return its folder in the cache.

    Raises:
        ValueError: the name is none, or the Hub (offline: the cache) does not have it.
    """
    from huggingface_hub import snapshot_download

    name, _, tag = name.removeprefix(PREFIX).partition("@")
    _check_name(name)
    try:
        where: Any = snapshot_download(
            name,
            revision=tag or revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(FILES),
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read from the Hub, nor from its cache: {' '.join(str(error).split())}") from error
    return Path(where)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"a model on the Hub is called OWNER/NAME, got {name!r}, which is no folder either")


@needed_by("sigma_vae.hub")
def _upload(folder: Path, name: str, private: bool, token: str | None) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model of sigma-vae")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be written to the Hub: {' '.join(str(error).split())}; log in: hf auth login"
        ) from error
    return address
