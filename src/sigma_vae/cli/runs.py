"""Commands that train runs, evaluate, refit and compare them."""

import json as json_module
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sigma_vae import runs
from sigma_vae.cli.options import HUB, RunFolder, RunFolders, to_change, to_read
from sigma_vae.cli.outputs import Split, check_count, checked
from sigma_vae.config import EvaluationSettings, RunConfig, read
from sigma_vae.evaluation import Evaluation, suite
from sigma_vae.evaluation.base import metrics
from sigma_vae.registry import Names, register
from sigma_vae.runs import page
from sigma_vae.runs.audit import PREFIX, audit, audit_rows, evaluate_audited, name_of, notes, write_page

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def train(
    config: Annotated[RunConfig, tyro.conf.PositionalRequiredArgs],
    *,
    out: str | None = None,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Train a VAE on DATA, calibrate and evaluate it, and draw samples.

    Everything is written into a new run folder, with a page to read: report.html. The evaluation is on the test split.

    Args:
        config: The run.
        out: Folder of the run, never overwritten; runs/DATA-NETWORK-LIKELIHOOD-SEED unless given (without what is auto).
        quiet: Print the folder of the run only.
        json: Print the evaluation as JSON only.
    """
    chosen = [name for name in (config.model.network, config.model.likelihood) if name != "auto"]
    name = "-".join([Path(config.data.source).stem, *chosen, str(config.seed)])
    folder = Path(out) if out is not None else Path("runs") / name.replace("/", "-").replace(":", "")
    _finished(folder, runs.train(config, folder, progress=not (json or quiet)), json, quiet)


def replay(
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    *,
    out: str,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Train again what a config.yaml describes, into a new folder.

    Args:
        config: The config.yaml of a run, or one written by hand.
        out: Folder of the new run, never overwritten.
        quiet: Print the folder of the run only.
        json: Print the evaluation as JSON only.
    """
    _finished(Path(out), runs.train(read(Path(config), RunConfig), Path(out), progress=not (json or quiet)), json, quiet)


def resume(
    run: RunFolder, *, epochs: int | None = None, root: str | None = None, quiet: bool = False, json: bool = False
) -> None:
    """Continue a run exactly where it stopped.

    The run is then calibrated and evaluated, as ``train`` would have done.

    Args:
        run: Folder of the run.
        epochs: Total number of epochs, in place of the run's own.
        root: Folder that holds the run's data now, if they have moved; the run keeps it.
        quiet: Print the folder of the run only.
        json: Print the evaluation as JSON only.
    """
    folder = to_change(run)
    if root is not None:
        runs.move_data(folder, root)
    _finished(folder, runs.resume(folder, epochs=epochs, progress=not (json or quiet)), json, quiet)


def report(run: RunFolder, *, device: str = "auto") -> None:
    """Write the page of a finished run anew: report.html, in one file.

    It says what was trained on what, and has curves, pictures, calibration, latents, the oddest and the most typical test
    examples, and advice in words.

    Args:
        run: Folder of the run.
        device: auto, cpu, cuda or cuda:1.
    """
    print(runs.report(to_change(run), device))


def push(
    run: RunFolder,
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")],
    *,
    private: bool = False,
    out: str | None = None,
) -> None:
    """Write a finished run to the Hugging Face Hub, with a model card made from its evaluation.

    Log in first: hf auth login. Weights, configuration, evaluation and pictures are uploaded; paths of your machine are
    not. The model is then a RUN wherever one is read: hub:OWNER/NAME.

    Args:
        run: Folder of the run.
        name: Repository; made where there is none.
        private: Make a new repository private.
        out: Folder to write in place of the Hub, to look at first.
    """
    from sigma_vae import hub

    print(hub.push(Path(run), name, private=private) if out is None else hub.stage(Path(run), Path(out), name))


def _finished(folder: Path, found: Evaluation, as_json: bool, quiet: bool) -> None:
    """Print the numbers of a run that has ended, what they mean, advice, its files, and the next command."""
    if as_json:
        print(json_module.dumps(found.to_json()))
        return
    if not quiet:
        console = _console()
        console.print(_table(found))
        for line in (*_about_priors(found), *_in_words(folder, found)):
            console.print(line)
    print(f"run folder: {folder}")


def _in_words(folder: Path, found: Evaluation) -> Iterator[str]:
    means = {row.name: suite.meaning(row.name) for row in suite.report_rows(found) if "with N(0, I)" not in row.name}
    yield "\nWhat the numbers mean:"
    yield from (f"  {name}: {sentence}" for name, sentence in means.items() if sentence)
    if "standard_prior" in found:
        yield "  ... with N(0, I): the same with N(0, I) in place of the fitted prior."
    if said := page.advice(folder, runs.config_of(folder), found, page.read_curves(folder)):
        yield "\nWhat to do:"
        yield from (f"  {line}" for line in said)
    pictures = sorted(str(path) for path in folder.iterdir() if path.suffix in (".png", ".gif"))
    yield f"\npage: {folder / 'report.html'}"
    if pictures:
        yield f"pictures: {' '.join(pictures)}"
    yield f"next: {page.next_command(folder, found)}"


def rerun(run: RunFolder, *, json: bool = False) -> None:
    """Repeat the step whose loss was not finite, and report the first layer where that begins.

    Args:
        run: Folder of the run.
        json: Print JSON only.
    """
    report = runs.rerun(to_change(run))
    if json:
        print(json_module.dumps(report))
        return
    print(report["diagnosis"])
    for place in report["begins_in"] or ["nowhere: in the repeated step everything is finite"]:
        print(f"not finite: {place}")


def evaluate(
    run: RunFolder,
    settings: EvaluationSettings,
    *,
    data: str | None = None,
    root: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Measure a finished run on held-out data.

    Its bounds are always measured, in nats and in bits per dimension; other metrics as asked. Where neither metrics nor a
    number of examples are asked for, examples of 2²⁵ values are measured, a tenth of that where the prior's density
    takes long; the table says of how many. Of a run on the Hub (hub:OWNER/NAME) the results are only printed.

    Args:
        run: Folder of the run; or hf-vae:FOLDER, an autoencoder of diffusers (or hf-vae:OWNER/NAME on the Hugging Face Hub), with
            --data. Its σ is solved on validation data, and nothing is written.
        settings: The metrics.
        data: Other data, by name or path, read and scaled like the run's own; all of them, where they have no splits. The
            results are written into RUN/evaluation-DATA.json.
        root: Folder that holds the run's own data now, if they have moved; the run keeps it, for all commands.
        device: auto, cpu, cuda or cuda:1.
        json: Print JSON only.
    """
    if run.startswith(PREFIX):
        if root is not None:
            raise ValueError(f"--root is for the data of a run, and {run} has none; give the data as --data PATH")
        _show(evaluate_audited(run, _given(data), settings, device), json)
        return
    if run.startswith(HUB):
        with TemporaryDirectory() as folder:
            copied = shutil.copytree(to_read(run), Path(folder) / "run")
            if root is not None:
                runs.move_data(copied, root)
            _show(runs.evaluate_run(copied, settings, data, device=device), json)
        return
    if root is not None:
        runs.move_data(Path(run), root)
    _show(runs.evaluate_run(Path(run), settings, data, device=device), json)
    if data is not None:
        _say(f"written: {runs.evaluation_file(Path(run), data)}", json)


def _show(report: Evaluation, as_json: bool) -> None:
    if as_json:
        print(json_module.dumps(report.to_json()))
    else:
        print_evaluation(report)


def print_evaluation(report: Evaluation) -> None:
    """Print the bounds, then the section of each further metric, and the notes below."""
    console = _console()
    console.print(_table(report))
    for line in (*suite.notes(report), *_about_priors(report)):
        console.print(line)


def _console() -> "Console":
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)  # names of files may look like either


def _table(report: Evaluation) -> "Table":
    from rich.table import Table

    about = report.about
    prior = "" if about.get("prior", "standard") == "standard" else f" · prior {about['prior']}"
    split = "" if about["split"] == "all" else f"{about['split']} "
    examples = f"{report.bounds.examples}{_of_all(about)} {split}examples"
    table = Table(title=f"{about['data']} · {about['network']} · {about['likelihood']}{prior} · {examples}")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("± s.e.", justify="right")
    for name, metric in metrics().items():
        result = report.results.get(name)
        if result is None:
            continue
        if metric.measured != "always":
            table.add_section()
        for row in metric.rows(result):
            table.add_row(*row)
    return table


def _of_all(about: Mapping[str, Any]) -> str:
    """Number of examples that an evaluation's were chosen from; nothing where it is on all of them."""
    return f" of {about['of_examples']}" if "of_examples" in about else ""


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text)


def calibrate(
    run: RunFolder,
    *,
    data: str | None = None,
    split: Split = "validation",
    examples: int | None = None,
    kl_weight: float | None = None,
    out: str | None = None,
    seed: int = 0,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Refit σ of a finished run, and evaluate it again; or audit a VAE of diffusers.

    With refitted ("post-hoc") σ, runs of different scales compare, β-VAEs included. Only an optimal scale takes the
    refitted σ as its own; fixed, shared, running and predicted scales keep theirs, and the numbers reported with it.
    The weights do not change. A refit on the run's own validation split gives the σ that training ended with, unless that
    was a short one, which looked at a part of the split. The evaluation is on as many examples as the run's last one.

    Of an autoencoder of diffusers, σ, rate, bits per dimension, the moments of the latents, the scaling factor that it should have,
    and the KL weight that its σ implies are printed and written as a page.

    Args:
        run: Folder of the run; or hf-vae:FOLDER, an autoencoder of diffusers (or hf-vae:OWNER/NAME on the Hugging Face Hub), with
            --data. Only safetensors are opened.
        data: Data to fit σ on, by name or path, in place of the run's own. They are read with the run's options (from a
            .yaml file: with the options in its data section) and scaled like the run's data.
        split: Split to fit σ on. From training data, σ is too small where the model overfits; a σ fitted on test has seen
            the examples that it is evaluated on.
        examples: Most examples to fit σ on, chosen at random; as many as have 2²⁴ values unless given.
        kl_weight: KL weight that the autoencoder of diffusers was trained with, to be compared.
        out: Page of the audit (.html); audit-NAME.html unless given.
        seed: Seed of the posterior's noise.
        device: auto, cpu, cuda or cuda:1.
        json: Print JSON only.
    """
    if run.startswith(PREFIX):
        if examples is not None:
            raise ValueError(f"--examples is for runs, and {run} is audited on all examples; leave it out")
        _audit(run, _given(data), split, kl_weight, out, seed, device, json)
        return
    if kl_weight is not None or out is not None:
        raise ValueError(f"--kl-weight and --out are for an audit of {PREFIX}FOLDER, and {run} is a run; leave them out")
    if examples is not None:
        check_count(examples, "--examples")
    result = runs.calibrate_run(to_change(run), data, split, examples=examples, device=device, seed=seed)
    if json:
        print(json_module.dumps(result))
        return
    kind = "sigma_post_hoc" if "sigma_post_hoc" in result else "factor_post_hoc"
    for name, value in result[kind].items():
        if value["after"] is not None:
            before = "none" if value["before"] is None else f"{value['before']:.5f}"
            print(f"{kind}_{name:<8} {before} -> {value['after']:.5f}")
    fitted = result["sigma_fitted_on"]
    print(f"fitted on {fitted['examples']}{_of_all(fitted)} examples of {fitted['data']} ({fitted['split']})")
    if split == "test" and data is None:
        print("the evaluation uses the same examples, so its post-hoc numbers are not held-out numbers")
    again = result["evaluation"]
    print(f"evaluated again on {again['examples']}{_of_all(again)} test examples: {Path(run) / 'evaluation.json'}")


def _given(data: str | None) -> str:
    if data is None:
        raise ValueError("an autoencoder of diffusers is measured on your data: give --data, a name or a path")
    return data


def _audit(
    source: str, data: str, split: Split, kl_weight: float | None, out: str | None, seed: int, device: str, as_json: bool
) -> None:
    from rich.console import Console
    from rich.table import Table

    path = checked(Path(f"audit-{name_of(source)}.html" if out is None else out), (".html",))
    found, picture = audit(source, data, kl_weight=kl_weight, split=split, seed=seed, device=device)
    write_page(found, picture, path)
    if as_json:
        print(json_module.dumps(found.to_json()))
        return
    table = Table("", "", "meaning", title=f"{found.name} · {found.examples} test examples of {found.data}")
    for row in audit_rows(found):
        table.add_row(*row)
    console = Console(markup=False, emoji=False)
    console.print(table)
    for line in notes(found):
        console.print(line)
    print(path)


def fit_prior(
    run: RunFolder,
    *,
    prior: Annotated[
        str, Names("Name of the prior; auto: the best on validation data; standard goes back to N(0, I).", register.prior)
    ] = "auto",
    data: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Fit a prior to the latents of a finished run, and evaluate it again.

    The prior is fitted on the training split. The rest of the model does not change. The run's config.yaml then names
    the new prior, so that a replay gives the same run, unless it was fitted on other data.

    Args:
        run: Folder of the run.
        prior: Name of the prior.
        data: Data whose latents it is fitted to, by name or path, in place of the run's own; read as by calibrate.
        device: auto, cpu, cuda or cuda:1.
        json: Print the evaluation as JSON only.
    """
    report = runs.fit_prior(to_change(run), prior, data, device=device)
    if json:
        print(json_module.dumps(report.to_json()))
    else:
        _print_side_by_side(report)


def _print_side_by_side(report: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    standard = report.get("standard_prior", report)
    columns = {"N(0, I)": standard} | ({report["prior"]: report} if "standard_prior" in report else {})
    table = Table("", title=f"mean ± standard error over {report['examples']} test examples")
    for name in columns:
        table.add_column(name, justify="right")
    for key in ("elbo_nats", "elbo_post_hoc_nats", "objective_nats", "rate_nats", "bits_per_dim", "bits_per_dim_post_hoc"):
        if key in standard:
            table.add_row(key, *(_cell(values[key]) for values in columns.values()))
    console = Console()
    console.print(table)
    for line in _about_priors(report):
        console.print(line)


def _about_priors(report: Evaluation) -> Iterator[str]:
    """A line on the priors that were compared when one was fitted."""
    if found := report.about.get("prior_held_out_nats"):
        each = ", ".join(f"{name} {nats:.2f}" for name, nats in found.items())
        yield f"Priors by the mean log-density of held-out latents, in nats: {each}. The first one is used."


def compare(
    folders: RunFolders,
    *,
    paired: bool = False,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Compare finished runs on the same examples.

    The numbers come from the runs' evaluations. Bits per dimension compare between all decoders; nats are left out
    where some runs observe levels and others a density.

    Args:
        folders: Folders of the runs; the first is the reference.
        paired: Score every test example of each run again, and print mean differences from the first run with their
            standard errors.
        device: Device for the scoring: auto, cpu, cuda or cuda:1.
        json: Print JSON only.
    """
    rows = runs.compare([to_read(run) for run in folders], paired=paired, device=device)
    if json:
        print(json_module.dumps(rows))
    else:
        _print_comparison(rows)


def _print_comparison(rows: Sequence[dict[str, Any]]) -> None:
    """Print a column for each run, and a row for each number that any of them has."""
    from rich.console import Console
    from rich.table import Table

    table = Table("")
    for row in rows:
        table.add_column(row["run"], justify="right", overflow="fold")
    for name in dict.fromkeys(name for row in rows for name in row):
        if name != "run" and any(row.get(name) is not None for row in rows):
            table.add_row(name, *(_cell(row.get(name)) for row in rows))
    Console(markup=False, emoji=False).print(table)


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case {"mean": mean, "standard_error": error}:
            return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"
        case float():
            return f"{value:.4f}"
        case _:
            return str(value)


def export(run: RunFolder, *, out: str, to: Literal["diffusers"] = "diffusers", device: str = "auto") -> None:
    """Write a run's autoencoder for another library.

    The folder has config.json, weights (safetensors) and a model card: AutoencoderKL.from_pretrained opens it. Scaling
    factor, shift factor, and mean and std of each channel of the latents are measured on the training split.

    Args:
        run: Folder of the run: network spatial (images, trained with --start random) or autoencoder-kl, and a likelihood
            with a mean and a scale.
        out: Folder to write, never overwritten.
        to: Library.
        device: auto, cpu, cuda or cuda:1.
    """
    from sigma_vae.runs.audit import export as write

    for name, value in write(to_read(run), Path(out), device=device).items():
        print(f"{name}: {value}")
    print(out)
