"""Models of your own parts: trained with ``fit``, written by it, opened again; and what to install where a package is missing."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sigma_vae import (
    VAE,
    Categorical,
    Fixed,
    FlatNetwork,
    Gaussian,
    Laplace,
    LogisticMixture,
    Optimal,
    PerPixel,
    StudentT,
    mlp,
    models,
    runs,
)
from sigma_vae.cli import main
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.evaluation.plots import interpolations, traversals
from sigma_vae.likelihoods import Scale
from sigma_vae.runs.evaluate import read_evaluation
from sigma_vae.training import fit

SHORT = TrainingConfig(max_steps=4, batch_size=16, logger=())


def own_network(channels: int = 1, *, tied: bool = False) -> FlatNetwork:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 64 * channels), nn.Unflatten(1, (channels, 8, 8)))
    if tied:
        encoder[3].bias, decoder[0].weight = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(16, 4))
        decoder[0].bias = encoder[1].bias
    return FlatNetwork(encoder, decoder, latent_dim=4)


def scores(vae: VAE, x: torch.Tensor) -> torch.Tensor:
    return vae.eval().score(x, noise=lambda shape: torch.zeros(shape)).log_likelihood


@pytest.mark.parametrize("tied", [False, True])
def test_a_network_of_your_own_comes_back_from_disk(tied, tmp_path):
    torch.manual_seed(0)
    vae = VAE(own_network(tied=tied), Laplace(1, levels=17, mean="unit"))
    x = next(iter(models.data("digits").batches("test", 20))).x
    fit(vae, "digits", SHORT, out=tmp_path / "run", progress=False)
    loaded = models.load(tmp_path / "run", network=own_network(tied=tied))
    assert loaded.config.likelihood == "laplace/optimal"
    assert loaded.shape == (1, 8, 8)
    assert torch.equal(scores(loaded.vae, x), scores(vae, x))
    with pytest.raises(ValueError, match=r"opened with one of yours: sigma_vae.models.load\(folder, network=...\)"):
        models.load(tmp_path / "run")


def test_a_model_made_by_its_name_needs_nothing(tmp_path):
    data = models.data("digits")
    vae = models.vae(ModelConfig("mlp", "gaussian/optimal", width=8, latent_dim=3), data.shape, data.scaling)
    fit(vae, data, SHORT, out=tmp_path, progress=False)
    loaded = models.load(tmp_path)
    assert (loaded.config.network, loaded.config.width) == ("mlp", 8)
    x = next(iter(data.batches("test", 20))).x
    assert torch.equal(scores(loaded.vae, x), scores(vae, x))


def test_a_likelihood_of_other_levels_than_the_data_has_to_be_given(tmp_path):
    """The name would make it with the levels of the data, and bits."""
    vae = VAE(own_network(), Gaussian(1, levels=None, mean="unit"))
    fit(vae, "digits", SHORT, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="has no name for its likelihood"):
        models.load(tmp_path, network=own_network())
    loaded = models.load(tmp_path, network=own_network(), likelihood=Gaussian(1, levels=None, mean="unit"))
    x = next(iter(models.data("digits").batches("test", 20))).x
    assert torch.equal(scores(loaded.vae, x), scores(vae, x))


def test_a_likelihood_that_replaced_the_named_one_is_saved_as_itself(tmp_path):
    data = models.data("digits")
    vae = models.vae(ModelConfig("mlp", "gaussian/optimal", width=8), data.shape, data.scaling)
    vae.likelihood = Laplace(1, levels=17, mean="unit")
    fit(vae, data, SHORT, out=tmp_path, progress=False)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["model"]["likelihood"] == "laplace/optimal"


class Odd(Scale):
    """A scale that has no name."""

    def forward(self, raw, observes, fit):
        return raw.new_zeros(())


LIKELIHOODS = {
    "gaussian/optimal": Gaussian(1),
    "gaussian/optimal-channel": Gaussian(3, Optimal(per="channel")),
    "gaussian/fixed:0.30000000000000004": Gaussian(1, Fixed(0.1 + 0.2), mean="unit"),
    "laplace/per-pixel": Laplace(2, PerPixel(), spatial_dims=1),
    "categorical": Categorical(1, levels=4),
    "student-t/optimal": StudentT(1),
    "logistic-mixture": LogisticMixture(1),
    None: Gaussian(1, Odd()),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_likelihood_is_saved_under_the_name_that_makes_it(name):
    made = LIKELIHOODS[name]
    assert models.likelihood_name(made) == name
    if name is not None:
        mean = made.mean_map or "unit"
        again = models.likelihood(name, made.channels, spatial_dims=made.spatial_dims, levels=made.levels, mean=mean)
        assert repr(again) == repr(made)


class Stateful(nn.Module):
    def forward(self, x):
        return x

    def get_extra_state(self):
        return {"count": 1}

    def set_extra_state(self, state):
        pass


REFUSED = {
    "state that is no tensor": (lambda net: net.decoder.append(Stateful()), r"extra_state is dict.*register_buffer"),
    "lazy layers": (lambda net: net.encoder.insert(1, nn.LazyLinear(64)), "lazy layers by a first pass"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_saved_is_refused_before_training(case, tmp_path):
    change, says = REFUSED[case]
    network = own_network()
    change(network)
    vae = VAE(network, Gaussian(1, levels=17, mean="unit"))
    with pytest.raises(ValueError, match=says):
        fit(vae, "digits", SHORT, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_no_run_is_finished_before_its_prior_is_fitted(digits_run):
    description = json.loads((digits_run / "model" / "model.json").read_text())
    assert description["model"]["network"] == "mlp"
    assert "unnamed" not in description


EXTRAS = {
    "from sigma_vae.training import fit; fit(VAE(mlp((1, 8, 8), 1), Gaussian(1)), torch.rand(40, 1, 8, 8))": "fit needs rich, which is",
    "import sigma_vae.runs": "pip install 'sigma-vae[full]'",
    "import sigma_vae.study": "pip install 'sigma-vae[full]'",
    "import sigma_vae.lightning": "sigma_vae.lightning needs pytorch_lightning, which is not installed: pip install 'sigma-vae[lightning]'",
    "from sigma_vae import models; models.data('digits')": "models.data needs sklearn, which is not installed: pip install",
    "from sigma_vae import models; models.load('FOLDER')": "models.load needs safetensors, which is not installed: pip install",
    "from sigma_vae.priors import MixturePrior; vae.fit_prior([x], MixturePrior(4, 2))": "VAE.fit_prior needs sklearn",
    "import sigma_vae.hub; sigma_vae.hub.fetch('a/b')": "pip install 'sigma-vae[hub]'",
}  # fmt: skip
SCRIPT = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tyro", "pydantic", "yaml", "pytorch_lightning", "lightning_fabric", "PIL", "pandas", "rich",
                                      "safetensors", "sklearn", "scipy", "zuko", "jinja2", "matplotlib", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import torch
from sigma_vae import VAE, Gaussian, explain, mlp
print(explain((3, 64, 64), beta=0.00025).effective_beta)
vae, x = VAE(mlp((1, 4, 4), 1, 4), Gaussian(1)), torch.rand(8, 1, 4, 4)
for line in LINES:
    try:
        exec(line)
    except ModuleNotFoundError as error:
        print(error)
    else:
        print("nothing was missing")
"""


def test_every_entry_names_the_extra_that_it_needs(tmp_path):
    lines = [line.replace("FOLDER", str(tmp_path)) for line in EXTRAS]
    done = subprocess.run(
        [sys.executable, "-c", f"LINES = {lines}\n{SCRIPT}"], capture_output=True, text=True, timeout=120, check=True
    )
    first, *said = done.stdout.splitlines()
    assert first == "3.072"
    assert len(said) == len(EXTRAS), said
    for words, (line, expected) in zip(said, EXTRAS.items(), strict=True):
        assert expected in words, line


# -- Tables and figures for notebooks, traversals and interpolations ---------------------------------------------------


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
