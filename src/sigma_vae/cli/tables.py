"""Reports as tables in the terminal."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["print_comparison", "print_evaluation"]

Row = tuple[str, str, str]
"""What it is, its value, its standard error."""


def print_evaluation(report: dict[str, Any]) -> None:
    """The bounds, then each section that the report has."""
    from rich.console import Console
    from rich.table import Table

    prior = "" if report.get("prior", "standard") == "standard" else f" · prior {report['prior']}"
    table = Table(
        title=f"{report['data']} · {report['network']} · {report['likelihood']}{prior} · {report['examples']} {report['split']} examples"
    )
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("± s.e.", justify="right")
    for row in _bounds(report):
        table.add_row(*row)
    for name, rows in SECTIONS.items():
        if name in report:
            table.add_section()
            for row in rows(report[name]):
                table.add_row(*row)
    console = Console(markup=False, emoji=False)  # names of files may look like either
    console.print(table)
    for line in _seen(report.get("quality", {})):
        console.print(line)


def print_comparison(rows: Sequence[dict[str, Any]]) -> None:
    """A column for each run, a row for each thing that any of them says."""
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


def _bounds(report: dict[str, Any]) -> Iterator[Row]:
    yield from _means(report)
    if "standard_prior" in report:
        yield from _means(report["standard_prior"], " with N(0, I)")
    for name, value in report.items():
        if name.startswith(("sigma_post_hoc", "factor_post_hoc")):
            yield name, f"{value:.5f}", ""
    if "kl_per_layer_nats" in report:
        yield "kl_per_layer_nats", " ".join(f"{nats:.2f}" for nats in report["kl_per_layer_nats"]), ""
    if "active_units" in report:
        yield "active_units", f"{report['active_units']} of {report['latent_dim']}", ""
    if report.get("entropy_identity"):
        yield "entropy gap, nats/dim", f"{report['entropy_identity']['gap_nats_per_dim']:.4f}", ""


def _means(section: dict[str, Any], suffix: str = "") -> Iterator[Row]:
    """Of a section, what has a mean and a standard error."""
    for name, value in section.items():
        if isinstance(value, dict) and "mean" in value and value["mean"] is not None:
            error = value["standard_error"]
            yield name + suffix, f"{value['mean']:.4f}", "" if error is None else f"{error:.4f}"


def _numbers(section: dict[str, Any]) -> Iterator[Row]:
    """Means, and plain numbers of nats."""
    yield from _means(section)
    for name, value in section.items():
        if isinstance(value, float):
            yield name, f"{value:.4f}", ""


def _iwae(section: dict[str, Any]) -> Iterator[Row]:
    for name, value, error in _numbers(section):
        yield f"{name}, {section['draws']} draws", value, error


def _oracle(section: dict[str, Any]) -> Iterator[Row]:
    for name, value, error in _numbers(section):
        yield f"{name} (no likelihood)", value, error


def _calibration(section: dict[str, Any]) -> Iterator[Row]:
    for name in ("density", "density_post_hoc", "level", "level_post_hoc"):
        for percent, value in (section[name] or {"coverage": {}})["coverage"].items():
            for _, share, error in _means({"": value}):
                yield f"{percent} % interval covers, {name}", share, error


def _quality(section: dict[str, Any]) -> Iterator[Row]:
    """Fréchet distances, each with how many images of what it is of; of samples also the other numbers."""
    for features, part in section.items():
        how = f"{features}, {part.get('examples')} of {part['split']}"
        for name in ("samples", "samples_standard_prior"):
            for shown, numbers in part.get(name, {}).items():
                what = f"{name.replace('_', ' ')}, {shown} ({how})"
                yield f"Fréchet distance, {what}", f"{numbers['frechet']:.3f}", ""
                yield f"kernel distance, {what}", f"{numbers['kernel']['mean']:.5f}", ""
                for pair in (("precision", "recall"), ("density", "coverage")):
                    yield f"{' / '.join(pair)}, {what}", " / ".join(f"{numbers[one]:.3f}" for one in pair), ""
        if "reconstructions" in part:
            yield f"Fréchet distance, reconstructions ({how})", f"{part['reconstructions']['means']['frechet']:.3f}", ""
        for name in ("floor", "clips", "frames"):
            if name in part:
                count = f"{part[name]['examples']} of {part[name].get('split', part['split'])}"
                yield f"Fréchet distance, {name} ({features}, {count})", f"{part[name]['frechet']:.3f}", ""


def _seen(quality: dict[str, Any]) -> Iterator[str]:
    """How images were cut and resized before they were compared: part of what a distance is."""
    for features, part in quality.items():
        for section in (part, part.get("clips", {}), part.get("frames", {})):
            if "extractor" in section:
                how, size = section["extractor"], "×".join(map(str, section["extractor"]["input"]))
                yield f"{features}: data {part['data']['preprocessing']}; features of {size}, preprocessing {how['preprocessing']}"


SECTIONS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "iwae": _iwae,
    "oracle": _oracle,
    "information": _numbers,
    "calibration": _calibration,
    "quality": _quality,
    "predictions": _means,
}
