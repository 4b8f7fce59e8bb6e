"""Names into objects and back, saved models, configurations."""

import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launched import ended, executed, started

import sigma_vae
from sigma_vae import VAE, FlatNetwork, Gaussian, HierarchyPlan, mlp, models, networks
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, parse, read, write
from sigma_vae.data import Scaling
from sigma_vae.likelihoods import Fixed, Optimal, PerImage, PerPixel, RunningMinimum, Scale, Shared, StudentT
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.residuals import student_t
from sigma_vae.priors import MixturePrior
from sigma_vae.registry import register
from sigma_vae.types import DataDistribution, Flat, Frames, Hierarchy, Likelihood

SCALES = {
    "optimal": Optimal,
    "optimal-image": Optimal,
    "optimal-channel": Optimal,
    "optimal-pixel": Optimal,
    "shared": Shared,
    "per-image": PerImage,
    "per-pixel": PerPixel,
    "running-minimum": RunningMinimum,
    "fixed:0.3": Fixed,
    "beta:0.18": Fixed,
}


@pytest.mark.parametrize(("name", "kind"), SCALES.items())
def test_a_scale_name_builds_its_scale(name, kind):
    likelihood = models.likelihood(f"gaussian/{name}", channels=3)
    assert isinstance(likelihood, LocationScale)
    assert isinstance(likelihood.scale, kind)
    if isinstance(likelihood.scale, Optimal):
        assert likelihood.scale.per == (name.partition("-")[2] or "batch")
    if isinstance(likelihood.scale, Fixed):
        assert likelihood.scale.sigma == pytest.approx(0.3)  # σ² = β/2


@pytest.mark.parametrize(
    ("name", "df", "in_channels"),
    [
        ("student-t", 4.0, 3),
        ("student-t:2.5", 2.5, 3),
        ("student-t:learned", "learned", 3),
        ("student-t:predicted", "predicted", 6),
    ],
)
def test_a_student_t_name_says_its_degrees_of_freedom(name, df, in_channels):
    likelihood = models.likelihood(f"{name}/optimal", channels=3)
    assert isinstance(likelihood, StudentT)
    assert likelihood.df == df
    assert likelihood.in_channels == in_channels


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gausian/optimal", "did you mean 'gaussian/optimal'"),
        ("gaussian/optimall", "did you mean 'gaussian/optimal'"),
        ("gaussian", "did you mean 'gaussian/optimal'"),
        ("gaussian/fixed", "takes a number above 0"),
        ("gaussian/fixed:", "takes a number above 0"),
        ("gaussian/fixed:-1", "takes a number above 0"),
        ("gaussian/fixed:nan", "takes a number above 0"),
        ("gaussian/beta:zero", "β of"),
        ("gaussian/optimal:1", "optimal takes nothing after a colon"),
        ("gaussian:3/optimal", "gaussian takes nothing after a colon"),
        ("student-t:learnt/optimal", "degrees of freedom, learned or predicted"),
        ("student-t:/optimal", "as in student-t:3"),
        ("student-t:0.5/optimal", "df is a number from 1"),
        ("student/optimal", "did you mean 'student-t/optimal'"),
    ],
)
def test_an_impossible_likelihood_is_refused_with_a_remedy(name, says):
    with pytest.raises(ValueError, match=says):
        models.likelihood(name, channels=1)


def test_the_tables_of_the_docs_are_the_registrys():
    text = (Path(__file__).parents[1] / "docs" / "decoders.md").read_text(encoding="utf-8")
    for registry in (register.likelihood, register.scale):
        ours = [
            row for row, entry in zip(registry.table().splitlines()[2:], registry, strict=True) if entry.package == "sigma-vae"
        ]
        assert "\n".join(ours) in text


@pytest.fixture
def own_names():
    """Names that a test registers are gone after it."""
    kept = [(registry, dict(registry._entries)) for registry in (register.likelihood, register.scale) if registry.names()]
    yield
    for registry, entries in kept:
        registry._entries = entries


@pytest.mark.usefixtures("own_names")
def test_a_family_of_ones_own_is_one_class_and_its_name(tmp_path):
    @register.likelihood("poisson-counts")
    class PoissonCounts(Likelihood):
        """Counts k as values k/(levels − 1), with a predicted rate."""

        in_channels = property(lambda self: self.channels)

        def distribution(self, h, x=None, *, observes=None, refitted=False):
            self.check_observes(observes)
            return Counts(h.exp(), self.spatial_dims + 1, self.levels)

    class Counts(DataDistribution):
        arg_constraints = {}  # noqa: RUF012

        def __init__(self, rate, event_dims, levels):
            self.counts, self.top, self.axes = torch.distributions.Poisson(rate), levels - 1, tuple(range(-event_dims, 0))
            split = rate.dim() - event_dims
            super().__init__(rate.shape[:split], rate.shape[split:], validate_args=False)

        def log_prob(self, value):
            return self.counts.log_prob((value * self.top).round()).sum(self.axes)

        def element_cdf(self, value):
            k = (value * self.top).round()
            below, upto = (torch.special.gammaincc((k + step).clamp_min(1e-9), self.counts.rate) for step in (0, 1))
            return below * (k > 0), upto

        @property
        def mean(self):
            return self.counts.mean / self.top

        def sample(self, sample_shape=torch.Size(), generator=None):  # noqa: B008
            return self.counts.sample(sample_shape) / self.top

    config = ModelConfig("mlp", "poisson-counts", width=8)
    vae = models.vae(config, (1, 4, 4), Scaling(64))
    x = torch.randint(0, 64, (20, 1, 4, 4)) / 63
    (-vae.elbo(x).total.mean()).backward()
    h = torch.full((20, 1, 4, 4), 3.0)
    assert torch.equal(vae.likelihood.log_mass(h, x), vae.likelihood(h).log_prob(x))
    assert (vae.likelihood.element_cdf(h, x, "level")[1] <= 1).all()
    with pytest.raises(ValueError, match="levels k/63"):
        vae.likelihood.log_mass(h, x + 0.3 / 63)
    vae.calibrate([x])
    models.save(tmp_path, vae, config, (1, 4, 4), Scaling(64))
    assert type(models.load(tmp_path).vae.likelihood) is PoissonCounts
    with pytest.raises(ValueError, match="takes no scale"):
        models.likelihood("poisson-counts/optimal", 1)


@pytest.mark.usefixtures("own_names")
def test_a_residual_and_a_scale_of_ones_own_meet_all_others():
    @register.likelihood("cauchy")
    class Cauchy(LocationScale):
        """Residuals without a mean."""

        def residual(self, own):
            return student_t(1.0)

    @register.scale("twice")
    class Twice(Scale):
        """Twice the best σ."""

        solved = True

        def forward(self, raw, observes, fit):
            return self.stored(observes) if fit is None else fit("batch") + math.log(2)

    h, x = torch.zeros(4, 1, 3, 3), torch.rand(4, 1, 3, 3)
    best = models.likelihood("student-t:1/optimal", 1, mean="identity")(h, x).scale
    torch.testing.assert_close(models.likelihood("cauchy/twice", 1, mean="identity")(h, x).scale, 2 * best)
    torch.testing.assert_close(models.likelihood("cauchy/optimal", 1, mean="identity")(h, x).scale, best)
    with pytest.raises(ValueError, match="did you mean 'cauchy/twice'"):
        models.likelihood("cauchi/twice", 1)


@pytest.mark.usefixtures("own_names")
def test_a_function_is_a_family_too_with_a_scale_if_it_takes_one():
    @register.likelihood("wide")
    def wide(channels, scale, **options):
        """A Gaussian."""
        return sigma_vae.Gaussian(channels, scale, **options)

    @register.likelihood("coin")
    def coin(channels, *, spatial_dims, levels):
        """A coin for each value."""
        return sigma_vae.Bernoulli(channels, spatial_dims=spatial_dims, levels=levels)

    made = models.likelihood("wide/fixed:0.5", 3)
    assert str(made) == "Gaussian(channels=3, scale=Fixed(0.5))"
    assert str(models.likelihood("coin", 1, levels=2)) == "Bernoulli(channels=1, levels=2)"
    for name, words in (
        ("wide", "did you mean 'wide/optimal'"),
        ("coin/optimal", "takes no scale"),
        ("coim", "did you mean 'coin'.* without a scale .*coin"),
    ):
        with pytest.raises(ValueError, match=words):
            models.likelihood(name, 1)


def test_an_unknown_network_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'conv'"):
        models.network("convv", (1, 28, 28), 1, 20)


@pytest.mark.parametrize("sizes", [{"latent_dim": 0}, {"width": -3}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        models.vae(replace(ModelConfig(network="mlp"), **sizes), (1, 8, 8), Scaling(256))


def test_a_map_to_the_mean_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="takes no mean='identity'; leave it at auto"):
        models.vae(ModelConfig("mlp", "categorical", mean="identity"), (1, 8, 8), Scaling(4))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("network", ["mlp", "conv", "residual"])
def test_a_saved_model_is_the_same_model(scale, network, tmp_path):
    config = ModelConfig(network=network, likelihood=f"gaussian/{scale}", latent_dim=3, width=8, prior="standard")
    vae = models.vae(config, (3, 9, 10), Scaling(256))
    x = torch.randint(0, 256, (4, 3, 9, 10)) / 255
    vae.calibrate([x])
    models.save(tmp_path / "model", vae, config, (3, 9, 10), Scaling(256))
    saved = models.load(tmp_path / "model")
    assert (saved.config, saved.shape, saved.scaling) == (config, (3, 9, 10), Scaling(256))
    ours, theirs = vae.state_dict(), saved.vae.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    noise = lambda shape: torch.zeros(shape)  # noqa: E731
    assert torch.equal(vae.eval().elbo(x, noise=noise).total, saved.vae.elbo(x, noise=noise).total)


def saved_model(folder: Path) -> Path:
    config = ModelConfig(network="mlp", latent_dim=2, width=4)
    vae = models.vae(config, (1, 4, 4), Scaling(256))
    models.save(folder, vae, config, (1, 4, 4), Scaling(256))
    return folder


def edit(folder: Path, **changes: object) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BREAKAGES = {
    "no folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "missing or no JSON"),
    "no JSON": (lambda folder: (folder / "model.json").write_text("{"), "missing or no JSON"),
    "binary": (lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe\x00"), "missing or no JSON"),
    "a list": (lambda folder: (folder / "model.json").write_text("[]"), "model format None"),
    "newer": (lambda folder: edit(folder, format=99), "model format 99"),
    "shape": (lambda folder: edit(folder, shape=[0]), "lacks the model"),
    "unknown key": (lambda folder: edit(folder, model={"netwrk": "mlp"}), "netwrk"),
    "other sizes": (lambda folder: edit(folder, shape=[1, 5, 5]), "does not hold the weights"),
    "truncated": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0"), "does not hold the weights"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "does not hold the weights"),
    "a pickle": (lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb())), "does not hold the weights"),
}


class Bomb:
    """Unpickled, it would end the process."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_model_is_refused_and_runs_no_code(breakage, tmp_path):
    breaks, says = BREAKAGES[breakage]
    folder = saved_model(tmp_path / "model")
    breaks(folder)
    with pytest.raises(ValueError, match=says):
        models.load(folder)


@pytest.mark.parametrize("name", ["vae", "load", "save", "likelihood", "network", "data", "prior", "Saved", "sized"])
def test_the_old_module_works_with_a_warning(name):
    from sigma_vae import build

    with pytest.warns(DeprecationWarning, match=f"sigma_vae.build.{name} is now sigma_vae.models.{name}"):
        assert getattr(build, name) is getattr(models, name)
    assert not hasattr(build, "nothing")


@pytest.mark.parametrize("package", [sigma_vae, networks])
def test_the_old_name_of_a_plan_warns(package):
    with pytest.warns(DeprecationWarning, match="HierarchyPlan"):
        assert package.LadderPlan is HierarchyPlan


@pytest.mark.parametrize(("name", "size"), [("mlp", "context_frames"), ("residual", "context_frames")])
def test_a_size_that_a_network_does_not_have_is_refused(name, size):
    with pytest.raises(ValueError, match=f"the network {name} has no {size}, got {size}=3; leave it out"):
        models.network(name, (1, 8, 8), 1, **{size: 3})


def test_a_network_of_ones_own_is_made_by_its_name():
    @register.network("mine-of-the-test", latents="flat", reads_clips=False, has_prior=True)
    def mine(shape, out_channels, latent_dim=2):
        """A network of one's own."""
        return mlp(shape, out_channels, latent_dim, width=4)

    vae = models.vae(ModelConfig("mine-of-the-test", latent_dim=5), (1, 4, 4), Scaling(256))
    assert vae.network.latents.sizes == (5,)
    with pytest.raises(ValueError, match="has no width, got width=3"):
        models.vae(ModelConfig("mine-of-the-test", width=3), (1, 4, 4), Scaling(256))


FACTS = {name: models.network(name, (1, 8, 8), 1) for name in ("residual", "conv", "mlp", "hierarchical", "sequence")}


@pytest.mark.parametrize("name", FACTS)
def test_a_registration_says_what_its_network_does(name):
    made, facts = FACTS[name], register.network.entry(name).facts
    assert facts["reads_clips"] == made.reads_clips
    assert facts["has_prior"] == (made.has_posterior and made.has_prior)
    assert facts["latents"] == {Flat: "flat", Hierarchy: "hierarchical", Frames: "frames"}[type(made.latents)]


@pytest.mark.parametrize("network", ["hierarchical:tiny", "sequence", "sequence:vgg-fixed"])
def test_a_prior_is_refused_by_names_alone(network):
    models.check_prior("standard", network)
    models.check_prior("mixture", "mlp")
    with pytest.raises(ValueError, match="single layer of flat latents"):
        models.check_prior("mixture", network)


# -- parts without a name --------------------------------------------------------------------------------------------------


def own_network(width=4):
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, width), torch.nn.Linear(width, 6))
    return FlatNetwork(encoder, torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Unflatten(1, (1, 4, 4))), 3)


def test_a_model_of_ones_own_parts_comes_back_into_them(tmp_path):
    vae = VAE(own_network(), Gaussian(1, Optimal()))
    x = torch.rand(50, 1, 4, 4)
    vae.calibrate([x])
    vae.fit_prior([x], MixturePrior(3, 2))
    models.save(tmp_path, vae, None, (1, 4, 4), Scaling(256))
    assert json.loads((tmp_path / "model.json").read_text())["unnamed"] == {"network": "FlatNetwork", "likelihood": "Gaussian"}
    loaded = models.load(tmp_path, network=own_network(), likelihood=Gaussian(1, Optimal())).vae
    assert torch.equal(loaded.network.prior.means, vae.network.prior.means)
    noise = lambda shape: torch.zeros(shape)  # noqa: E731
    assert torch.equal(loaded.elbo(x, noise=noise).total, vae.eval().elbo(x, noise=noise).total)


def test_only_the_part_without_a_name_has_to_be_given(tmp_path):
    config = ModelConfig(models.UNNAMED, "gaussian/optimal", prior="standard")
    vae = VAE(own_network(), models.likelihood("gaussian/optimal", 1))
    models.save(tmp_path, vae, config, (1, 4, 4), Scaling(256))
    assert models.load(tmp_path, network=own_network()).config == config
    with pytest.raises(ValueError, match=r"no name for its network \(a FlatNetwork\), .*load\(folder, network=\.\.\.\)"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match="does not hold the weights"):
        models.load(tmp_path, network=own_network(width=5))


def test_a_name_that_is_not_registered_is_refused_when_saving(tmp_path):
    vae = VAE(own_network(), models.likelihood("gaussian/optimal", 1))
    with pytest.raises(ValueError, match="there is no network 'my-own'"):
        models.save(tmp_path / "model", vae, ModelConfig("my-own"), (1, 4, 4), Scaling(256))
    assert not (tmp_path / "model").exists()


def test_a_model_of_an_earlier_version_opens(tmp_path):
    folder = saved_model(tmp_path)
    description = json.loads((folder / "model.json").read_text())
    assert description.pop("packages")["network"] == "sigma-vae"
    (folder / "model.json").write_text(json.dumps(description))
    assert models.load(folder).config.network == "mlp"


def test_a_config_survives_its_file(tmp_path):
    config = RunConfig(
        DataConfig("x.npy", layout="n-c", levels=17),
        ModelConfig(likelihood="gaussian/fixed:0.1", width=3),
        TrainingConfig(epochs=2, ema_decay=0.9),
        seed=5,
        device="cpu",
    )
    write(tmp_path / "config.yaml", config)
    assert read(tmp_path / "config.yaml", RunConfig) == config


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"data": {"source": "digits"}, "sede": 1}, "sede"),
        ({"data": {"source": "digits", "levls": 3}}, "levls"),
        ({"data": {"source": "digits"}, "training": {"epochs": "many"}}, "epochs"),
        ({"data": {"source": "digits"}, "model": {"mean": "tanh"}}, "mean"),
        ({}, "data"),
        (None, "RunConfig"),
    ],
)
def test_an_impossible_config_is_refused_by_name(content, says):
    with pytest.raises(ValueError, match=says):
        parse(content, RunConfig, "config.yaml")


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", 0), ("max_steps", -1), ("batch_size", 0), ("learning_rate", -1.0), ("learning_rate", float("nan")), ("ema_decay", 1.0),
     ("gradient_clip_norm", 0.0), ("max_minutes", 0.0), ("warmup_steps", -5), ("log_every", 0)],
)  # fmt: skip
def test_an_impossible_training_option_is_refused(option, value):
    with pytest.raises(ValueError, match=option):
        TrainingConfig(**{option: value})


@pytest.mark.parametrize("text", ["a: [", "\t", "!!python/object/apply:os.system ['exit 3']"])
def test_a_file_that_is_no_plain_yaml_is_refused(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read(tmp_path / "config.yaml", RunConfig)


# -- A stranger's package: its networks, likelihood and prior work by their names everywhere, without a change of ours -

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
METADATA = "Metadata-Version: 2.1\nName: strangers-package\nVersion: 1.0\n"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder in which the package is installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "stranger.py").write_text(CODE)
    info = site / "strangers_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (info / "RECORD").write_text("stranger.py,,\n")
    (info / "top_level.txt").write_text("stranger\n")
    return str(site)


def installed(*paths: str) -> dict[str, str]:
    """The environment of a process that finds packages in these folders, too."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *(path for path in sys.path if path)]), "OMP_NUM_THREADS": "1"}


def python(code: str, env: dict[str, str]) -> str:
    """What the code prints in a Python of its own, in which warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def printed(code: str, paths: list[str], folder: Path) -> str:
    """What the code prints on both streams in a process that begins with our modules imported, but has looked up no name."""
    told = folder / "told"
    code_of_exit = ended(started(told, executed, code, paths, folder))
    said = told.read_text(encoding="utf-8")
    assert code_of_exit == 0, said[-3000:]
    return said


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
def trained(request: pytest.FixtureRequest, stranger: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A model of the stranger's network and prior, with our likelihood or theirs, and what it gave."""
    folder = tmp_path_factory.mktemp("strangers") / "model"
    code = f"OUT, LIKELIHOOD = {str(folder)!r}, {request.param!r}\n{TRAINED}"
    return folder, json.loads(printed(code, [stranger], folder.parent).splitlines()[-1])


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
    assert "comes from the package evil" in python(code, installed(str(tmp_path)))
    assert not (tmp_path / "trace").exists()


def test_help_texts_know_the_name(stranger: str) -> None:
    code = "from sigma_vae.registry import register; print(register.network.names(), register.network.entry('mirror').summary)"
    assert python(code, installed(stranger)) == (
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
import json, torch
from sigma_vae.cli import main
torch.set_num_threads(1)
print(json.dumps([main(words) for words in COMMANDS]))
"""


def run(paths: list[str], folder: Path, commands: list[list[str]]) -> tuple[list[int], str]:
    """Exit codes of these commands, run in this folder by one process; and all that they printed."""
    said = printed(f"COMMANDS = {commands!r}\n{SCRIPT}", paths, folder)
    return json.loads(said.splitlines()[-1]), said


def named(network: str, prior: str) -> list[list[str]]:
    return [[{"NETWORK": network, "PRIOR": prior}.get(word, word) for word in words] for words in README]


def test_a_whole_network_passes_every_command(stranger: str, tmp_path: Path) -> None:
    codes, said = run([stranger], tmp_path, named("whole", "mixture"))
    assert codes == [0] * len(README), said
    first, again = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("first", "again"))
    assert first["prior"].startswith("mixture:")
    assert again["elbo_nats"] == first["elbo_nats"]
    assert first["information"]
    model = json.loads((tmp_path / "first" / "model" / "model.json").read_text())
    assert model["packages"]["network"] == "strangers-package"


def test_a_bare_network_passes_every_command_but_those_of_its_latents(stranger: str, tmp_path: Path) -> None:
    codes, said = run([stranger], tmp_path, named("bare", "standard"))
    refused = [words[0] for words, code in zip(README, codes, strict=True) if code]
    assert refused == ["encode", "fit-prior"], said
    assert "does not define posterior(x)" in said
    assert "single layer of flat latents" in said


def test_help_and_errors_know_the_networks_of_packages(stranger: str, tmp_path: Path) -> None:
    code = "import os; from sigma_vae.cli import main; os.environ['COLUMNS'] = '200'; main(['train', '--help-all'])"
    told = printed(code, [stranger], tmp_path)
    assert "- whole: A network of a test with a posterior" in told
    _, said = run([stranger], tmp_path, [["train", "digits", "--network", "whle"]])
    assert "did you mean 'whole'?" in said
    _, said = run([], tmp_path, [["train", "digits", "--network", "whole"]])
    assert "there is no network 'whole'" in said


def test_a_run_names_the_package_that_is_missing(stranger: str, tmp_path: Path) -> None:
    commands = [["train", "digits", "--network", "whole", "--max-steps", "2", "--out", "run"]]
    assert run([stranger], tmp_path, commands)[0] == [0]
    codes, said = run([], tmp_path, [["sample", "run"], ["evaluate", "run"]])
    assert codes == [1, 1]
    assert "comes from the package strangers-package" in said
