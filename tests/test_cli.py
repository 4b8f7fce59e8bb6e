"""The command line: each command on a real run, each mistake with its sentence and exit code."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from sigma_vae.cli import COMMANDS, PROGRAM, STUDY, main
from sigma_vae.config import RenamedWarning, RunConfig, read
from sigma_vae.likelihoods.translate import explain
from sigma_vae.registry import register

PACKAGE = Path(__file__).parent.parent / "src" / "sigma_vae"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_train_does_the_whole_job_and_prints_json(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", "digits", "--network", "mlp", "--width", "16", "--epochs", "1", "--seed", "3", "--json"]
    assert main([*words, "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "evaluation.json").read_text())
    assert {"elbo_nats", "bits_per_dim", "rate_nats", "active_units", "entropy_identity"} <= printed.keys()
    again = tmp_path / "again"
    assert main([*words, "--out", str(again)]) == 0
    assert json.loads(capsys.readouterr().out) == printed


def test_train_names_its_folder_and_never_overwrites(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "digits", "--network", "mlp", "--width", "8", "--max-steps", "2", "--likelihood", "gaussian/fixed:0.2"]
    assert main(words) == 0
    assert Path("runs/digits-mlp-gaussian-fixed0.2-0/evaluation.json").exists()
    said = capsys.readouterr().out
    assert "elbo_post_hoc_nats" in said
    assert "'train': 1455" in said
    assert "kept as levels 0..16" in said  # what was done to the data
    assert main(words) == 1
    assert "never overwritten" in capsys.readouterr().err


def test_a_config_replays_its_run(digits_run, tmp_path):
    assert main(["replay", str(digits_run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    for name in ("config.yaml", "evaluation.json", "metrics.csv", "model/model.safetensors", "samples.png"):
        assert (tmp_path / "again" / name).read_bytes() == (digits_run / name).read_bytes(), name


@pytest.mark.parametrize("likelihood", ["gaussian/optimal", "gaussian/shared", "gaussian/per-pixel"])
def test_black_images_train_to_the_floor(likelihood, tmp_path):
    np.save(tmp_path / "black.npy", np.zeros((256, 8, 8), dtype=np.uint8))
    out = tmp_path / "run"
    words = ["train", str(tmp_path / "black.npy"), "--network", "mlp", "--width", "32", "--epochs", "150"]
    words += ["--batch-size", "64", "--validate-every", "300"]
    assert main([*words, "--learning-rate", "0.01", "--likelihood", likelihood, "--json", "--out", str(out)]) == 0
    table = pd.read_csv(out / "metrics.csv")
    assert np.isfinite(table["train/loss_nats"].dropna()).all()
    report = json.loads((out / "evaluation.json").read_text())
    floor = 1 / (64 * 255)
    rate = report["rate_nats"]["mean"] / 64
    nats_per_dim, bits_per_dim = report["elbo_nats"]["mean"] / 64, report["bits_per_dim"]["mean"] - rate / np.log(2)
    if likelihood != "gaussian/optimal":  # a σ that is learned comes near its floor slowly
        assert nats_per_dim > 3
        return
    # At the floor, with nothing left to predict: the normal's density at its mean, and its mass below the first bin's edge.
    assert nats_per_dim == pytest.approx(stats.norm.logpdf(0, scale=floor), abs=0.1)
    assert bits_per_dim == pytest.approx(-np.log2(stats.norm.cdf(0.5 / 255, scale=floor)), abs=1e-4)


def test_a_users_own_arrays_train(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "colour.npy", rng.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "table.npz", train=rng.random((64, 5)), test=rng.random((16, 5)))
    for name, network in (("colour.npy", "conv"), ("table.npz", "mlp")):
        out = tmp_path / f"run-{network}"
        words = ["train", str(tmp_path / name), "--network", network, "--width", "4", "--epochs", "1", "--out", str(out)]
        assert main(words) == 0
        report = json.loads((out / "evaluation.json").read_text())
        assert ("bits_per_dim" in report) == (network == "conv")
        assert (out / "samples.png").exists() == (network == "conv")
        assert main(["sample", str(out), "--n", "5"]) == 0
    with np.load(tmp_path / "run-mlp" / "samples-0.npz") as samples:
        assert samples["samples"].shape == (5, 5)


def test_evaluate_prints_what_is_stored(digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "run")
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "evaluation.json").read_text())
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    for word in ("bits_per_dim", "marginal_kl_at_least_nats", "90 % interval covers, density"):
        assert word in printed


@pytest.mark.parametrize("show", ["mean", "draw"])
def test_samples_repeat_with_their_seed(show, digits_run, tmp_path):
    arrays = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.npz"
        assert main(["sample", str(digits_run), "--n", "9", "--show", show, "--seed", str(seed), "--out", str(path)]) == 0
        with np.load(path) as file:
            arrays.append(file["samples"])
    assert arrays[0].shape == (9, 1, 8, 8)
    np.testing.assert_array_equal(arrays[0], arrays[1])
    assert not np.array_equal(arrays[0], arrays[2])


def test_samples_are_drawn(digits_run, tmp_path):
    assert main(["sample", str(digits_run), "--n", "9", "--out", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert np.asarray(picture).std() > 10


def test_temperature_zero_gives_one_image(digits_run, tmp_path):
    assert main(["sample", str(digits_run), "--n", "3", "--temperature", "0", "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as file:
        assert np.ptp(file["samples"], axis=0).max() < 1e-6


def test_a_ladder_is_sampled_layer_by_layer(tmp_path, capsys):
    words = ["train", "digits", "--network", "hierarchical:2,2d2/1,2m1", "--width", "8", "--max-steps", "2"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "kl_per_layer_nats" in capsys.readouterr().out

    def samples(*temperature):
        assert (
            main(["sample", str(tmp_path / "run"), "--n", "3", "--temperature", *temperature, "--out", str(tmp_path / "a.npz")])
            == 0
        )
        with np.load(tmp_path / "a.npz") as file:
            return file["samples"]

    np.testing.assert_array_equal(samples("0.5"), samples("0.5", "0.5"))
    assert np.ptp(samples("0", "0"), axis=0).max() < 1e-6
    assert not np.array_equal(samples("0", "1"), samples("1", "0"))
    assert main(["sample", str(tmp_path / "run"), "--temperature", "1", "1", "1", "--out", str(tmp_path / "a.npz")]) == 1
    assert "one for each of 2 layers" in capsys.readouterr().err


def test_reconstructions_resemble_their_originals(digits_run, tmp_path):
    path = tmp_path / "a.npz"
    assert main(["reconstruct", str(digits_run), "--split", "train", "--n", "50", "--out", str(path)]) == 0
    with np.load(path) as file:
        originals, again = file["originals"], file["reconstructions"]
    own = np.square(originals - again).mean()
    others = np.square(originals - np.roll(again, 1, axis=0)).mean()
    assert own < 0.9 * others


def test_encode_writes_a_posterior_for_each_example(digits_run, tmp_path):
    assert main(["encode", str(digits_run), "--split", "validation", "--out", str(tmp_path / "codes.npz")]) == 0
    with np.load(tmp_path / "codes.npz") as file:
        assert file["mean"].shape == file["std"].shape == (162, 4)
        assert (file["std"] > 0).all()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_scores_average_to_the_evaluation(ending, digits_run, tmp_path):
    path = tmp_path / f"scores.{ending}"
    assert main(["score", str(digits_run), "--out", str(path)]) == 0
    table = pd.read_csv(path) if ending == "csv" else pd.read_parquet(path)
    report = json.loads((digits_run / "evaluation.json").read_text())
    assert len(table) == report["examples"]
    for name in ("elbo_nats", "rate_nats", "bits_per_dim"):
        assert table[name].mean() == pytest.approx(report[name]["mean"], rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(table["elbo_nats"], table["log_likelihood_nats"] - table["rate_nats"], rtol=1e-9)


MISTAKES = {
    "data": (["train", "digts"], "did you mean digits"),
    "likelihood": (["train", "digits", "--likelihood", "gausian/optimal"], "did you mean 'gaussian/optimal'"),
    "network": (["train", "digits", "--network", "cnv"], "did you mean 'conv'"),
    "device": (["train", "digits", "--device", "cuda:77"], "not on this machine"),
    "no run": (["evaluate", "nowhere"], "holds no run"),
    "resume nothing": (["resume", "nowhere"], "holds no run"),
    "ending": (["sample", "RUN", "--out", "a.jpg"], "should end in .png or .npz"),
    "folder": (["sample", "RUN", "--out", "no/such/folder/a.png"], "there is no folder"),
    "scores": (["score", "RUN", "--out", "a.txt"], "should end in .csv or .parquet"),
    "shape": (["explain", "--shape", "3x64"], "sizes with commas"),
    "batch size": (["explain", "--shape", "3,8,8", "--kl-reduction", "sum"], "pass the batch size"),
    "latents": (["explain", "--shape", "3,8,8", "--kl-reduction", "mean"], "pass the latent dimension"),
    "beta": (["explain", "--shape", "3,8,8", "--beta", "0"], "beta > 0"),
    "negative shape": (["explain", "--shape=-3,-2"], "at least 1"),
    "no batch": (["explain", "--shape", "3,8,8", "--kl-reduction", "sum", "--batch-size", "0"], "at least 1"),
    "no samples": (["sample", "RUN", "--n", "0", "--out", "a.png"], "at least 1"),
    "no examples": (["reconstruct", "RUN", "--n", "-1", "--out", "a.png"], "at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence_and_exit_code_1(mistake, digits_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, says = MISTAKES[mistake]
    assert main([str(digits_run) if word == "RUN" else word for word in words]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith(f"{PROGRAM}: ")
    assert list(tmp_path.iterdir()) == []


def test_changed_data_are_refused_but_samples_need_none(tmp_path, capsys):
    data, out = tmp_path / "x.npy", tmp_path / "run"
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.save(data, images)
    assert main(["train", str(data), "--network", "mlp", "--width", "4", "--epochs", "1", "--out", str(out)]) == 0
    np.save(data, images[:-1])
    for command in ("evaluate", "score", "encode", "reconstruct", "resume"):
        assert main([command, str(out)]) == 1
        assert "have changed" in capsys.readouterr().err
    data.unlink()
    assert main(["sample", str(out), "--n", "2"]) == 0


def test_one_test_example_has_no_standard_error(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8))
    words = ["train", str(tmp_path / "x.npy"), "--network", "mlp", "--width", "4", "--epochs", "1", "--json"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["elbo_nats"]["standard_error"] is None


def test_a_broken_run_is_refused(digits_run, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(digits_run, broken)
    (broken / "config.yaml").write_text("data: {source: digits, sauce: none}")
    assert main(["evaluate", str(broken)]) == 1
    assert "sauce" in capsys.readouterr().err
    shutil.rmtree(broken)
    shutil.copytree(digits_run, broken)
    shutil.rmtree(broken / "model")
    assert main(["sample", str(broken)]) == 1
    assert "no finished model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["study"],
        ["trian"],
        ["study", "rnu"],
        ["train"],
        ["train", "digits", "--epoch", "3"],
        ["train", "digits", "--epochs", "x"],
    ],
)
def test_a_wrong_command_line_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


FUNCTIONS = {(name,): command for name, command in COMMANDS.items() if not command.commands}
FUNCTIONS |= {("study", name): command for name, command in STUDY.items()}


@pytest.mark.parametrize("words", FUNCTIONS, ids=" ".join)
def test_every_command_explains_itself(words, capsys):
    function = FUNCTIONS[words].load()
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert f"--{name.replace('_', '-')}" in text
    assert inspect.getdoc(function).partition("\n")[0] == f"{FUNCTIONS[words].summary}."


@pytest.mark.parametrize("words", [[], ["study"]])
def test_the_list_of_commands_has_all_of_them(words, capsys):
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    for name, command in (STUDY if words else COMMANDS).items():
        assert f"  {name} " in text
        assert command.summary in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_list_of_commands_imports_nothing_heavy():
    """Only the standard library, so that it shows at once."""
    script = "import sys; from sigma_vae.cli import main; main(['--help']); print({n.partition('.')[0] for n in sys.modules})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    modules = eval(result.stdout.splitlines()[-1])
    before = subprocess.run(
        [sys.executable, "-c", script.replace("from sigma_vae.cli import main; main(['--help'])", "0")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    own = modules - eval(before.stdout.splitlines()[-1])
    assert own - {"sigma_vae"} <= sys.stdlib_module_names


def test_a_translation_of_a_loss_imports_no_torch():
    command = "from sigma_vae.cli import main; main(['explain', '--shape', '3,64,64', '--json'])"
    script = f"import sys; {command}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_a_wrong_command_gets_the_nearest_one(capsys):
    for words, near in ((["trian"], "'train'"), (["fit_prior"], "'fit-prior'"), (["study", "verdict"], "'verdicts'")):
        with pytest.raises(SystemExit):
            main(words)
        assert f"did you mean {near}?" in capsys.readouterr().err


def test_old_names_of_options_work_and_are_remarked_upon(tmp_path, capsys):
    words = ["train", "digits", "--network", "mlp", "--width", "4", "--max-steps", "1", "--allocator", "patient", "--json"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "sigma-vae train: allocator='patient' is called 'retain' now" in capsys.readouterr().err
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "allocator: retain" in config
    (tmp_path / "old.yaml").write_text(config.replace("allocator: retain", "allocator: patient"))
    with pytest.warns(RenamedWarning, match="called 'retain' now"):
        assert read(tmp_path / "old.yaml", RunConfig) == read(tmp_path / "run" / "config.yaml", RunConfig)


@pytest.mark.parametrize("reduction", ["sum", "batch-mean", "mean"])
@pytest.mark.parametrize("kl_reduction", ["sum", "batch-mean", "mean"])
@pytest.mark.parametrize("half", [False, True])
def test_explained_weights_reproduce_the_loss(reduction, kl_reduction, half):
    """The loss as people write it is a multiple of ‖x − x̂‖² + β·KL with the β that `explain` names."""
    generator = torch.Generator().manual_seed(0)
    batch, shape, latents, beta = 6, (3, 4, 5), 7, 0.3
    error = torch.rand(batch, *shape, generator=generator, dtype=torch.float64)
    kl = torch.rand(batch, latents, generator=generator, dtype=torch.float64)
    reduce = {"sum": torch.sum, "batch-mean": lambda t: t.flatten(1).sum(1).mean(), "mean": torch.mean}

    def loss(kl):
        return reduce[reduction](error) * (0.5 if half else 1) + beta * reduce[kl_reduction](kl)

    result = explain(shape, beta, reduction, kl_reduction, half=half, batch_size=batch, latent_dim=latents)

    def explained(kl):
        return (error.flatten(1).sum(1) + result.effective_beta * kl.sum(1)).mean()

    # Both are affine in the KL: a multiple of each other if the ratio does not change with it.
    assert float(loss(kl) / explained(kl)) == pytest.approx(float(loss(3 * kl) / explained(3 * kl)), rel=1e-12)
    assert result.implied_sigma == pytest.approx((result.effective_beta / 2) ** 0.5)


def test_explain_prints_numbers_and_words(capsys):
    assert main(["explain", "--shape", "3,64,64", "--reduction", "mean", "--beta", "0.00025"]) == 0
    text = capsys.readouterr().out
    assert "3.072" in text
    assert "1.239" in text
    assert main(["explain", "--shape", "3,64,64", "--beta", "0.00025", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["effective_beta"] == pytest.approx(3.072)


def test_without_its_packages_the_command_says_what_to_install():
    """With torch and numpy alone the library imports, quickly, and a command names the extra."""
    script = """
import importlib.abc, sys, time
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        others = {"tyro", "pydantic", "yaml", "pytorch_lightning", "lightning_fabric", "PIL", "pandas", "safetensors", "rich"}
        others |= {"sklearn", "scipy", "zuko"}
        if name.split(".")[0] in others:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import torch, numpy
begin = time.perf_counter()
from sigma_vae import Gaussian, VAE, mlp
print(time.perf_counter() - begin)
Gaussian(channels=1)(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
from sigma_vae.__main__ import run
sys.argv = ["sigma-vae", "inspect", "digits"]
sys.exit(run())
"""
    seconds = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert result.returncode == 1
        assert "pip install 'sigma-vae[full]'" in result.stderr
        seconds.append(float(result.stdout))
    assert min(seconds) < 0.3


@pytest.mark.parametrize("words", [["explain", "--shape", "3,64,64"], ["calibrate", "--help"]])
def test_a_terminal_without_greek_letters_shows_the_rest(words):
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-m", "sigma_vae", *words], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout


UNIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
UNIX_NAMES = {"fork", "forkpty", "getuid", "geteuid", "kill", "killpg", "mkfifo", "pread", "pwrite", "posix_fallocate"} | {
    "sched_getaffinity", "sendfile", "statvfs", "sysconf", "uname", "alarm", "setitimer", "SIGKILL", "SIGHUP", "SIGUSR1",
    "chown", "chroot", "fchmod", "register_at_fork", "wait4", "O_DIRECTORY", "O_NOFOLLOW", "O_SYNC",
}  # fmt: skip


ASKED_FOR = {"data/arrays.py": {"sysconf"}}
"""Names that are called only where the system says that it has them."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_called_that_only_unix_has(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names):
                assert not UNIX_MODULES & {each.name for each in names}
            case ast.ImportFrom(module=module, names=names):
                assert module not in UNIX_MODULES
                assert module not in ("os", "signal") or not UNIX_NAMES & {each.name for each in names}
            case ast.Attribute(value=ast.Name(id="os" | "signal"), attr=name):
                assert name not in UNIX_NAMES or name in ASKED_FOR.get(path.relative_to(PACKAGE).as_posix(), ())


# -- Help in parts, a configuration to begin with, and completion in a real shell --------------------------------------


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 0
    return capsys.readouterr().out


def options(text: str) -> set[str]:
    return set(re.findall(r"^  (--[\w-]+)", text, re.MULTILINE))


def test_help_shows_a_dozen_options_and_help_all_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = helped(capsys, "train", "--help"), helped(capsys, "train", "--help-all")
    assert 10 <= len(options(short)) <= 14
    assert options(short) < options(whole)
    assert len(whole.splitlines()) > 3 * len(short.splitlines())
    assert f"--help-all` shows all {len(options(whole)) + 1} options" in short  # and DATA
    for heading in ("Data:", "Pictures:", "Model:", "How long:", "Optimisation:", "Speed and memory:", "Run and files:"):
        assert f"\n{heading}\n" in whole
    assert max(map(len, short.splitlines())) <= 80
    assert f"One of {', '.join(register.network.names())}." in " ".join(short.split())
    assert "- mlp: " in whole


def test_each_option_of_train_is_in_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    """Against the fields of the configuration."""
    text = helped(capsys, "train", "--help-all")
    listed = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    names: set[str] = set()

    def collect(kind: type) -> None:
        for each in kind.__dataclass_fields__.values():
            inner = each.default_factory() if callable(each.default_factory) else None
            if hasattr(inner, "__dataclass_fields__"):
                collect(type(inner))
            elif each.name not in ("data", "source"):
                names.add("--" + each.name.replace("_", "-"))

    collect(RunConfig)
    collect(RunConfig.__dataclass_fields__["data"].type)
    assert set(listed) == names | {"--out", "--quiet", "--json"}


def test_a_wrong_option_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "digits", "--epoch", "3"])
    assert "--epochs" in capsys.readouterr().err


def test_new_writes_a_configuration_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(np.random.default_rng(0).normal(size=(200, 3)), columns=list("abc")).to_csv("my table.csv", index=False)
    assert main(["new", "my table.csv", "--minutes", "1"]) == 0
    said = capsys.readouterr().out
    config = read(tmp_path / "config.yaml", RunConfig)
    assert (config.model.network, config.model.likelihood) == ("mlp", "gaussian/optimal-channel")
    assert (config.training.max_minutes, config.data.source) == (1.0, str(tmp_path / "my table.csv"))
    assert (tmp_path / "config.yaml").read_text().count("#") > 10
    words = said.partition("train it: sigma-vae ")[2].split()
    text = (tmp_path / "config.yaml").read_text().replace("epochs: null", "epochs: 1")
    (tmp_path / "config.yaml").write_text(text)
    assert main([*words, "--quiet"]) == 0
    assert (tmp_path / "runs" / "config" / "report.html").is_file()
    assert main(["new", "my table.csv"]) == 1
    assert "never overwritten" in capsys.readouterr().err


def test_new_asks_where_a_person_sits(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new"]) == 1
    assert "sigma-vae new digits" in capsys.readouterr().err
    answers = iter(["digits", "", "2.5"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert main(["new", "--out", "mine.yaml"]) == 0
    assert read(tmp_path / "mine.yaml", RunConfig).training.max_minutes == 2.5


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out, encoding="utf-8")

    def completed(*words: str) -> list[str]:
        line = f"source {tmp_path / 'script'}; COMP_WORDS=({' '.join(words)!s}); COMP_CWORD={len(words) - 1}; _sigma_vae"
        done = subprocess.run(["bash", "-c", f'{line}; echo "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("sigma-vae", "tra") == ["train", "traverse"]
    assert set(completed("sigma-vae", "''")) == set(COMMANDS)
    assert {"--learning-rate", "--likelihood"} <= set(completed("sigma-vae", "train", "x", "--l"))
    assert completed("sigma-vae", "train", "--precision", "b") == ["bfloat16"]
    assert "report" in completed("sigma-vae", "study", "r")
    assert completed("sigma-vae", "train", "dig") == []  # files are completed by the shell itself
