"""Tables and figures for notebooks, traversals and interpolations."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sigma_vae import VAE, Gaussian, mlp, models, runs
from sigma_vae.cli import main
from sigma_vae.evaluation.plots import interpolations, traversals
from sigma_vae.networks import FlatNetwork
from sigma_vae.runs.evaluate import read_evaluation


class Cells(HTMLParser):
    """The texts of the cells, and whether each tag was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def test_runs_models_and_evaluations_are_tables_in_a_notebook(digits_run: Path) -> None:
    run = runs.open_run(digits_run, "cpu")
    report = read_evaluation(digits_run)
    cells = Cells(report._repr_html_()).found
    place = cells.index("bits_per_dim")
    assert cells[place + 1].startswith(f"{report.bits_per_dim.mean:.4f} ±")
    assert cells[place + 2].startswith("Bits needed")
    cells = Cells(run.vae._repr_html_()).found
    assert cells[cells.index("σ") + 1] == f"{float(run.vae.likelihood.sigma()):.4g}"
    assert "digits" in Cells(run._repr_html_()).found
    assert "not known yet" in VAE(mlp((1, 4, 4), 1, 2), Gaussian(1))._repr_html_()


@pytest.mark.parametrize("draw", ["samples", "reconstructions", "latents"])
def test_figures_show_themselves_and_leave_pyplot_alone(draw: str, digits_run: Path) -> None:
    run = runs.open_run(digits_run, "cpu")
    x = next(iter(run.data.batches("test", 20))).x
    words = {
        "samples": lambda: run.vae.plot_samples(9),
        "reconstructions": lambda: run.vae.plot_reconstructions(x),
        "latents": lambda: run.vae.plot_latents(x, colours=list(range(20))),
    }
    run.vae.train()
    figure = words[draw]()
    assert run.vae.training  # as it was
    assert figure._repr_png_()[:4] == b"\x89PNG"
    (axes,) = figure.axes
    if draw == "latents":
        posterior = run.vae.eval().encode(x)
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean(0)
        first, second = kl.topk(2).indices.tolist()
        np.testing.assert_allclose(
            axes.collections[0].get_offsets(), posterior.loc[:, [first, second]].detach(), rtol=1e-5, atol=1e-6
        )
    else:
        assert axes.images[0].get_array().std() > 10


def linear() -> VAE:
    """A decoder that writes latent i, times i + 1, into pixel i."""
    decoder = torch.nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        decoder.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0])).repeat(2, 1)[:4] * torch.tensor([[1.0], [1], [1], [0]]))
    encoder = torch.nn.Linear(4, 6)
    vae = VAE(FlatNetwork(encoder, decoder, latent_dim=3), Gaussian(4, spatial_dims=0, levels=None))
    vae.calibrate([torch.randn(20, 4)])
    return vae.eval()


def test_traversals_move_the_strongest_latents_first() -> None:
    z = torch.tensor([0.5, -1.0, 2.0])
    rows, chosen = traversals(linear(), z, latents=2, steps=5, reach=2.0)
    assert chosen == [2, 1]
    centre = torch.tensor([0.5, -2.0, 6.0, 0.0])
    torch.testing.assert_close(rows[:, 2], centre.expand(2, 4))
    torch.testing.assert_close(rows[0, :, 2], 6 + 3 * torch.linspace(-2, 2, 5))
    torch.testing.assert_close(rows[0, :, 1], torch.full((5,), -2.0))


def test_interpolations_are_straight_lines_between_reconstructions() -> None:
    vae, x = linear(), torch.randn(6, 4)
    with torch.no_grad():
        ends = vae.decode(vae.encode(x).loc)
    rows = interpolations(vae, x[:3], x[3:], 5)
    torch.testing.assert_close(rows[:, 0], ends[:3])
    torch.testing.assert_close(rows[:, -1], ends[3:])
    torch.testing.assert_close(rows[:, 2], (ends[:3] + ends[3:]) / 2)


@pytest.mark.parametrize(("command", "name"), [("traverse", "traversals"), ("interpolate", "interpolations-test")])
def test_the_commands_write_pictures_and_arrays(command: str, name: str, digits_run: Path, tmp_path: Path) -> None:
    assert main([command, str(digits_run), "--n", "3", "--steps", "5", "--out", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert np.asarray(picture).std() > 10
    assert main([command, str(digits_run), "--n", "3", "--steps", "5", "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file[name.removesuffix("-test")].shape == (3, 5, 1, 8, 8)


def test_a_hierarchy_has_no_latents_to_move_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "digits", "--network", "hierarchical:2,2d2/1,2m1", "--width", "8", "--max-steps", "2", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert main(["traverse", str(tmp_path / "run")]) == 1
    assert "no single layer of flat latents" in capsys.readouterr().err
    assert models.load(tmp_path / "run").vae.plot_samples(4).axes
