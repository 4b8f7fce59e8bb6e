"""Studies: grids as data, cells that are never lost, tables that do not depend on where the work was done."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from sigma_vae import study
from sigma_vae.cli import main
from sigma_vae.cli.study import Live, live_or_lines
from sigma_vae.config import DataConfig, TrainingConfig, write
from sigma_vae.data import load
from sigma_vae.registry import Entry, register
from sigma_vae.study import grid
from sigma_vae.study import runner as of_cells
from sigma_vae.study.comparisons import Ended, Setting, chosen_on_validation, cost, mean_difference, paired_difference, summary
from sigma_vae.study.grid import SHIPPED, check
from sigma_vae.study.runner import claim, collect, do, folder_of, known

TIMES = ["training_seconds", "core_seconds"]


@pytest.fixture(scope="module")
def path_of_spec(tmp_path_factory):
    """The smallest study, on the first 300 of the digits."""
    folder = tmp_path_factory.mktemp("spec")
    np.save(folder / "few.npy", load(DataConfig("digits")).values("train")[:300].mul(16).byte())
    smallest = study.read_spec("smallest")
    write(folder / "spec.yaml", replace(smallest, base=smallest.base | {"data": {"source": str(folder / "few.npy")}}))
    return folder / "spec.yaml"


@pytest.fixture(scope="module")
def spec(path_of_spec):
    return study.read_spec(str(path_of_spec))


@pytest.fixture(scope="module")
def finished(spec, tmp_path_factory):
    """The study, done on two processes."""
    out = tmp_path_factory.mktemp("study") / "out"
    study.run(spec, out, workers=2)
    return out


def results(out):
    return pd.read_parquet(out / "results.parquet")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_study_can_be_read_in_every_size(name):
    spec = study.read_spec(name)
    for size in (None, *spec.sizes):
        cells = study.cells(study.read_spec(name, size))
        check(cells)
        assert len({cell.key for cell in cells}) == len(cells) > 0


def test_a_grid_is_every_combination(spec):
    cells = study.cells(spec)
    assert len(cells) == 4
    assert {(c.config.model.likelihood, c.config.seed) for c in cells} == {
        (name, seed) for name in ("gaussian/optimal", "gaussian/fixed:1.0") for seed in (0, 1)
    }
    axes = {
        "setup": {"small": {"model.network": "mlp", "model.width": 8}, "conv": {"model.network": "conv"}},
        "seed": [0, 1, 2],
    }
    grid = study.cells(replace(spec, axes=axes))
    assert [(c.place["setup"], c.config.model.network, c.config.model.width) for c in grid[::3]] == [
        ("small", "mlp", 8),
        ("conv", "conv", 32),
    ]


def test_a_cell_is_named_by_what_it_is_made_of(spec):
    cell = study.cells(spec)[0]
    other = study.cells(replace(spec, title="another title", axes=dict(reversed(spec.axes.items()))))
    assert cell.key in {c.key for c in other}
    changed = replace(spec, base=spec.base | {"training": spec.base["training"] | {"epochs": 3}})
    assert not {c.key for c in study.cells(changed)} & {c.key for c in study.cells(spec)}
    assert study.cells(replace(spec, priors=("standard",)))[0].key != cell.key


MISTAKES = {
    "unknown key": ({"titel": "x"}, "titel"),
    "unknown setting": ({"axes": {"model.colour": ["red"]}}, "model.colour"),
    "wrong value": ({"axes": {"seed": ["one"]}}, "seed"),
    "empty axis": ({"axes": {"seed": []}}, "the axis seed has no values"),
    "a part of a value": (
        {"axes": {"seed.x": [1]}, "base": {"data": {"source": "digits"}, "seed": 1}},
        "seed is a value (1) without parts",
    ),
    "unknown metric": ({"evaluation": {"metrics": ["beauty"]}}, "beauty"),
    "prior as an axis": ({"axes": {"model.prior": ["standard", "mixture:3"]}}, "write priors: [standard, mixture:3]"),
    "prior in the base": (
        {"base": {"data": {"source": "digits"}, "model": {"prior": "gaussian"}}},
        "priors: [standard, gaussian]",
    ),
    "prior in a label": ({"axes": {"how": {"a": {"model.prior": "flow"}}}}, "priors: [standard, flow]"),
    "unknown likelihood": ({"axes": {"model.likelihood": ["gaussian/optimol"]}}, "did you mean 'gaussian/optimal'"),
    "unknown network": ({"axes": {"model.network": ["mlpp"]}}, "there is no network 'mlpp'"),
    "unknown plan": ({"axes": {"model.network": ["hierarchical:tinny"]}}, "a plan is one of tiny"),
    "unknown prior": ({"priors": ["standrad"]}, "there is no prior 'standrad'"),
    "prior without flat latents": (
        {"axes": {"model.network": ["hierarchical:tiny"]}, "priors": ["standard", "mixture"]},
        "has no prior that can be replaced",
    ),
    "unknown features": ({"evaluation": {"metrics": ["quality"], "features": ["efficientnett"]}}, "no such file"),
    "no file of features": ({"evaluation": {"metrics": ["quality"], "features": ["inception:nowhere.pt"]}}, "no such file"),
    "calibration of an objective": (
        {"axes": {"model.likelihood": ["gaussian/optimal", "bernoulli"]}, "evaluation": {"metrics": ["calibration"]}},
        "likelihood bernoulli cannot be run: calibration cannot be measured",
    ),
    "oracle without σ": (
        {"axes": {"model.likelihood": ["categorical"]}, "evaluation": {"metrics": ["oracle"]}},
        "categorical has no σ",
    ),
    "information of video": (
        {"axes": {"model.network": ["sequence"]}, "evaluation": {"metrics": ["information"]}},
        "has latents for each frame",
    ),
    "predictions of images": ({"axes": {"model.network": ["mlp"]}, "evaluation": {"best_of": 2}}, "best_of counts predictions"),
    "one run twice": ({"axes": {"seed": [0, 0]}}, "same run twice: seed 0, and seed 0"),
    "one run by two labels": (
        {"axes": {"how": {"plain": {}, "weighted": {"training.kl_weight": 1.0}}}},
        "same run twice: how plain, and how weighted",
    ),
    "labels for seeds": ({"axes": {"seed": {"first": {"seed": 0}}}}, "as it pairs runs; got the labels first"),
    **{
        f"an axis called {name}": ({"axes": {name: {"a": {}}}}, f"the axis {name} has the name of a column")
        for name in (
            "key",
            "status",
            "error",
            "prior",
            "split",
            "training_seconds",
            "core_seconds",
            "arm",
            "rate_nats",
            "levels",
        )
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_spec_gets_a_sentence(mistake, tmp_path, capsys):
    changes, says = MISTAKES[mistake]
    content = {"title": "t", "base": {"data": {"source": "digits"}}, "axes": {"seed": [0]}} | changes
    (tmp_path / "spec.yaml").write_text(json.dumps(content))  # JSON is YAML
    assert main(["study", "run", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_network_of_a_users_package_is_judged_by_what_its_registration_says(spec, monkeypatch):
    def stack(shape, out_channels, latent_dim=None, width=None):
        """A network that somebody else registers."""

    facts = {"latents": "hierarchical", "reads_clips": False, "has_prior": False, "learns_prior": True}
    register.network.names()  # registers ours first
    monkeypatch.setitem(register.network._entries, "stack", Entry("stack", stack, "their-package", facts=facts))
    base = {"data": {"source": "digits"}, "model": {"network": "stack"}}
    theirs = replace(spec, base=base, priors=("standard",), evaluation=replace(spec.evaluation, metrics=("information",)))
    grid = study.cells(theirs)
    check(grid)
    with pytest.raises(ValueError, match="stack has no prior that can be replaced"):
        check(study.cells(replace(theirs, priors=("standard", "mixture:3"))))
    with pytest.raises(ValueError, match="stack reads no clips"):
        check(study.cells(replace(theirs, evaluation=replace(theirs.evaluation, best_of=2))))
    setting = Setting("", {}, ("standard",), {"gaussian/optimal": [Ended(grid[0], None, [])]}, pd.DataFrame())
    assert not setting.is_flat
    assert setting.learns_prior


@pytest.mark.parametrize("flag", ["--retries=-1", "--workers=0"])
def test_counts_that_mean_nothing_are_refused(flag, tmp_path, capsys):
    assert main(["study", "run", "smallest", "--out", str(tmp_path / "out"), flag]) == 1
    assert f"{flag[2:].partition('=')[0]} is how" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_studies_and_sizes_are_refused(capsys, tmp_path):
    for words, says in ((["nothing"], "known: "), (["smallest", "--size", "huge"], "has no size 'huge'")):
        assert main(["study", "run", *words, "--out", str(tmp_path / "out")]) == 1
        assert says in capsys.readouterr().err


def test_the_table_has_each_cell_prior_and_split_once(spec, finished):
    table = results(finished)
    assert len(table) == 4 * 2 * 2
    assert not table.duplicated(["key", "prior", "split"]).any()
    assert (table["status"] == "done").all()
    for cell in study.cells(spec):
        report = known(cell, finished)["reports"]["standard"]["test"]
        row = table[(table["key"] == cell.key) & (table["prior"] == "standard") & (table["split"] == "test")].iloc[0]
        assert row["bits_per_dim_post_hoc"] == report["bits_per_dim_post_hoc"]["mean"]
        assert row["information.marginal_kl_at_least_nats"] == report["information"]["marginal_kl_at_least_nats"]
        assert row["model.likelihood"] == cell.config.model.likelihood
    fitted = table[(table["prior"] == "mixture:3") & (table["split"] == "test")]["elbo_post_hoc_nats"].to_numpy()
    plain = table[(table["prior"] == "standard") & (table["split"] == "test")]["elbo_post_hoc_nats"].to_numpy()
    assert (fitted != plain).all()


def test_a_finished_study_repeats_nothing(spec, finished):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in (finished / "cells").glob("*/cell.json")}

    before, told = stamps(), []
    study.run(spec, finished, workers=1, tell=lambda *ended: told.append(ended))
    assert stamps() == before
    assert told == []


def test_a_finished_study_has_a_report(finished, capsys):
    assert main(["study", "report", str(finished)]) == 0
    page = (finished / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    for words in (
        "4 of 4 cells are done",
        "a verdict needs 5 seeds",
        "Learning curves",
        "Information in the latents",
        "Coverage",
    ):
        assert words in page
    for name in ("samples", "samples-standard-prior", "reconstructions"):
        assert (finished / "report.md").read_text().count(f"/run/{name}.png)") == 2
    assert "Fréchet" not in page.partition("Claims that")[0]  # it was not measured


def lines(path):
    """But for the date."""
    return [line for line in path.read_text().splitlines() if "Made on" not in line]


def test_what_is_kept_gives_the_same_report_and_is_small(finished, tmp_path, capsys):
    kept = tmp_path / "kept"
    study.report(finished)
    assert main(["study", "keep", str(finished), "--to", str(kept)]) == 0
    assert capsys.readouterr().out.strip() == str(kept / "report.html")
    assert lines(kept / "report.html") == lines(finished / "report.html")
    there = {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert sorted(map(str, there)) == ["report.html", "report.md", "results.parquet"]
    assert sum(map(len, there.values())) < 600_000
    pd.testing.assert_frame_equal(results(kept)[results(finished).columns], results(finished))
    markdown = (kept / "report.md").read_text()
    assert "![" not in markdown
    assert "The pictures are in `report.html`." in markdown
    assert [line for line in lines(kept / "report.md") if line.startswith("| ")] == [
        line for line in lines(finished / "report.md") if line.startswith("| ")
    ]
    assert main(["study", "report", str(kept)]) == 0
    assert main(["study", "keep", str(kept), "--to", str(tmp_path / "again")]) == 0
    for path, content in there.items():
        if path.suffix == ".parquet":
            assert (tmp_path / "again" / path).read_bytes() == (kept / path).read_bytes() == content
        assert lines(tmp_path / "again" / path) == lines(kept / path) if path.suffix in (".html", ".md") else True
    assert main(["study", "keep", str(kept), "--to", str(kept)]) == 1
    assert "another folder" in capsys.readouterr().err


def test_a_folder_is_of_one_study(spec, finished, tmp_path):
    kept = tmp_path / "kept"
    study.keep(finished, kept)
    assert [cell.key for cell in study.cells(study.spec_of(kept))] == [cell.key for cell in study.cells(spec)]
    assert study.spec_of(kept).title == spec.title
    other = replace(spec, axes=spec.axes | {"seed": [0]})
    for out in (kept, finished):
        with pytest.raises(ValueError, match="2 finished cells that this grid has not"):
            claim(other, out)
    with pytest.raises(ValueError, match="holds a kept study"):
        study.run(spec, kept)
    longer = replace(spec, about="one seed more", axes=spec.axes | {"seed": [0, 1, 2]})
    claim(longer, kept)
    assert study.spec_of(kept).about == "one seed more"
    study.report(kept)
    assert "4 of 6 cells are done, 0 failed, 2 have not ended." in (kept / "report.md").read_text()


def test_a_cell_says_nothing_of_the_machine(finished):
    for path in finished.glob("cells/*/cell.json"):
        text = path.read_text()
        assert str(finished) not in text
        assert str(Path.cwd()) not in text
        assert not [place for place in sys.path if len(place) > 1 and place + "/" in text]


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ([None, 5], ["null", "5"]),
        ([{"size": 8}, {"size": 6}], ['{"size": 8}', '{"size": 6}']),
        ([1.0, 5], [1.0, 5.0]),
        (["auto", 5], ["auto", "5"]),
    ],
)
def test_any_value_of_an_axis_can_be_tabulated(spec, tmp_path, values, column):
    """Made-up cells: an axis is a column of one kind, which Parquet takes and which keeps its places apart."""
    first = study.cells(spec)[0]
    cells = [first._replace(place={"what": value}, config=replace(first.config, seed=i)) for i, value in enumerate(values)]
    for number, cell in enumerate(cells):
        record = {"status": "done", "threads": 1, "seconds": 1.0, "training_seconds": 1.0}
        report = {"observes": "density", "elbo_post_hoc_nats": {"mean": float(number), "standard_error": 0.1}}
        folder_of(cell, tmp_path).mkdir(parents=True)
        (folder_of(cell, tmp_path) / "cell.json").write_text(json.dumps(record | {"reports": {"standard": {"test": report}}}))
    assert collect(cells, tmp_path)["what"].tolist() == results(tmp_path)["what"].tolist() == column
    assert summary(results(tmp_path), ["what"])["elbo_post_hoc_nats"].tolist() == ["0.0", "1.0"]


def test_a_setting_at_its_default_does_not_rename_a_cell(spec):
    same = replace(spec, base=spec.base | {"training": spec.base["training"] | {"kl_weight": 1.0}})
    assert [cell.key for cell in study.cells(same)] == [cell.key for cell in study.cells(spec)]


def test_a_study_is_the_same_on_ray(path_of_spec, finished, tmp_path):
    pytest.importorskip("ray", reason="the backend ray needs its package")
    words = ["study", "run", str(path_of_spec), "--backend", "ray", "--workers", "2", "--out", str(tmp_path / "out")]
    subprocess.run(
        [sys.executable, "-m", "sigma_vae", *words], check=True, capture_output=True, timeout=300
    )  # it warns as it likes
    pd.testing.assert_frame_equal(results(tmp_path / "out").drop(columns=TIMES), results(finished).drop(columns=TIMES))


def test_a_study_is_the_same_on_a_dask_cluster(spec, finished, tmp_path):
    pytest.importorskip("distributed", reason="the backend dask needs its package")
    study.run(spec, tmp_path / "out", backend="dask", workers=2)
    pd.testing.assert_frame_equal(results(tmp_path / "out").drop(columns=TIMES), results(finished).drop(columns=TIMES))


KILLED = """
from pathlib import Path
from sigma_vae import study
if __name__ == "__main__":
    study.run(study.read_spec({spec!r}), Path({out!r}), workers=1)
"""


def test_a_killed_study_goes_on_without_repeating_what_was_finished(spec, path_of_spec, finished, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILLED.format(spec=str(path_of_spec), out=str(out)))
    process = subprocess.Popen([sys.executable, str(tmp_path / "killed.py")], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("cells/*/cell.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/cell.json")}
    assert 0 < len(before) < 4
    study.run(spec, out, workers=2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    pd.testing.assert_frame_equal(results(out).drop(columns=TIMES), results(finished).drop(columns=TIMES))


def test_a_cell_that_raises_is_written_down_and_tried_again(spec, tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    axes = {"data.source": [spec.base["data"]["source"], str(broken)], "seed": [0]}
    content = {"title": "one is broken", "base": spec.base, "axes": axes}
    (tmp_path / "spec.yaml").write_text(json.dumps(content))
    words = ["study", "run", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 1
    assert "1 run failed" in capsys.readouterr().err
    assert "broken.npz" in (tmp_path / "out" / "report.html").read_text()
    good, bad = study.cells(study.read_spec(str(tmp_path / "spec.yaml")))
    record = known(bad, tmp_path / "out")
    assert (record["status"], record["failures"]) == ("failed", 2)  # and once more
    assert "broken.npz" in record["error"]
    assert 'File "sigma_vae/study/runner.py"' in record["traceback"]
    assert f'File "{Path(study.__file__).anchor}' not in record["traceback"]
    table = results(tmp_path / "out")
    assert table.set_index("key")["error"].dropna().to_dict() == {bad.key: record["error"]}
    done = (folder_of(good, tmp_path / "out") / "cell.json").stat().st_mtime_ns
    rng = np.random.default_rng(0)
    np.savez(broken, x=rng.integers(0, 256, (200, 8, 8), dtype=np.uint8))
    assert main(words) == 0
    assert known(bad, tmp_path / "out")["status"] == "done"
    assert (folder_of(good, tmp_path / "out") / "cell.json").stat().st_mtime_ns == done


def test_time_is_counted_over_attempts(tmp_path, monkeypatch):
    path, written = tmp_path / "seconds", []
    with of_cells.counted(path, before=100.0):
        time.sleep(0.02)
    first = of_cells.seconds_in(path)
    assert 100.02 <= first < 110
    monkeypatch.setattr(of_cells, "EVERY_SECONDS", 0.01)
    deadline = time.monotonic() + 60
    with suppress(KeyError), of_cells.counted(path, before=100.0):
        while len(set(written)) < 3:  # what a kill would leave grows on the way
            assert time.monotonic() < deadline
            written.append(of_cells.seconds_in(path))
            time.sleep(0.005)
        raise KeyError
    assert first <= min(written) < max(written) <= of_cells.seconds_in(path)


@pytest.mark.parametrize("known_by", ["record", "file"])
def test_a_cell_costs_what_all_its_attempts_cost(spec, tmp_path, monkeypatch, known_by):
    """The record of a version without the file, and the file of an attempt that was killed; then one that fails, and one that does not."""
    cell, slow = study.cells(spec)[0], 0.05
    folder_of(cell, tmp_path).mkdir(parents=True)
    if known_by == "record":
        old = {"key": cell.key, "status": "failed", "failures": 2, "error": "E", "seconds": 50.0, "threads": 1}
        (folder_of(cell, tmp_path) / "cell.json").write_text(json.dumps(old))
    else:
        (folder_of(cell, tmp_path) / "seconds").write_text("50.0\n")

    def fails(cell, folder):
        time.sleep(slow)
        raise OSError("no room")

    monkeypatch.setattr(of_cells, "_measured", fails)
    failed = do(cell, tmp_path, 1)["seconds"]
    assert 50 + slow <= failed < 60
    monkeypatch.setattr(of_cells, "_measured", lambda cell, folder: time.sleep(slow) or {})
    assert failed + slow <= do(cell, tmp_path, 1)["seconds"] < 60
    assert sorted(path.name for path in folder_of(cell, tmp_path).iterdir() if path.name != "lock") == ["cell.json"]


def test_a_copy_never_replaces_trained_weights(finished, tmp_path, capsys):
    other = tmp_path / "other"
    weights = other / "cells" / "some" / "run" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    assert main(["study", "keep", str(finished), "--to", str(other)]) == 1
    assert "holds the weights of 1 runs" in capsys.readouterr().err
    assert weights.read_bytes() == b"weights"
    assert not (other / "results.parquet").exists()


def test_a_kept_study_keeps_its_runs_when_a_default_changes(finished, spec, tmp_path, monkeypatch):
    study.keep(finished, tmp_path / "kept")
    keys = [cell.key for cell in study.cells(spec)]
    changed = TrainingConfig().warmup_steps + 1
    monkeypatch.setitem(grid.FIRST_DEFAULTS, "training.warmup_steps", changed)  # as if it had been the default
    again = study.read_spec(str(tmp_path / "kept" / "results.parquet"))
    assert [cell.key for cell in study.cells(again)] == keys
    assert {cell.config.training.warmup_steps for cell in study.cells(again)} == {changed}
    assert [cell.key for cell in study.cells(spec)] != keys


def test_a_table_without_a_grid_is_refused(tmp_path):
    pd.DataFrame({"key": ["a"]}).to_parquet(tmp_path / "results.parquet")
    with pytest.raises(ValueError, match="holds no grid"):
        study.spec_of(tmp_path)
    (tmp_path / "results.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot be read as the table"):
        study.spec_of(tmp_path)


def test_the_command_prints_the_table(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["study", "table", str(finished)]) == 0
    printed = "".join(capsys.readouterr().out.split())
    for word in ("gaussian/optimal", "mixture:3", "±", "4of4cellsaredone,0failed"):
        assert word in printed
    assert main(["study", "list"]) == 0
    assert "smallest" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["study"])
    assert "say what to do" in capsys.readouterr().err


def test_on_a_terminal_a_table_says_how_far_it_is(spec, tmp_path):
    shown, todo = Live(spec, tmp_path), study.cells(spec)

    def words():
        console = Console(file=io.StringIO(), width=120)
        console.print(shown.table())
        return console.file.getvalue()

    assert "0 of 4 done, 0 failed, 0 running" in words()
    shown.began -= 60
    shown.add({"status": "done", "key": todo[0].key})
    shown.add({"status": "failed", "key": todo[1].key})
    folder_of(todo[2], tmp_path).mkdir(parents=True)
    (folder_of(todo[2], tmp_path) / "running").touch()
    assert "1 of 4 done, 1 failed, 1 running; 1:00 elapsed, about 3:00 left" in words()
    assert "likelihood gaussian/fixed:1.0, seed 0" in words()
    shown.add({"status": "done", "key": todo[1].key})  # tried again
    assert "2 of 4 done, 0 failed" in words()


@pytest.mark.parametrize("terminal", [False, True])
def test_each_cell_that_ends_is_told(spec, tmp_path, terminal, capsys):
    file = io.StringIO()
    record = {
        "status": "failed",
        "key": "k",
        "place": {"model.likelihood": "x", "seed": 0},
        "seconds": 5.0,
        "error": "E: [why]",
    }
    with live_or_lines(spec, tmp_path, Console(file=file, force_terminal=terminal, width=100)) as tell:
        tell(record, 1, 4)
    assert "[1/4] likelihood x, seed 0: 5 s, failed: E: [why]" in (file.getvalue() if terminal else capsys.readouterr().out)


def made_up():
    """Two likelihoods and a tuned one, three seeds; what is best on validation is not best on test."""
    rows = []
    for name, validation, test in (("ours", 10.0, 9.0), ("β1", 11.0, 5.0), ("β2", 8.0, 12.0)):
        for seed in range(3):
            for split, value in (("validation", validation), ("test", test + seed * (1.0 if name == "ours" else 1.5))):
                rows.append(
                    {"key": f"{name}{seed}", "status": "done", "name": name, "seed": seed, "prior": "standard", "split": split}
                    | {"elbo_post_hoc_nats": value, "core_seconds": 1800.0}
                )
    return pd.DataFrame(rows)


def test_tuning_looks_at_validation_and_is_reported_on_test():
    best = chosen_on_validation(made_up(), "name", ["β1", "β2"], "elbo_post_hoc_nats", highest=True)
    assert best.place == {"name": "β1"}
    assert best.test["elbo_post_hoc_nats"] == pytest.approx(5 + 1.5)
    with pytest.raises(ValueError, match="on the validation split"):
        chosen_on_validation(made_up(), "name", ["β3"], "elbo_post_hoc_nats", highest=True)


def test_differences_are_paired_by_seed():
    difference = paired_difference(made_up(), "elbo_post_hoc_nats", {"name": "ours"}, {"name": "β1"})
    assert difference.mean == pytest.approx(np.mean([4.0, 3.5, 3.0]))
    assert (difference.low, difference.high) == pytest.approx((3.5 - 0.5 * 4.302653 / 3**0.5, 3.5 + 0.5 * 4.302653 / 3**0.5))
    assert difference.pairs == 3
    with pytest.raises(ValueError, match="no seed has both"):
        paired_difference(made_up(), "elbo_post_hoc_nats", {"name": "ours"}, {"name": "β3"})
    with pytest.raises(ValueError, match="several rows of one seed"):
        paired_difference(made_up(), "elbo_post_hoc_nats", {"prior": "standard"}, {"name": "β1"})


@pytest.mark.parametrize("pairs", [2, 3, 5, 20])
def test_the_interval_of_a_mean_difference_is_wrong_as_seldom_as_it_says(pairs):
    """Of differences drawn from N(1, 1), 2.5 in 100 intervals lie below 1, and 2.5 above: the rates of false verdicts."""
    rng, studies = np.random.default_rng(0), 4000
    found = [mean_difference(rng.normal(1, 1, pairs).tolist()) for _ in range(studies)]
    for wrong in (sum(each.low > 1 for each in found), sum(each.high < 1 for each in found)):
        assert stats.binomtest(wrong, studies, 0.025).pvalue > 1e-3


def test_the_interval_of_a_mean_difference_is_scipys():
    values = [1.0, 3.0, 2.5, 0.5]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_difference(values)[1:3] == pytest.approx((low, high))


def test_cost_counts_each_run_once():
    assert cost(made_up()) == {"runs": 9, "core_hours": pytest.approx(4.5)}
    failed = pd.DataFrame([{"key": "f", "status": "failed", "core_seconds": 3600.0}])
    assert cost(pd.concat([made_up(), failed])) == {"runs": 10, "core_hours": pytest.approx(5.5)}


def test_a_summary_has_spread_over_seeds():
    rows = summary(made_up(), ["name"]).set_index("name")
    assert rows.loc["ours", "elbo_post_hoc_nats"] == "10.0 ± 1.0"
    assert rows.loc["ours", "seeds"] == 3
    failed = pd.DataFrame([{"key": f"{name}9", "status": "failed", "name": name} for name in ("ours", "β3")])
    rows = summary(pd.concat([made_up(), failed]), ["name"]).set_index("name")
    assert rows.loc["ours", ["seeds", "failed", "elbo_post_hoc_nats"]].tolist() == [3, 1, "10.0 ± 1.0"]
    assert rows.loc["β3", ["prior", "seeds", "failed", "elbo_post_hoc_nats"]].tolist() == ["", 0, 1, ""]
    levels = made_up().assign(observes=lambda table: np.where(table["name"] == "β1", "level", "density"))
    rows = summary(levels, ["name"]).set_index("name")
    assert "elbo_post_hoc_nats" not in rows
    assert rows.loc["ours", ["elbo_post_hoc_nats.density", "elbo_post_hoc_nats.level"]].tolist() == ["10.0 ± 1.0", ""]
    assert rows.loc["β1", ["elbo_post_hoc_nats.density", "elbo_post_hoc_nats.level"]].tolist() == ["", "6.5 ± 1.5"]


def test_the_prior_of_a_study_may_be_auto(spec, tmp_path):
    """It is fitted once, by the training; a ladder, whose prior is learned, takes it too."""
    one = replace(spec, priors=["auto", "standard"], axes={"model.likelihood": ["gaussian/optimal"], "seed": [0]})
    one = replace(one, evaluation=replace(one.evaluation, metrics=()))
    ladder = replace(one, base=one.base | {"model": {"network": "hierarchical", "width": 8}}, priors=["auto"])
    (record,) = study.run(ladder, tmp_path / "ladder", workers=1)
    assert record["status"] == "done"
    (record,) = study.run(one, tmp_path / "flat", workers=1)
    fitted, plain = (record["reports"][prior]["test"] for prior in one.priors)
    assert fitted["prior"] != "standard" == plain["prior"]
    for name in ("elbo_nats", "rate_nats"):
        assert fitted["standard_prior"][name]["mean"] == pytest.approx(plain[name]["mean"], rel=1e-6)


def test_specs_lie_beside_the_code():
    assert all((Path(study.__file__).parent / "specs" / f"{name}.yaml").is_file() for name in SHIPPED)


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc")
def test_a_worker_that_dies_is_told_and_costs_only_its_cell(spec, tmp_path):
    out = tmp_path / "out"

    def kill_workers(record, ended, of):
        for task in Path("/proc/self/task").iterdir():
            for pid in (task / "children").read_text().split():
                if "popen_loky_posix" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(int(pid), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match=r"what is finished .* is kept"):
        study.run(spec, out, workers=2, tell=kill_workers)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/cell.json")}
    assert 0 < len(kept) < 4
    study.run(spec, out, workers=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(out.glob("cells/*/cell.json"))) == 4
