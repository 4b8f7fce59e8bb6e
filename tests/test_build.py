"""Names into objects and back, saved models, configurations."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sigma_vae import models
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, parse, read, write
from sigma_vae.data import Scaling
from sigma_vae.likelihoods import Fixed, Optimal, PerImage, PerPixel, RunningMinimum, Scale, Shared, StudentT
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.residuals import student_t
from sigma_vae.registry import register
from sigma_vae.types import DataDistribution, Likelihood

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
    config = ModelConfig(network=network, likelihood=f"gaussian/{scale}", latent_dim=3, width=8)
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
