"""Reports of studies: the page stands alone, its numbers are the cells' numbers, verdicts follow rules."""

import errno
import itertools
import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from sigma_vae import study
from sigma_vae.cli import main
from sigma_vae.evaluation import plots
from sigma_vae.study import report as report_function
from sigma_vae.study.claims import CLAIMS
from sigma_vae.study.comparisons import settings
from sigma_vae.study.report import _style
from sigma_vae.study.runner import claim, folder_of

OPTIMAL, SHARED, PIXEL = "gaussian/optimal", "gaussian/shared", "gaussian/per-pixel"
BETAS = ["gaussian/beta:0.002", "gaussian/beta:0.02", "gaussian/beta:0.2", "gaussian/beta:2"]
ARMS = [OPTIMAL, SHARED, PIXEL, *BETAS]
IMAGE, OPTIMAL_IMAGE = "gaussian/per-image", "gaussian/optimal-image"
LEVELS = ["categorical", "bitwise-categorical", "logistic-mixture:5"]
NUMBERS = {  # one for each of ARMS
    "elbo": (100.0, 99.0, 150.0, 90.0, 101.0, 80.0, 40.0),
    "bits": (4.0, 4.0, 3.9, 4.2, 4.1, 4.3, 4.6),
    "rate": (20.0, 20.0, 12.0, 40.0, 22.0, 10.0, 2.0),
    "frechet": (50.0, 51.0, 80.0, 60.0, 48.0, 70.0, 90.0),
    "fitted": (10.0, 11.0, 30.0, 20.0, 15.0, 40.0, 80.0),
    "kl": (2.0, 2.0, 6.0, 11.0, 3.0, 1.5, 1.0),
    "coverage": (0.91, 0.91, 0.9, 0.3, 0.8, 0.97, 1.0),
    "sigma": (0.12, 0.12, None, 0.1, 0.12, 0.2, 0.3),
    "speed": (3.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0),
    "spread": (0.2, 0.1, 0.3, 0.15, 0.25, 0.1, 0.05),
    "psnr": (20.0,) * 7,
    "ssim": (0.5,) * 7,
}
ERROR = "ValueError: <script>alert(1)</script> & |more|"
svg = report_function.__globals__["svg"]


@pytest.fixture(autouse=True)
def sketched(monkeypatch):
    """Reports that a test makes for their words have plots without layout, as pages of runs have; those of fixtures are whole."""
    monkeypatch.setitem(report_function.__globals__, "svg", plots.svg)


def a_spec(seeds=3, likelihoods=ARMS, network="mlp", along=None, **more):
    axes = (along or {}) | {"model.likelihood": list(likelihoods), "seed": list(range(seeds))}
    base = {"data": {"source": "digits"}, "model": {"network": network}}
    rows = {OPTIMAL: {"negative_elbo_nats": -3333, "fid": 27.25}, BETAS[0]: {"negative_elbo_nats": None, "fid": 44.54}}
    rows |= {"bernoulli": {"negative_elbo_nats": [1.5, -2], "fid": 32.22, "note": "of two data sets"}}
    published = {"source": "a table", "rows": rows}
    return study.StudySpec(
        "A & B <made up>", base, axes, "It shows nothing.", ("standard", "mixture:3"), published=published, **more
    )


def number(name, config, changes):
    """Of a likelihood, or of it with a batch size, or of a KL weight, where they have one of their own."""
    arm, training = config.model.likelihood, config.training
    usual = NUMBERS[name][ARMS.index(arm) if arm in ARMS else 0]
    for key in (f"KL weight {training.kl_weight:g}", f"{arm}, {training.batch_size}", arm):
        if (key, name) in changes:
            return changes[key, name]
    return usual


def of_split(config, prior, split, changes):
    """A report as an evaluation writes it."""
    seed, of = config.seed, {name: number(name, config, changes) for name in NUMBERS}
    shift = (seed - 1) * of["spread"]
    elbo = of["elbo"] + seed + shift + (3.0 if prior != "standard" else 0.0) + (0.5 if split == "validation" else 0.0)

    def mean(value):
        return {"mean": value, "standard_error": 0.01}

    report = {
        "split": split,
        "observes": "density",
        "dims": 200,
        "elbo_nats": mean(elbo - 1),
        "elbo_post_hoc_nats": mean(elbo),
        "rate_nats": mean(of["rate"] + 0.1 * seed),
        "bits_per_dim_post_hoc": mean(of["bits"] - 0.01 * shift),
    }
    if of["sigma"] is not None:
        report["sigma_post_hoc_density"] = of["sigma"]
    if split == "test":
        marginal = of["kl"] + 0.1 * seed
        report["information"] = {
            "marginal_kl_at_least_nats": marginal,
            "mutual_information_at_most_nats": of["rate"] + 0.1 * seed - marginal,
        }
        covered = {str(percent): mean(of["coverage"] * percent / 90 + 0.001 * shift) for percent in (50, 80, 90, 95)}
        report["calibration"] = {"density": {"coverage": covered}}
        distance = of["frechet" if prior == "standard" else "fitted"] + shift
        frechet = {"frechet": distance}
        moving = config.model.network.startswith("sequence")
        report["quality"] = {"efficientnet": {"frames": frechet} if moving else {"samples": {"means": frechet}}}
        report["predictions"] = {"psnr_db": mean(of["psnr"] + shift), "ssim": mean(of["ssim"])} if moving else {}
    return report


def edit(spec, out, change):
    """Change the records that cells have left: ``change`` takes the cell's config and its record."""
    for cell in study.cells(spec):
        path = folder_of(cell, out) / "cell.json"
        record = json.loads(path.read_text())
        change(cell.config, record)
        path.write_text(json.dumps(record))
    return out


def build(spec, out, changes=None, failed=(), pictures=()):
    """What a finished study leaves, with made-up numbers."""
    changes = changes or {}
    claim(spec, out)
    for cell in study.cells(spec):
        arm, seed = cell.config.model.likelihood, cell.config.seed
        record = {"key": cell.key, "place": cell.place, "threads": 2, "failures": 0, "status": "done", "seconds": 90.0 + seed}
        if (arm, seed) in failed:
            record |= {"status": "failed", "failures": 2, "error": failed[arm, seed], "traceback": "..."}
        else:
            pace = number("speed", cell.config, changes)
            end = number("elbo", cell.config, changes) + seed
            record["curve"] = [{"step": 100 * i, "elbo_nats": end * (1 - 0.5 ** (pace * i))} for i in range(1, 9)]
            record["training_seconds"] = 60.0
            record["reports"] = {
                prior: {split: of_split(cell.config, prior, split, changes) for split in ("test", "validation")}
                for prior in spec.priors
            }
        folder = folder_of(cell, out)
        (folder / "run").mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps(record))
        for name in pictures if seed == 0 else ():
            Image.fromarray(np.full((300, 300), 40 * ARMS.index(arm), dtype=np.uint8)).save(folder / "run" / name)
    return out


class Page(HTMLParser):
    """Tags with attributes, headings, text, and tables by caption as rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.text = [], {}, ""
        self.rows, self.into = [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.rows, self.caption = [], ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.into = tag if tag in ("td", "th", "caption") else self.into

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self.caption] = self.rows
        if tag in ("td", "th", "caption"):
            self.into = None

    def handle_data(self, data):
        self.text += data
        if self.into == "caption":
            self.caption += data
        elif self.into is not None:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def spec():
    return a_spec()


@pytest.fixture(scope="module")
def out(spec, tmp_path_factory):
    """A study in which one cell failed."""
    pictures = ("samples.png", "samples-standard-prior.png", "reconstructions.png")
    made = build(spec, tmp_path_factory.mktemp("made-up") / "out", failed={(BETAS[3], 2): ERROR}, pictures=pictures)
    study.report(made)
    return made


@pytest.fixture(scope="module")
def page(out):
    return Page((out / "report.html").read_text())


def measured(spec, out):
    """What the cells have written, by pandas alone."""
    rows = []
    for cell in study.cells(spec):
        record = json.loads((folder_of(cell, out) / "cell.json").read_text())
        for prior, reports in record.get("reports", {}).items():
            test = reports["test"]
            row = {"arm": cell.config.model.likelihood, "seed": cell.config.seed, "prior": prior}
            row |= {name: test[name]["mean"] for name in ("elbo_post_hoc_nats", "bits_per_dim_post_hoc", "rate_nats")}
            row["covers"] = test["calibration"]["density"]["coverage"]["90"]["mean"]
            row["frechet"] = test["quality"]["efficientnet"]["samples"]["means"]["frechet"]
            rows.append(row | {"hours": record["seconds"] * record["threads"] / 3600})
    return pd.DataFrame(rows)


def floats(words):
    return [
        float(word)
        for word in words.replace("−", "-").replace("[", " ").replace("]", " ").replace(",", " ").split()
        if _is(word)
    ]


def _is(word):
    try:
        float(word)
    except ValueError:
        return False
    return True


def test_the_page_needs_nothing_else(out, page):
    assert (out / "report.html").stat().st_size < 3_000_000
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in (out / "report.html").read_text().split("</style>")[0]


def test_the_page_can_be_read_by_everybody(page):
    tags = [tag for tag, _ in page.tags]
    assert dict(page.tags)["html"]["lang"] == "en"
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)
    levels = [int(tag[1]) for tag in tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 5 + 7 * 3  # each plot; of each arm three
    assert all(len(picture["alt"]) > 10 for picture in pictures)
    assert tags.count("caption") == tags.count("table") == len(page.tables)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


def test_results_are_those_of_the_cells(spec, out, page):
    heads, *rows = page.tables["Results"]
    found = measured(spec, out).groupby(["arm", "prior"])
    columns = ["bits_per_dim_post_hoc", "elbo_post_hoc_nats", "rate_nats", "covers", "frechet"]
    assert len(rows) == len(found) == 7 * 2
    assert heads[-2:] == ["paper: ELBO, nats (it prints −ELBO)", "paper: FID"]
    for arm, prior, seeds, *numbers in rows:
        group = found.get_group((arm, prior))
        assert seeds == ("2, 1 failed" if arm == BETAS[3] else "3")
        assert int(seeds[0]) == len(group)
        for column, words in zip(columns, numbers, strict=False):
            digits = len(words.split()[0].partition(".")[2])
            wanted = [group[column].mean(), group[column].std()]
            said = floats(words.replace("±", " "))
            assert said == pytest.approx(wanted, abs=0.51 * 10.0**-digits)
    published = {(arm, prior): tuple(rest[-2:]) for arm, prior, _, *rest in rows}
    assert published[OPTIMAL, "standard"] == ("3333", "27.25")
    assert published[BETAS[0], "standard"] == ("–", "44.54")
    assert published[OPTIMAL, "mixture:3"] == published[SHARED, "standard"] == ("", "")
    _, *others = page.tables["Rows of the paper without a match in this study"]
    assert others == [["bernoulli", "−1.5 / 2", "32.22", "of two data sets"]]


def test_differences_are_paired(spec, out, page):
    _, *rows = page.tables["gaussian/optimal minus"]
    table = measured(spec, out).set_index(["arm", "prior", "seed"]).sort_index()
    assert len(rows) == 6 * 2 + 2
    assert rows[-1][0] == f"best fixed σ on validation: {BETAS[1]}; left out, as seeds are missing: {BETAS[3]}"
    for other, prior, *numbers in rows:
        arm = other.rpartition("validation: ")[2].partition(";")[0]
        for column, words in zip(("bits_per_dim_post_hoc", "elbo_post_hoc_nats"), numbers, strict=True):
            pairs = (table.loc[OPTIMAL, prior][column] - table.loc[arm, prior][column]).dropna()
            mean, low, high, seeds = floats(words)
            assert mean == pytest.approx(pairs.mean(), abs=0.06)
            interval = stats.t.interval(0.95, len(pairs) - 1, pairs.mean(), stats.sem(pairs))
            assert (low, high) == pytest.approx(interval, abs=0.06)
            assert seeds == len(pairs)


@pytest.mark.parametrize("command", ["report", "keep"])
def test_a_full_disk_leaves_whole_files_of_a_report(command, tmp_path, capsys, monkeypatch):
    """Whichever file has no room: each is the old or the new one, and none is missing; afterwards it is made as ever."""
    spec = a_spec(seeds=1, likelihoods=[OPTIMAL, SHARED])
    out, to = build(spec, tmp_path / "out"), tmp_path / "kept"
    words = ["study", command, str(out), *(["--to", str(to)] if command == "keep" else [])]

    def files():
        made = [path for path in (to if command == "keep" else out).rglob("*") if path.is_file() and "cells" not in path.parts]
        return {path: path.read_bytes() for path in made}

    assert main(words) == 0
    before = files()
    edit(spec, out, lambda config, record: record.update(seconds=7e7))
    assert main(words) == 0
    after = files()
    edit(spec, out, lambda config, record: record.update(seconds=90.0 + config.seed))
    assert main(words) == 0
    assert files() == before
    edit(spec, out, lambda config, record: record.update(seconds=7e7))
    for room in range(len(before) + 2):

        def sync(_, written=iter(range(room))):  # noqa: B008
            if next(written, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", sync)
            code = main(words)
        assert files().keys() == before.keys()
        assert all(content in (before[path], after[path]) for path, content in files().items())
        if code == 0:
            assert room > 1
            break
    assert files() == after


def test_what_is_finished_is_not_run_again_however_many_workers_and_retries(tmp_path):
    spec = a_spec()
    assert len(study.run(spec, build(spec, tmp_path / "out"), workers=10**18, retries=10**18)) == 21


def test_cost_compares_the_grid_with_one_run(spec, out, page):
    _, whole, grid, one = page.tables["Cost of training and evaluation, all attempts"]
    hours = measured(spec, out).drop_duplicates(["arm", "seed"]).groupby("arm")["hours"].agg(["sum", "count", "mean"])
    failed = 2 * 92.0 / 3600
    assert whole[0] == "the whole study, failed runs included"
    assert [int(whole[1]), float(whole[2])] == [21, pytest.approx(hours["sum"].sum() + failed, abs=5e-4)]
    assert [int(grid[1]), float(grid[2])] == [11, pytest.approx(hours.loc[BETAS, "sum"].sum(), abs=5e-4)]
    assert [int(one[1]), float(one[2])] == [3, pytest.approx(hours.loc[OPTIMAL, "sum"], abs=5e-4)]
    assert float(grid[3]) == pytest.approx(hours.loc[BETAS, "mean"].sum() / hours.loc[OPTIMAL, "mean"], abs=0.051)


def test_cost_is_per_seed_where_seeds_are_missing(spec, tmp_path):
    """Of σ that take as long as optimal the grid costs as many times as much as it has σ, however many runs are missing."""
    missing = {(BETAS[0], 1): ERROR, (BETAS[0], 2): ERROR, (OPTIMAL, 2): ERROR}

    def same(config, record):
        record["seconds"] = 100.0

    study.report(edit(spec, build(spec, tmp_path / "out", failed=missing), same))
    rows = Page((tmp_path / "out" / "report.html").read_text()).tables["Cost of training and evaluation, all attempts"]
    assert [row[3] for row in rows[1:]] == ["", "4.0", "1"]


def test_a_failed_cell_is_shown_with_its_error(out, page):
    _, row = page.tables["Cells that failed"]
    assert row == [f"likelihood {BETAS[3]}, seed 2", ERROR, "2"]
    assert "20 of 21 cells are done, 1 failed, 0 have not ended." in page.text
    counts = {arm: rest for arm, *rest in page.tables["Runs that ended"]}
    assert counts[BETAS[3]] == ["3", "0", "1"]
    assert f"left out, as seeds are missing: {BETAS[3]}" in page.text
    markdown = (out / "report.md").read_text()
    assert "&lt;script>alert(1)&lt;/script> &amp; \\|more\\|" in markdown


def test_markdown_has_the_same_tables_and_pictures(out, page):
    markdown = (out / "report.md").read_text()
    for caption in page.tables:
        assert f"**{caption}**" in markdown
    files = {line.rpartition("](")[2].rstrip(")") for line in markdown.splitlines() if line.startswith("![")}
    there = [*(out / "report-files").iterdir(), *(out / "cells").glob("*/run/*.png")]
    assert files == {path.relative_to(out).as_posix() for path in there}
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert len(rows) == sum(map(len, page.tables.values()))


def test_it_is_the_same_but_for_the_date(spec, out, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copyfile(out / "study.yaml", copy / "study.yaml")
    shutil.copytree(out / "cells", copy / "cells")

    class Later:
        @staticmethod
        def now(_):
            return pd.Timestamp("2099-01-01")

    monkeypatch.setitem(report_function.__globals__, "datetime", Later)
    monkeypatch.setitem(report_function.__globals__, "svg", svg)
    study.report(copy)
    for name in ("report.html", "report.md"):
        ours, theirs = ((folder / name).read_text().splitlines() for folder in (out, copy))
        differ = [line for line, other in zip(ours, theirs, strict=True) if line != other]
        assert len(differ) == 1
        assert "Made on" in differ[0]
    pictures = [{path.name: path.read_bytes() for path in (folder / "report-files").iterdir()} for folder in (out, copy)]
    assert pictures[0] == pictures[1]


DEFAULT: dict = {}
VERDICTS = [
    ("1, likelihood", DEFAULT, ["holds"]),  # 1 % below
    ("1, likelihood", {(OPTIMAL, "elbo"): 90.0}, ["does not"]),
    ("1, likelihood", {(OPTIMAL, "elbo"): 96.0, (OPTIMAL, "spread"): 8.0}, ["not shown"]),
    ("1, samples", DEFAULT, ["holds"]),  # 4 % farther
    ("1, samples", {(OPTIMAL, "frechet"): 55.0}, ["does not"]),
    ("1, samples", {(OPTIMAL, "frechet"): 53.0, (OPTIMAL, "spread"): 5.0}, ["not shown"]),
    ("2, likelihood", DEFAULT, ["holds"]),
    ("2, likelihood", {(SHARED, "elbo"): 30.0}, ["does not"]),
    ("2, samples", DEFAULT, ["holds"]),
    ("2, samples", {(SHARED, "frechet"): 95.0}, ["does not"]),
    ("3, speed", DEFAULT, ["holds"]),
    ("3, speed", {(OPTIMAL, "speed"): 0.5}, ["does not"]),
    ("3, speed", {(OPTIMAL, "elbo"): 90.0}, ["does not"]),  # faster, but lower an end
    ("3, speed", {(OPTIMAL, "speed"): 1.0, (OPTIMAL, "elbo"): 99.0}, ["does not"]),  # as many steps: no faster
    ("4, likelihood", DEFAULT, ["holds"]),
    ("4, likelihood", {(PIXEL, "elbo"): 50.0}, ["does not"]),
    ("4, levels", DEFAULT, ["holds"]),
    ("4, levels", {(PIXEL, "bits"): 4.1}, ["does not"]),
    ("4, samples", DEFAULT, ["holds"]),
    ("4, samples", {(PIXEL, "frechet"): 20.0}, ["does not"]),
    ("4, prior", DEFAULT, ["holds"]),
    ("4, prior", {(PIXEL, "kl"): 1.0}, ["does not"]),
    ("5, information", DEFAULT, ["holds"]),
    ("5, information", {(OPTIMAL, "kl"): 9.0}, ["does not"]),
    ("9, fitted prior", DEFAULT, ["holds"]),
    ("9, fitted prior", {(OPTIMAL, "fitted"): 16.0}, ["does not"]),
    ("9, fitted prior", {(OPTIMAL, "fitted"): 15.0, (OPTIMAL, "spread"): 3.0}, ["not shown"]),
    ("10, coverage", DEFAULT, ["holds", "holds"]),  # the best on validation, and σ = 1
    ("10, coverage", {(OPTIMAL, "coverage"): 0.5}, ["does not", "does not"]),
    ("10, coverage", {(OPTIMAL, "coverage"): 0.75}, ["does not", "does not"]),
    ("11, stability", DEFAULT, ["holds"]),
]


def verdicts(spec, out):
    found = settings(spec, out)
    return {claim.name: [verdict for _, verdict in claim.verdicts(found)] for claim in CLAIMS}


BATCHES = {str(n): {"training.batch_size": n, "training.max_steps": 3200 // n} for n in (16, 32, 64)}
SPECS = {
    "decoders": a_spec(5),
    "images and levels": a_spec(5, likelihoods=[OPTIMAL, SHARED, IMAGE, OPTIMAL_IMAGE, *LEVELS]),
    "ladder": a_spec(5, network="hierarchical:tiny"),
    "video": a_spec(5, network="sequence"),
    "weights": a_spec(5, likelihoods=[OPTIMAL], along={"training.kl_weight": [0.3, 1.0, 3.0]}),
    "batches": a_spec(5, likelihoods=[OPTIMAL, SHARED], along={"batch": BATCHES}),
    "batches alone": a_spec(5, likelihoods=[OPTIMAL], along={"batch": BATCHES}),
    "more images": a_spec(
        5, likelihoods=[OPTIMAL], along={"training.max_steps": [10], "batch": {"1": {"training.batch_size": 16}, "2": {}}}
    ),
}
SMALL, SMALL_SHARED = f"{OPTIMAL}, 16", f"{SHARED}, 16"
FURTHER = [
    ("images and levels", "6, likelihood", {(IMAGE, "elbo"): 110.0}, ["holds"]),
    ("images and levels", "6, likelihood", {(IMAGE, "elbo"): 90.0}, ["does not"]),
    ("images and levels", "6, training", DEFAULT, ["holds"]),  # as good
    ("images and levels", "6, training", {(OPTIMAL_IMAGE, "elbo"): 80.0}, ["does not"]),
    ("images and levels", "6, samples", {(OPTIMAL_IMAGE, "frechet"): 40.0}, ["holds"]),
    ("images and levels", "6, samples", {(OPTIMAL_IMAGE, "frechet"): 60.0}, ["does not"]),
    (
        "images and levels",
        "7, levels",
        {(LEVELS[0], "bits"): 3.9, (LEVELS[1], "bits"): 4.2},
        ["holds", "does not", "not shown"],
    ),
    ("images and levels", "7, bitwise", {(LEVELS[1], "bits"): 4.1}, ["holds"]),
    ("images and levels", "7, bitwise", {(LEVELS[1], "bits"): 4.2}, ["does not"]),
    ("images and levels", "7, bitwise samples", {(LEVELS[1], "frechet"): 40.0}, ["holds"]),
    ("images and levels", "7, bitwise samples", {(LEVELS[1], "frechet"): 60.0}, ["does not"]),
    ("ladder", "8, likelihood", DEFAULT, ["holds"]),
    ("ladder", "8, likelihood", {(OPTIMAL, "elbo"): 90.0}, ["does not"]),
    ("ladder", "8, unit variance", DEFAULT, ["holds"]),
    ("video", "8, unit variance", {(SHARED, "elbo"): 30.0}, ["does not"]),
    ("ladder", "8, samples", DEFAULT, ["holds"]),
    ("video", "8, samples", {(OPTIMAL, "frechet"): 55.0}, ["does not"]),
    ("video", "8, predictions", DEFAULT, ["holds", "holds"]),
    ("video", "8, predictions", {(OPTIMAL, "psnr"): 18.0}, ["does not", "holds"]),
    ("video", "8, predictions", {(OPTIMAL, "ssim"): 0.4}, ["holds", "does not"]),
    ("ladder", "8, predictions", DEFAULT, ["not shown"]),  # there are none
    ("ladder", "1, likelihood", DEFAULT, ["not shown"]),  # that is claim 8
    ("decoders", "8, likelihood", DEFAULT, ["not shown"]),
    ("weights", "12, bound", {("KL weight 1", "elbo"): 110.0}, ["holds"]),
    ("weights", "12, bound", {("KL weight 3", "elbo"): 110.0}, ["does not"]),
    ("weights", "12, samples", {("KL weight 1", "frechet"): 40.0}, ["holds"]),
    ("weights", "12, samples", {("KL weight 3", "frechet"): 40.0}, ["does not"]),
    ("weights", "12, fitted prior", {("KL weight 1", "fitted"): 5.0}, ["holds"]),
    ("weights", "12, fitted prior", {("KL weight 0.3", "fitted"): 5.0}, ["does not"]),
    ("decoders", "12, bound", DEFAULT, ["not shown"]),
    ("batches", "13, batch size", DEFAULT, ["holds"]),
    ("batches", "13, batch size", {(SMALL, "elbo"): 60.0}, ["does not"]),
    ("batches", "13, batch size", {(SMALL, "elbo"): 60.0, (SMALL_SHARED, "elbo"): 59.0}, ["holds"]),  # shared is so too
    ("batches alone", "13, batch size", {(SMALL, "elbo"): 60.0}, ["does not"]),
    ("batches alone", "13, batch size", {(SMALL, "elbo"): 95.5, (SMALL, "spread"): 3.0}, ["not shown"]),
    ("more images", "13, batch size", {(SMALL, "elbo"): 60.0}, ["not shown"]),  # one sees more images than the other
]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Verdicts on made-up numbers, each made once."""
    known = {}

    def of(name, changes):
        key = name, str(sorted(changes.items()))
        if key not in known:
            known[key] = verdicts(SPECS[name], build(SPECS[name], tmp_path_factory.mktemp("changed") / "out", changes))
        return known[key]

    return of


@pytest.mark.parametrize(("name", "claim", "changes", "words"), [*(("decoders", *row) for row in VERDICTS), *FURTHER])
def test_verdicts_follow_the_numbers(judged, name, claim, changes, words):
    assert [verdict.word for verdict in judged(name, changes)[claim]] == words


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.name for claim in CLAIMS])
def test_every_claim_is_judged_both_ways_here_and_says_its_rule(claim):
    rows = [*VERDICTS, *(row[1:] for row in FURTHER)]
    words = {word for name, _, found in rows for word in found if name == claim.name}
    assert "holds" in words
    assert "does not" in words or claim.name == "11, stability"  # below
    assert claim.rule.startswith("Holds if")


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        (1, {"not shown"}),
        (2, {"indicated", "indicated against", "not shown"}),
        (4, {"indicated", "indicated against", "not shown"}),
    ],
)
def test_few_seeds_indicate_at_most(tmp_path, seeds, words):
    few = a_spec(seeds=seeds)
    found = verdicts(few, build(few, tmp_path / "out"))
    del found["11, stability"]  # counts runs
    assert {verdict.word for each in found.values() for verdict in each} <= words


def test_missing_arms_show_nothing(tmp_path):
    few = a_spec(likelihoods=[PIXEL, BETAS[0], BETAS[1]])
    found = verdicts(few, build(few, tmp_path / "out"))
    assert all(verdict.word == "not shown" and verdict.lacks for each in found.values() for verdict in each)
    study.report(tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert len(page.tables["Claims that this study cannot judge"]) == 1 + len(CLAIMS)
    assert [tag for tag, _ in page.tags].count("details") == 1  # a long table, which is shown when asked for


@pytest.mark.parametrize(
    ("paces", "word", "says"),
    [
        ((0.5, 1.0, 2.0), "not shown", "1.000 [0.179, 5.595] times"),  # the geometric mean, 4.3027·ln 2/√3 about its log
        ((1.06, 1.06, 1.06), "indicated", "1.060 [1.060, 1.060] times"),
        ((1.06, 1.06, 1.06, 1.06, 1.06), "holds", "1.060 [1.060, 1.060] times"),
        ((1.04, 1.04, 1.04), "indicated against", "1.040 [1.040, 1.040] times"),
        ((1.04, 1.04, 1.04, 1.04, 1.04), "does not", "1.040 [1.040, 1.040] times"),
        ((1.0, 1.0, 1.2), "not shown", "times the steps, 3 seeds"),
        ((0.1, 0.1, 0.1), "indicated against", "0.250 [0.250, 0.250] times"),  # never there: twice its 800 steps for 400
        ((2.0,), "not shown", "2.000 times the steps, 1 seed;"),
    ],
)
def test_speed_is_the_geometric_mean_of_ratios_of_steps(tmp_path, paces, word, says):
    two = a_spec(seeds=len(paces), likelihoods=[OPTIMAL, SHARED])

    def straight(config, record):
        pace = paces[config.seed] if config.model.likelihood == OPTIMAL else 1.0
        record["curve"] = [{"step": step, "elbo_nats": pace * step} for step in range(100, 900, 100)]

    (verdict,) = verdicts(two, edit(two, build(two, tmp_path / "out"), straight))["3, speed"]
    assert verdict.word == word
    assert says in verdict.finding


def test_a_start_that_is_as_good_already_counts_as_one_step(tmp_path):
    two = a_spec(seeds=1, likelihoods=[OPTIMAL, SHARED])

    def started(config, record):
        above = 1000.0 if config.model.likelihood == OPTIMAL else 0.0
        record["curve"] = [{"step": step, "elbo_nats": above + step} for step in (-1, *range(100, 900, 100))]

    (verdict,) = verdicts(two, edit(two, build(two, tmp_path / "out"), started))["3, speed"]
    assert "takes 400.000 times the steps" in verdict.finding


def test_samples_are_judged_in_each_set_of_features(spec, tmp_path):
    def other_way_round(config, record):
        for report in record["reports"]["standard"].values():
            if "quality" in report:
                distance = report["quality"]["efficientnet"]["samples"]["means"]["frechet"]
                report["quality"]["inception"] = {"samples": {"means": {"frechet": 200 - distance}}}

    found = verdicts(spec, edit(spec, build(spec, tmp_path / "out"), other_way_round))
    for name in ("2, samples", "4, samples"):
        assert [(v.word, v.finding.partition(":")[0]) for v in found[name]] == [
            ("indicated", "efficientnet"),
            ("indicated against", "inception"),
        ]


@pytest.mark.parametrize(
    ("network", "says"), [("hierarchical:tiny", True), ("sequence", True), ("sequence:dcgan-fixed", False), ("mlp", False)]
)
def test_a_prior_that_was_learned_is_called_so(tmp_path, network, says):
    made = a_spec(likelihoods=[OPTIMAL, PIXEL, *BETAS], network=network)
    build(made, tmp_path / "out", pictures=("samples.png",))
    study.report(tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text())
    (verdict,) = verdicts(made, tmp_path / "out")["4, samples"]
    assert ("learned prior, " in verdict.finding) == says
    alts = [tag["alt"] for kind, tag in page.tags if kind == "img"]
    assert any(f"{OPTIMAL}, prior {'learned' if says else 'standard'}, " in alt for alt in alts)
    assert f"{OPTIMAL}: samples, {'learned prior' if says else 'prior mixture:3'}" in page.text


def test_what_has_not_all_seeds_is_not_chosen(spec, tmp_path):
    """The seed that is left of an arm may be the luckiest."""
    changes = {(BETAS[0], name): best for name, best in (("elbo", 500.0), ("frechet", 1.0))}
    failed = {(BETAS[0], 0): ERROR, (BETAS[0], 1): ERROR, (PIXEL, 1): ERROR}
    build(spec, tmp_path / "out", changes, failed)
    (setting,) = settings(spec, tmp_path / "out")
    distance = "quality.efficientnet.samples.means.frechet"
    for rival in (setting.tuned(), setting.best(distance, "standard", highest=False)):
        assert rival.arm == BETAS[1]
        assert rival.words.endswith(f"; left out, as seeds are missing: {BETAS[0]}")
    assert setting.best_of([*BETAS[:2], PIXEL], PIXEL, distance, "standard", highest=False).words.endswith(f": {BETAS[0]}")


def test_no_arm_is_chosen_by_the_numbers_that_it_is_compared_by(spec, tmp_path):
    """On validation where they were measured there, else for each seed on the others."""
    lucky = {0: BETAS[0], 1: BETAS[1], 2: BETAS[2]}
    distance = "quality.efficientnet.samples.means.frechet"

    def noise(config, record):
        for split, report in record["reports"]["standard"].items():
            arm = config.model.likelihood
            near = {BETAS[0]: 60.0, BETAS[1]: 61.0}.get(arm, 70.0)
            far = {"test": 30.0 if lucky[config.seed] == arm else near, "validation": 5.0 if arm == BETAS[3] else near}
            report["quality"] = {"efficientnet": {"samples": {"means": {"frechet": far[split]}}}}

    def on_test_alone(config, record):
        del record["reports"]["standard"]["validation"]["quality"]

    out = edit(spec, build(spec, tmp_path / "out"), noise)
    (setting,) = settings(spec, out)
    rival = setting.best(distance, "standard", highest=False)
    assert (rival.arm, rival.words, rival.mean) == (BETAS[3], "", 70.0)
    (setting,) = settings(spec, edit(spec, out, on_test_alone))
    rival = setting.best(distance, "standard", highest=False)
    assert rival.arm == f"{BETAS[0]} or {BETAS[1]}"
    assert rival.numbers.to_dict() == {0: 61.0, 1: 60.0, 2: 60.0}  # no seed is the lucky one of its rival
    found = setting.against(rival, distance, OPTIMAL)
    assert found.mean == pytest.approx(70 - 181 / 3)
    assert "chosen on the other seeds" in rival.words


@pytest.mark.parametrize("unit", [1.0, -1000.0])
def test_bars_in_nats_per_dimension_do_not_depend_on_the_units(unit, tmp_path):
    """An ELBO near zero, or far below, is close where it is 0.01 nats per dimension away."""
    spec = a_spec(5)
    shifted = {(arm, "elbo"): unit + (0.0 if arm != OPTIMAL else -1.5) for arm in ARMS}
    ours = verdicts(spec, build(spec, tmp_path / "near", shifted))
    assert ours["1, likelihood"][0].word == "holds"
    assert "nats/dim" in ours["1, likelihood"][0].finding
    shifted[OPTIMAL, "elbo"] = unit - 3.0
    assert verdicts(spec, build(spec, tmp_path / "far", shifted))["1, likelihood"][0].word == "does not"


def test_an_arm_without_numbers_costs_no_other_its_verdict(tmp_path):
    wide = a_spec(likelihoods=[*ARMS, "gaussian/beta:20"])
    failed = {("gaussian/beta:20", seed): ERROR for seed in range(3)}
    (verdict,) = verdicts(wide, build(wide, tmp_path / "out", failed=failed))["5, information"]
    assert verdict.word == "indicated"


def test_bounds_of_densities_and_of_levels_are_kept_apart(tmp_path):
    mixed = a_spec(likelihoods=[OPTIMAL, *LEVELS[:2]])

    def levels(config, record):
        if config.model.likelihood in LEVELS:
            for reports in record["reports"].values():
                for report in reports.values():
                    report["observes"] = "level"

    study.report(edit(mixed, build(mixed, tmp_path / "out"), levels))
    page = Page((tmp_path / "out" / "report.html").read_text())
    heads, *rows = page.tables["Results"]
    densities, of_levels = (heads.index(f"ELBO of {what}, nats, refitted σ") for what in ("densities", "levels"))
    for row in rows:
        assert bool(row[densities]) == (row[0] == OPTIMAL)
        assert bool(row[of_levels]) == (row[0] in LEVELS)
    curves = [tag["alt"] for kind, tag in page.tags if kind == "img" and "at the last step" in tag["alt"]]
    assert [[arm in alt for arm in (OPTIMAL, *LEVELS[:2])] for alt in curves] == [[True, False, False], [False, True, True]]


def test_lines_can_be_seen_on_white(spec, out):
    """Three times the contrast, as WCAG 2.2 (1.4.11) has it for what is not text, of each fixed σ."""
    (setting,) = settings(spec, out)
    for arm in setting.fixed:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _style(setting, arm)["color"][:3]]
        assert 1.05 / (np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05) >= 3


def test_divergence_is_counted(spec, tmp_path):
    error = "NonFiniteLossError: step 3"
    found = verdicts(spec, build(spec, tmp_path / "out", failed={(OPTIMAL, 0): error, (SHARED, 1): "OSError: no room"}))
    (verdict,) = found["11, stability"]
    assert verdict.word == "does not"
    assert "6 runs with a calibrated σ, 1 became non-finite, 1 failed otherwise" in verdict.finding


def test_settings_are_judged_apart(spec, tmp_path):
    axes = {"training.batch_size": [32, 64], "model.likelihood": [OPTIMAL, SHARED], "seed": [0, 1]}
    wide = study.StudySpec("two", spec.base, axes, priors=("standard",))
    build(wide, tmp_path / "out")
    assert [setting.words for setting in settings(wide, tmp_path / "out")] == ["batch_size 32", "batch_size 64"]
    assert main(["study", "report", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "batch_size 64: gaussian/optimal minus" in page.tables
    assert len(page.tables["Results"]) == 1 + 2 * 2


def test_arms_may_have_names_of_their_own(spec, tmp_path):
    named = {
        "solved": {"model.likelihood": OPTIMAL},
        "slow": {"model.likelihood": SHARED, "training.scale_learning_rate_factor": 1.0},
    }
    axes = {"sigma": {**named, "learned": {"model.likelihood": SHARED}}, "seed": [0, 1, 2]}
    labelled = study.StudySpec("named", spec.base, axes, priors=("standard",))
    found = verdicts(labelled, build(labelled, tmp_path / "out"))
    assert [verdict.word for verdict in found["3, speed"]] == ["indicated", "indicated"]
    assert [verdict.finding.split(" takes")[0] for verdict in found["3, speed"]] == ["slow", "learned"]


def test_a_study_that_has_not_ended_or_failed_says_so(spec, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    assert main(["study", "report", str(out)]) == 1
    assert "holds no study" in capsys.readouterr().err
    claim(spec, out)
    assert main(["study", "report", str(out)]) == 1
    assert "has no cell of" in capsys.readouterr().err
    assert main(["study", "table", str(out)]) == 0
    assert "0 of 21 cells are done, 0 failed, 21 have not ended." in capsys.readouterr().out
    long = f"{ERROR}{'x' * 1000}"
    build(spec, out, failed={(arm, seed): long for arm in ARMS for seed in range(3)})
    assert main(["study", "report", str(out)]) == 0
    capsys.readouterr()
    page = Page((out / "report.html").read_text())
    assert [row[2] for row in page.tables["Results"][1:]] == ["0, 3 failed"] * 7
    failed = page.tables["Cells that failed"][1:]
    assert len(failed) == 21
    assert all(row[1].startswith(ERROR) and row[1].endswith("x …") and len(row[1]) < 320 for row in failed)
    assert main(["study", "table", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "0 of 21 cells are done, 21 failed, 0 have not ended." in printed
    assert "0, 3 failed" in printed


def test_one_page_says_what_several_studies_found(spec, out, tmp_path, capsys):
    other = a_spec(likelihoods=[OPTIMAL, *BETAS], along={"training.batch_size": [16, 64]})
    build(other, tmp_path / "other", changes={(BETAS[1], "elbo"): 200.0})
    assert main(["study", "verdicts", str(out), str(tmp_path / "other")]) == 0
    page = capsys.readouterr().out
    row = next(line for line in page.splitlines() if line.startswith("| 1, likelihood"))
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == [
        "",
        "",
        out.name,
        "other (batch\\_size 16, batch\\_size 64)",
        "",
    ]
    for verdict in verdicts(spec, out)["1, likelihood"]:
        assert f"**{verdict.word}**, {out.name}: " in page
    judged, missing = page.split("## Claims that none of these studies has measured")
    assert "- 7, bitwise: " in missing
    assert "## Claim 7, bitwise" not in judged
    assert main(["study", "verdicts", str(tmp_path)]) == 1
    assert "holds no study" in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = "<title>none</title><iframe id=f style='width:{width}px;height:800px;border:0' srcdoc=\"{page}\"></iframe>"
LOOK = """<script>f.onload = () => {
const root = f.contentDocument.documentElement;
const clipped = [...root.querySelectorAll('.scroll')].filter(table => table.scrollWidth > table.clientWidth);
document.title = 'wide ' + root.scrollWidth + ' of ' + root.clientWidth + ' clipped ' + clipped.length;
};</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="a browser, chromium, is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_a_phone(out, tmp_path, width):
    """In a frame: a browser's window is never as narrow as a phone."""
    inner = (out / "report.html").read_text().replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=inner) + LOOK)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
    ]
    words = [CHROMIUM, *flags, "--dump-dom", (tmp_path / "frame.html").as_uri()]
    dumped = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    title = dumped.partition("<title>")[2].partition("</title>")[0].split()
    assert title[0] == "wide"
    assert int(title[1]) <= int(title[3]) <= width
    assert width < 1200 or title[4:] == ["clipped", "0"]  # tables are wider than a phone, and scroll there


def test_runs_that_two_studies_share_make_one_finding(spec, out, tmp_path, capsys):
    """The same grid under another name, with the same cells; and a third one with numbers of its own."""
    shutil.copytree(out, tmp_path / "again")
    other = a_spec(likelihoods=ARMS, along={"training.batch_size": [16]})
    build(other, tmp_path / "other")
    assert main(["study", "verdicts", str(out), str(tmp_path / "again"), str(tmp_path / "other")]) == 0
    page = capsys.readouterr().out
    (row,) = [line for line in page.splitlines() if line.startswith("| 1, likelihood")]
    assert out.name in row
    assert "again" not in row
    assert "other" in row
