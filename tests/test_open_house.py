"""A stranger's package: its networks, likelihood and prior work by their names everywhere, without a change of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = '''
"""A package that knows the contracts of sigma_vae, and none of its classes but the bases."""

import math

import torch
from sigma_vae.registry import Argument, number_above_zero, register
from sigma_vae.types import DataDistribution, Likelihood, Network, Prior


class Bare(Network):
    """A network that delegates to mlp, sees each example from its other end, and only trains and generates."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def latents(self):
        return self.inner.latents

    def infer(self, x, context=None, mask=None, noise=None, condition=None):
        inference = self.inner.infer(x.flip(-1), context, mask, noise, condition)
        return inference._replace(h=inference.h.flip(-1), target=x)

    def generate(self, n, context=None, generator=None, temperature=1.0, condition=None):
        return self.inner.generate(n, context, generator, temperature, condition).flip(-1)


class Whole(Bare):
    """A network that also encodes, decodes and takes another prior."""

    def posterior(self, x, condition=None):
        return self.inner.posterior(x.flip(-1), condition)

    def decode(self, z, condition=None):
        return self.inner.decode(z, condition).flip(-1)

    @property
    def prior(self):
        return self.inner.prior

    def replace_prior(self, prior):
        self.inner.replace_prior(prior)


def inner(shape, out_channels, latent_dim, width=16):
    from sigma_vae import mlp

    return mlp(shape, out_channels, latent_dim, width=width)


def bare(shape, out_channels, latent_dim=4, width=16):
    """A network of a test that keeps its latents to itself."""
    return Bare(inner(shape, out_channels, latent_dim, width))


def whole(shape, out_channels, latent_dim=4, width=16):
    """A network of a test with a posterior and a prior."""
    return Whole(inner(shape, out_channels, latent_dim, width))


@register.network("mirror", latents="flat", reads_clips=False, has_prior=True)
def mirror(shape, out_channels, latent_dim=3):
    """An mlp that reads its data mirrored."""
    return Whole(inner(shape, out_channels, latent_dim))


class Uniform(Prior):
    """Uniform over the box that holds the latents, with soft walls: fitted by their largest values."""

    needs_fit, least_latents = True, 2

    def __init__(self, latent_dim, slack=1.5):
        super().__init__()
        self.latent_dim, self.slack = latent_dim, slack
        self.register_buffer("half_width", torch.ones(latent_dim))

    def fit(self, latents, held_out=None, seed=0):
        self.half_width.copy_(self.slack * latents.abs().amax(0))

    def log_prob(self, z):
        outside = (z.abs() - self.half_width).clamp_min(0)
        return -(2 * self.half_width).log().sum() - 1e3 * outside.square().sum(-1)

    def kl(self, posterior, z):
        log_posterior = -0.5 * ((z - posterior.loc) / posterior.scale).square() - posterior.scale.log() - 0.5 * math.log(2 * math.pi)
        return log_posterior.sum(-1) - self.log_prob(z)

    def sample(self, n, generator=None, temperature=1.0):
        unit = torch.empty(n, self.latent_dim, device=self.half_width.device).uniform_(-1, 1, generator=generator)
        return temperature * unit * self.half_width


class ByDistance(DataDistribution):
    """Levels that are less probable the farther they are from the mean."""

    arg_constraints = {}

    def __init__(self, h, event_dims, levels, width):
        super().__init__(h.shape[:-event_dims], h.shape[-event_dims:], validate_args=False)
        self.grid = torch.linspace(0, 1, levels)
        self.logits = (-(self.grid - h.sigmoid()[..., None]).abs() / width).log_softmax(-1)

    @property
    def mean(self):
        return (self.logits.exp() * self.grid).sum(-1)

    def sample(self, sample_shape=torch.Size()):
        return self.grid[torch.distributions.Categorical(logits=self.logits).sample(sample_shape)]

    def log_prob(self, value):
        return self._of_value(self.logits, value).flatten(-len(self.event_shape)).sum(-1)

    def element_cdf(self, value):
        up_to = self._of_value(self.logits.exp().cumsum(-1), value)
        return up_to - self._of_value(self.logits.exp(), value), up_to

    def _of_value(self, of_levels, value):
        level = (value * (len(self.grid) - 1)).round().long()
        return of_levels.expand(*level.shape, -1).gather(-1, level[..., None]).squeeze(-1)


class Distance(Likelihood):
    """Levels by their distance from the mean, with a width of its own."""

    observes = "level"

    def __init__(self, channels, width=0.1, *, spatial_dims=2, levels=256):
        super().__init__(channels, spatial_dims, levels)
        self.width = width

    @property
    def in_channels(self):
        return self.channels

    def distribution(self, h, x=None, *, observes=None, refitted=False):
        self.check_observes(observes)
        return ByDistance(h, 1 + self.spatial_dims, self.levels, self.width)


register.likelihood.add("distance", Distance, argument=Argument("width", number_above_zero("width", "of the peak"), "0.1"))


def slack_of(prior):
    return f"{prior.slack:g}"


register.prior.add("uniform", Uniform, argument=Argument("slack", lambda text: {"slack": float(text)}, "2", of=slack_of))
'''
ENTRY_POINTS = """
[sigma_vae.networks]
bare = stranger:bare
mirror = stranger:mirror
whole = stranger:whole

[sigma_vae.likelihoods]
distance = stranger:Distance

[sigma_vae.priors]
uniform = stranger:Uniform
"""
STRICT = ("-W", "error")
METADATA = "Metadata-Version: 2.1\nName: strangers-package\nVersion: 1.0\n"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the package is installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "stranger.py").write_text(CODE)
    info = site / "strangers_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (info / "RECORD").write_text("stranger.py,,\n")
    (info / "top_level.txt").write_text("stranger\n")
    return installed(str(site))


def installed(*paths: str) -> dict[str, str]:
    """The environment of a process that finds packages in these folders, too."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *(path for path in sys.path if path)]), "OMP_NUM_THREADS": "1"}


def python(code: str, env: dict[str, str], *options: str, folder: Path | None = None) -> tuple[str, str]:
    """What the code prints on both streams in a process of its own."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


TRAINED = """
import json, warnings
from pathlib import Path
import torch
from sigma_vae import models
from sigma_vae.config import DataConfig, ModelConfig, TrainingConfig
from sigma_vae.evaluation import evaluate, score
from sigma_vae.evaluation.bounds import iwae
from sigma_vae.evaluation.information import information
from sigma_vae.training import fit
from sigma_vae.vae import keyed_noise

warnings.simplefilter("ignore")  # of the engine's own
torch.manual_seed(0)
data = models.data(DataConfig("digits"))
config = ModelConfig("mirror", LIKELIHOOD, latent_dim=4)
vae = models.vae(config, data.shape, data.scaling)
fit(vae, data, TrainingConfig(max_steps=20, batch_size=64), progress=False)
vae.eval()
train, test = data.batches("train", 500), data.batches("test", 500)
vae.fit_prior(train, models.prior("uniform:2", latent_dim=4))
x = next(iter(test)).x[:5]
z = vae.encode(x).loc
out = Path(OUT)
models.save(out, vae, config, data.shape, data.scaling)
loaded = models.load(out)
noise = keyed_noise(torch.arange(5))
report = evaluate(vae, test)
print(json.dumps({
    "z": list(z.shape), "decoded": list(vae.decode(z).shape), "sampled": list(vae.sample(7).shape),
    "device": str(vae.device), "scored": len(score(vae, test).rate), "active": report["active_units"],
    "iwae": iwae(vae, data.batches("test", 500), draws=2)["iwae_nats"]["mean"], "elbo": report["elbo_nats"]["mean"],
    "information": information(vae, test, train)["mean_kl_nats"]["mean"], "rate": report["rate_nats"]["mean"],
    "prior": loaded.config.prior, "slack": loaded.vae.network.prior.slack,
    "same": bool(torch.equal(vae.elbo(x, noise=keyed_noise(torch.arange(5))).total, loaded.vae.elbo(x, noise=noise).total)),
    "model": json.loads((out / "model.json").read_text()),
}))
"""


@pytest.fixture(scope="module", params=["gaussian/optimal", "distance:0.2"])
def trained(
    request: pytest.FixtureRequest, stranger: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """A model of the stranger's network and prior, with our likelihood or theirs, and what it gave."""
    folder = tmp_path_factory.mktemp("strangers") / "model"
    code = f"OUT, LIKELIHOOD = {str(folder)!r}, {request.param!r}\n{TRAINED}"
    return folder, json.loads(python(code, stranger, *STRICT)[0].splitlines()[-1])


def test_a_strangers_network_and_prior_do_all_that_ours_do(trained: tuple[Path, dict]) -> None:
    report = trained[1]
    assert report["z"] == [5, 4]
    assert report["decoded"] == [5, 1, 8, 8]
    assert report["sampled"] == [7, 1, 8, 8]
    assert report["device"] == "cpu"
    assert report["scored"] > 100
    assert report["iwae"] > report["elbo"]
    assert report["information"] == pytest.approx(report["rate"], rel=0.05)
    assert report["same"]


def test_a_saved_model_says_which_package_its_names_come_from(trained: tuple[Path, dict]) -> None:
    model = trained[1]["model"]
    assert model["packages"]["network"] == model["packages"]["prior"] == "strangers-package"
    assert model["packages"]["likelihood"] == (
        "sigma-vae" if "gaussian" in model["model"]["likelihood"] else "strangers-package"
    )
    assert model["model"]["network"] == "mirror"
    assert model["model"]["prior"] == "uniform:2"
    assert trained[1]["slack"] == 2.0


def test_a_model_of_a_package_that_is_missing_is_refused_with_its_name(trained: tuple[Path, dict]) -> None:
    from sigma_vae import models

    with pytest.raises(
        ValueError, match=r"network 'mirror' comes from the package strangers-package, .*install strangers-package"
    ):
        models.load(trained[0])


def test_loading_imports_no_module_that_a_file_names(trained: tuple[Path, dict], tmp_path: Path) -> None:
    """The folder of the module is on the path, but nothing is registered: it is not imported."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    description = json.loads((trained[0] / "model.json").read_text())
    description["packages"] = {"network": "evil", "prior": "evil", "likelihood": "evil"}
    description["model"]["network"] = "evil"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(description))
    (folder / "model.safetensors").write_bytes((trained[0] / "model.safetensors").read_bytes())
    code = f"""
from sigma_vae import models

try:
    models.load({str(folder)!r})
except ValueError as error:
    print(error)
"""
    assert "comes from the package evil" in python(code, installed(str(tmp_path)), *STRICT)[0]
    assert not (tmp_path / "trace").exists()


def test_help_texts_know_the_name(stranger: dict[str, str]) -> None:
    code = "from sigma_vae.registry import register; print(register.network.names(), register.network.entry('mirror').summary)"
    assert python(code, stranger, *STRICT)[0] == (
        "['autoencoder-kl', 'conv', 'hierarchical', 'mlp', 'residual', 'sequence', 'spatial', 'bare', 'mirror', 'whole']"
        " An mlp that reads its data mirrored\n"
    )


SHORT = ("--epochs", "1", "--batch-size", "64", "--device", "cpu")
README = [
    ["inspect", "digits"],
    ["train", "digits", "--network", "NETWORK", *SHORT, "--prior", "PRIOR", "--out", "first"],
    ["evaluate", "first"],
    ["evaluate", "first", "--metrics", "iwae", "oracle", "--draws", "3"],
    ["sample", "first", "--n", "10", "--out", "samples.png"],
    ["reconstruct", "first"],
    ["encode", "first", "--split", "train"],
    ["score", "first", "--out", "scores.csv"],
    ["train", "digits", "--network", "NETWORK", *SHORT, "--likelihood", "gaussian/fixed:1.0", "--out", "second"],
    ["calibrate", "second"],
    ["fit-prior", "second", "--prior", "gaussian"],
    ["evaluate", "second"],
    ["compare", "first", "second", "--paired"],
    ["resume", "second", "--epochs", "2"],
    ["replay", "first/config.yaml", "--out", "again"],
]
SCRIPT = """
import json, os, torch
from sigma_vae.cli import main
torch.set_num_threads(1)
codes = [main(words) for words in json.loads(os.environ["COMMANDS"])]
print(json.dumps(codes))
"""


def run(env: dict[str, str], folder: Path, commands: list[list[str]]) -> tuple[list[int], str]:
    """Exit codes of these commands, run in this folder by one process; and all that they printed."""
    out, err = python(SCRIPT, env | {"COMMANDS": json.dumps(commands)}, folder=folder)
    return json.loads(out.splitlines()[-1]), out + err


def named(network: str, prior: str) -> list[list[str]]:
    return [[{"NETWORK": network, "PRIOR": prior}.get(word, word) for word in words] for words in README]


def test_a_whole_network_passes_every_command(stranger: dict[str, str], tmp_path: Path) -> None:
    codes, said = run(stranger, tmp_path, named("whole", "mixture"))
    assert codes == [0] * len(README), said
    first, again = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("first", "again"))
    assert first["prior"].startswith("mixture:")
    assert again["elbo_nats"] == first["elbo_nats"]
    assert first["information"]
    model = json.loads((tmp_path / "first" / "model" / "model.json").read_text())
    assert model["packages"]["network"] == "strangers-package"


def test_a_bare_network_passes_every_command_but_those_of_its_latents(stranger: dict[str, str], tmp_path: Path) -> None:
    codes, said = run(stranger, tmp_path, named("bare", "standard"))
    refused = [words[0] for words, code in zip(README, codes, strict=True) if code]
    assert refused == ["encode", "fit-prior"], said
    assert "does not define posterior(x)" in said
    assert "single layer of flat latents" in said


def test_help_and_errors_know_the_networks_of_packages(stranger: dict[str, str], tmp_path: Path) -> None:
    told, _ = python("from sigma_vae.cli import main; main(['train', '--help-all'])", stranger | {"COLUMNS": "200"})
    assert "- whole: A network of a test with a posterior" in told
    _, said = run(stranger, tmp_path, [["train", "digits", "--network", "whle"]])
    assert "did you mean 'whole'?" in said
    _, said = run(installed(), tmp_path, [["train", "digits", "--network", "whole"]])
    assert "there is no network 'whole'" in said


def test_a_run_names_the_package_that_is_missing(stranger: dict[str, str], tmp_path: Path) -> None:
    commands = [["train", "digits", "--network", "whole", "--max-steps", "2", "--out", "run"]]
    assert run(stranger, tmp_path, commands)[0] == [0]
    codes, said = run(installed(), tmp_path, [["sample", "run"], ["evaluate", "run"]])
    assert codes == [1, 1]
    assert "comes from the package strangers-package" in said
