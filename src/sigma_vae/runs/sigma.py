"""The refitted σ of a finished run: kept with its weights, together with what it was fitted on."""

import json
from pathlib import Path
from typing import Any

from sigma_vae.configfile import write_whole
from sigma_vae.vae import VAE

__all__ = ["fitted_on", "keep"]

KEY = "sigma_fitted_on"


def keep(out: Path, vae: VAE, record: dict[str, Any]) -> None:
    """Write the model's weights and scales anew, with a record of what σ was fitted on; the old file stands until the new one is whole.

    Both are one file, so that neither is ever there without the other; a training that goes on writes it without the record.
    """
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in vae.state_dict().items()}
    write_whole(out / "model" / "model.safetensors", save(state, metadata={KEY: json.dumps(record, ensure_ascii=False)}))


def fitted_on(out: Path) -> dict[str, Any] | None:
    """What a later calibration fitted σ on, as :func:`keep` wrote it; None where training did, on its own training split."""
    from safetensors import safe_open

    path = out / "model" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        record = (file.metadata() or {}).get(KEY)
    if record is None:
        return None
    try:
        content = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not say in JSON what its σ was fitted on: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} says that its σ was fitted on {content!r}, which is no record of data")
    return content
