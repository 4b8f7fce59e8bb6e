"""Help in parts, a configuration to begin with, and completion in a real shell."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sigma_vae.cli import COMMANDS, main
from sigma_vae.config import RunConfig, read
from sigma_vae.registry import register


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
