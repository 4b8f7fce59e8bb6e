"""The examples run from their first line to their last, at toy size, and do what they say."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES.parent))

from examples import (  # noqa: E402
    anomaly,
    own_likelihood,
    own_network,
    pictures,
    replace_a_loss,
    several_processes,
    share,
    video,
)
from sigma_vae.registry import register  # noqa: E402

pytestmark = pytest.mark.usefixtures("here")
RUN_BELOW = {
    *"anomaly own_likelihood own_network pictures replace_a_loss several_processes share video lightning_trainer".split()
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_all_examples_are_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__", "demo"} == RUN_BELOW


@pytest.mark.parametrize("name", sorted(RUN_BELOW))
def test_an_example_says_what_it_is_and_how_to_run_it(name):
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    assert re.search(rf"(python|torchrun .*) -m examples\.{name}", text)


def test_replaced_loss(capsys):
    samples = replace_a_loss.main(epochs=3)
    assert samples.shape == (16, 1, 8, 8)
    assert "σ of held-out data: 0." in capsys.readouterr().out


def test_own_likelihood():
    few, more = own_likelihood.main(steps=5), own_likelihood.main(steps=150)
    assert few < more
    a, b = torch.rand(4, 3, dtype=torch.float64) + 0.5, torch.rand(4, 3, dtype=torch.float64) + 0.5
    ours, theirs = own_likelihood.Shares(a, b), torch.distributions.Kumaraswamy(a, b)
    x = torch.rand(4, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x).sum(-1))
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.element_cdf(x)[1], theirs.cdf(x))


def test_own_network(tmp_path):
    before = dict(register.network._entries)
    assert own_network.main(tmp_path / "run", steps=3).shape == (16, 1, 8, 8)
    assert "small-conv" in before


def test_pictures(tmp_path):
    (tmp_path / "folder").mkdir()
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{i}.jpg")
    assert pictures.main(tmp_path / "folder", tmp_path / "run", size=8, steps=2).is_file()


def test_anomaly():
    found = anomaly.main(steps=200)
    assert found.wrong[:20].sum() >= 15


def test_video():
    assert video.main(steps=2, width=8).shape == (3, 4, 6, 1, 16, 16)


def test_several_processes_on_one(tmp_path):
    assert several_processes.main(tmp_path / "run", steps=3) == 3
    assert (tmp_path / "run" / "model" / "model.json").is_file()


def test_share(tmp_path, capsys):
    again = share.main(None, tmp_path / "shared", steps=3)
    assert "the samples are the same" in capsys.readouterr().out
    assert torch.isfinite(again.sample(2)).all()


@pytest.mark.filterwarnings("ignore")
def test_lightning():
    lightning = pytest.importorskip("examples.lightning_trainer", reason="needs pytorch-lightning")
    assert lightning.main(epochs=1) > -1000
