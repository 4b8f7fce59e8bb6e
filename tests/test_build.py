"""Names into objects and back, saved models, configurations."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

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
