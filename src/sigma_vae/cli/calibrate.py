"""The subcommand that refits σ of a finished run."""

import json as json_module
from pathlib import Path

import tyro

from sigma_vae import runs
from sigma_vae.cli.files import Split

__all__ = ["calibrate"]


def calibrate(
    run: tyro.conf.Positional[str],
    *,
    data: str | None = None,
    split: Split = "train",
    seed: int = 0,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Refit σ of a finished run, β-VAEs included, and evaluate it anew: likelihoods of different scales then compare.

    Fixed, shared, running and predicted scales keep their own σ, and what is reported with it; their post-hoc values change. An
    optimal scale's own σ is the refitted one, so there all numbers change. The weights stay as they are. Fitting on the run's own
    training split again gives back what training left.

    Args:
        run: Folder of the run.
        data: Fit on these data, a name or a path, in place of the run's own; read with the same options (a .yaml file: with those of
            its own data section), and scaled as the run's own are.
        split: Whose examples: train, or validation where the training set is small. σ of test has seen what it is evaluated on.
        seed: Of the posterior's noise.
        device: auto, cpu, cuda, cuda:1.
        json: Print JSON alone.
    """
    result = runs.calibrate_run(Path(run), data, split, device=device, seed=seed)
    if json:
        print(json_module.dumps(result, ensure_ascii=False))
        return
    kind = "sigma_post_hoc" if "sigma_post_hoc" in result else "factor_post_hoc"
    for name, value in result[kind].items():
        if value["after"] is not None:
            before = "none" if value["before"] is None else f"{value['before']:.5f}"
            print(f"{kind}_{name:<8} {before} -> {value['after']:.5f}")
    fitted = result["sigma_fitted_on"]
    print(f"fitted on {fitted['examples']} examples of {fitted['data']} ({fitted['split']})")
    if split == "test" and data is None:
        print("the evaluation is of the same examples: its post-hoc numbers are no held-out ones")
    print(f"evaluated anew: {Path(run) / 'evaluation.json'}")
