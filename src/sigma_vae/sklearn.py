"""Estimators for scikit-learn: latents as features, and outliers by their density."""

import copy
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, OutlierMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from sigma_vae import models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.data import Batches, Scaling, Splits
from sigma_vae.data.batches import standardisation
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation.anomaly import Anomalies, anomalies, p_values
from sigma_vae.runs.evaluate import take_prior
from sigma_vae.training import fit
from sigma_vae.vae import VAE

__all__ = ["VAEOutlierDetector", "VAETransformer"]

Values = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
EXTRA = 100
"""Held-out examples that training examples stand for in each σ."""
EPOCHS, LEAST_STEPS, MOST_STEPS = 10, 750, 10_000
SMALL = 1e-6
"""Least std of a column, relative to its largest value: less is rounding."""


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """The base of both estimators: parameters, training, and a pickle without code."""

    vae_: VAE

    def __init__(
        self,
        latent_dim: int = 20,
        *,
        width: int | None = None,
        network: str = "auto",
        likelihood: str | None = None,
        prior: str = "auto",
        max_steps: int | None = None,
        batch_size: int = 128,
        validation_fraction: float = 0.1,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.latent_dim = latent_dim
        self.width = width
        self.network = network
        self.likelihood = likelihood
        self.prior = prior
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.device = device

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _trained(self, X: Any, y: Any = None) -> Values:
        """Check and scale the data, and train ``vae_`` on them."""
        x = self._checked(X, reset=True)
        if len(x) < 2:
            raise ValueError(f"{type(self).__name__} needs two examples or more, got n_samples = {len(x)}")
        seed = self._seed()
        self.shape_ = x.shape[1:]
        self.scaling_ = _scaling(x)
        order = np.random.RandomState(seed).permutation(len(x))
        held_out = min(max(1, round(self.validation_fraction * len(x))), len(x) - 1)
        parts = [InMemory(torch.from_numpy(x[np.sort(chosen)])) for chosen in (order[held_out:], order[:held_out])]
        data = Splits("array", parts[0], parts[1], parts[1], self.scaling_, {})
        self.config_ = ModelConfig(
            self.network if self.network != "auto" else models.default_network(self.shape_),
            self.likelihood or ("gaussian/optimal-channel" if len(self.shape_) == 1 else "gaussian/optimal"),
            min(self.latent_dim, max(int(np.prod(self.shape_)), 1)),
            self.width,
            prior=self.prior,
        )
        usual = min(max(EPOCHS * -(-len(x) // self.batch_size), LEAST_STEPS), MOST_STEPS)
        steps = usual if self.max_steps is None else self.max_steps
        training = TrainingConfig(schedule="cosine", batch_size=self.batch_size, max_steps=steps)
        with _own_generators(seed):
            vae = models.vae(self.config_, self.shape_, self.scaling_)
            fit(vae, data, training, seed=seed, device=self.device, progress=False)
            take_prior(self.prior, vae, data, seed)
        self.vae_ = vae.eval()
        _steady(self.vae_, data, seed)
        self.held_out_ = np.sort(order[:held_out])
        return x

    def _seed(self) -> int:
        if isinstance(self.random_state, Integral):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _checked(self, X: Any, *, reset: bool = False) -> Values:
        """Rows or images as float32, with what scikit-learn says of wrong ones."""
        x = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], allow_nd=True, ensure_min_samples=1)
        if not reset and tuple(x.shape[1:]) != tuple(self.shape_):
            raise ValueError(f"{type(self).__name__} was fitted to examples of shape {tuple(self.shape_)}, got {x.shape[1:]}")
        return cast(Values, np.ascontiguousarray(x, dtype=np.float32))

    def _batches(self, x: Values) -> Batches:
        return Batches(InMemory(torch.from_numpy(x)), self.scaling_, 256)

    def __getstate__(self) -> dict[str, Any]:
        """The model as bytes of safetensors and JSON, which hold no code."""
        state = dict(super().__getstate__())
        if (vae := state.pop("vae_", None)) is not None:
            with tempfile.TemporaryDirectory() as folder:
                models.save(Path(folder), vae, self.config_, self.shape_, self.scaling_)
                state["model_files"] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        state = dict(state)
        files = state.pop("model_files", None)
        super().__setstate__(state)
        if files is not None:
            with tempfile.TemporaryDirectory() as folder:
                for name in ("model.json", "model.safetensors"):
                    (Path(folder) / name).write_bytes(files[name])
                self.vae_ = models.load(folder).vae


class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _Estimator):  # type: ignore[misc]
    """Latents of a VAE as features: posterior means; each row's log-probability as a score.

    Rows ``(n, C)`` are standardised column by column; images ``(n, C, H, W)`` channel by channel. Each column has a σ of its own.

    Args:
        latent_dim: number of latents; at most that of the values of an example.
        width: units of a hidden layer, or channels; the network's default unless given.
        network: name of the network; ``"auto"``: an MLP for rows, a residual network for images.
        likelihood: name of the likelihood; None: Gaussian with a σ for each column of rows, with one for images.
        prior: what is fitted to the latents after training.
        max_steps: steps of training; unless given, 10 epochs, at least 750 and at most 10 000.
        batch_size: examples in a step.
        validation_fraction: share of the examples that are held out for σ and the choice of the weights.
        random_state: of the weights, the held-out examples and the noise.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.

    >>> x = np.random.RandomState(0).randn(60, 4)
    >>> model = VAETransformer(latent_dim=2, width=8, max_steps=20, random_state=0).fit(x)
    >>> model.transform(x).shape, model.inverse_transform(model.transform(x)).shape, model.score_samples(x).shape
    ((60, 2), (60, 4), (60,))
    """

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on examples; y is not used."""
        self._trained(X)
        return self

    @torch.no_grad()
    def transform(self, X: Any) -> Values | Floats:
        """Posterior means ``(n, latent_dim)``, in the precision of X."""
        check_is_fitted(self)
        with _in_float64(self.vae_) as vae:
            found = [vae.encode(batch.x.to(vae.device, torch.float64)).loc.cpu() for batch in self._batches(self._checked(X))]
        single = getattr(X, "dtype", None) == np.float32
        return cast(Values | Floats, (torch.cat(found).float() if single else torch.cat(found)).numpy())

    @torch.no_grad()
    def inverse_transform(self, X: Any) -> Floats:
        """Means of p(x|z) for latents ``(n, latent_dim)``, in the units of the data."""
        check_is_fitted(self)
        z = torch.as_tensor(np.asarray(X, dtype=np.float32), device=self.vae_.device)
        return self._in_units(self.vae_.decode(z))

    @torch.no_grad()
    def sample(self, n_samples: int = 1) -> Floats:
        """Draws from the model, in the units of the data; the same for the same integer ``random_state``."""
        check_is_fitted(self)
        seed = self._seed()
        with _own_generators(seed):
            drawn = self.vae_.sample(n_samples, "draw", generator=torch.Generator(self.vae_.device).manual_seed(seed))
        return self._in_units(drawn)

    def score_samples(self, X: Any) -> Floats:
        """Log-probability of each example, of 16 importance-weighted draws, in nats in the units of the data."""
        check_is_fitted(self)
        return cast(Floats, -_anomalies(self.vae_, self._batches(self._checked(X)), 16).density.numpy())

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of :meth:`score_samples`: higher is better, so that grid search can choose by it."""
        return float(self.score_samples(X).mean())

    @property
    def _n_features_out(self) -> int:
        (size,) = self.vae_.network.latents.sizes
        return size

    def _in_units(self, x: Tensor) -> Floats:
        return cast(Floats, self.scaling_.undo(x).double().cpu().numpy())


class VAEOutlierDetector(OutlierMixin, _Estimator):  # type: ignore[misc]
    """Outliers by the density, the rate or the reconstruction of a VAE; scores are the same at each call.

    Args:
        contamination: share of the training examples that are called outliers; it sets ``offset_``.
        criterion: ``"density"``, ``"rate"``, ``"reconstruction"``, or ``"p-value"``: the rank of the density among held-out
            examples, so that
            ``contamination`` is a rate of false alarms.
        draws: number of posterior draws.
        latent_dim: see :class:`VAETransformer`, as for the rest.
        width: likewise.
        network: likewise.
        likelihood: likewise.
        prior: likewise.
        max_steps: likewise.
        batch_size: likewise.
        validation_fraction: likewise.
        random_state: likewise.
        device: likewise.

    Attributes:
        offset_: threshold of :meth:`score_samples`, below which examples are outliers.
        decision_scores_, threshold_, labels_: of the training examples, by the names and signs of pyod: larger is odder, 1 is
            an outlier.

    >>> x = np.random.RandomState(0).randn(100, 3)
    >>> x[0] = 9
    >>> model = VAEOutlierDetector(contamination=0.02, latent_dim=2, width=8, max_steps=20, random_state=0).fit(x)
    >>> int(model.score_samples(x).argmin()), int(model.predict(x)[0]), int(model.labels_[0])
    (0, -1, 1)
    """

    def __init__(
        self,
        contamination: float = 0.1,
        *,
        criterion: Literal["density", "rate", "reconstruction", "p-value"] = "density",
        draws: int = 16,
        latent_dim: int = 20,
        width: int | None = None,
        network: str = "auto",
        likelihood: str | None = None,
        prior: str = "auto",
        max_steps: int | None = None,
        batch_size: int = 128,
        validation_fraction: float = 0.1,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(
            latent_dim,
            width=width,
            network=network,
            likelihood=likelihood,
            prior=prior,
            max_steps=max_steps,
            batch_size=batch_size,
            validation_fraction=validation_fraction,
            random_state=random_state,
            device=device,
        )
        self.contamination = contamination
        self.criterion = criterion
        self.draws = draws

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on examples, most of which are inliers; y is not used."""
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination is a share of the examples, above 0 and at most 0.5, got {self.contamination}")
        if self.criterion not in ("density", "rate", "reconstruction", "p-value"):
            raise ValueError(f'criterion is "density", "rate", "reconstruction" or "p-value", got {self.criterion!r}')
        x = self._trained(X)
        found = self._found(x)
        self.reference_ = found.density.numpy()[self.held_out_]
        scores = self._scores(found)
        self.offset_ = (
            self.contamination if self.criterion == "p-value" else float(np.percentile(scores, 100 * self.contamination))
        )
        self.decision_scores_, self.threshold_ = -scores, -self.offset_
        self.labels_ = (scores < self.offset_).astype(int)
        return self

    def score_samples(self, X: Any) -> Floats:
        """The score with its sign turned, so that odder examples have lower ones; p-values as they are."""
        check_is_fitted(self)
        return self._scores(self._found(self._checked(X)))

    def decision_function(self, X: Any) -> Floats:
        """:meth:`score_samples` less ``offset_``: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """1 for inliers, −1 for outliers."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _found(self, x: Values) -> Anomalies:
        return _anomalies(self.vae_, self._batches(x), self.draws)

    def _scores(self, found: Anomalies) -> Floats:
        match self.criterion:
            case "p-value":
                scores = p_values(found.density, torch.from_numpy(self.reference_)).double()
            case "rate":
                scores = -found.rate
            case "reconstruction":
                scores = -found.reconstruction
            case _:
                scores = -found.density
        return cast(Floats, scores.numpy())


@torch.no_grad()
def _steady(vae: VAE, data: Splits, seed: int) -> None:
    r"""Steady each σ where few examples are held out: a σ from 25 of them has a standard error of 14 %.

    With s² and t² the σ² of n held-out and N training examples, and ρ the median of s²/t² over columns,

    .. math:: \sigma^2 = \frac{N u^2 + 1}{N + 1}, \qquad u^2 = \frac{n s^2 + 100\, \rho t^2}{n + 100}

    The first adds one residual of a standard deviation to each column (a prior of unit information; Kass and Wasserman 1995),
    without which a column that is constant in training decides about all scores.
    """
    likelihood = vae.likelihood
    if not likelihood.has_scale or likelihood.predicts_scale:
        return
    n, many = len(data.validation), len(data.train)
    held_out = {name: each.clone() for name, each in likelihood.state_dict().items() if name.endswith("_log_scale")}
    vae.calibrate(data.batches("train", 256, device=vae.device), seed)
    training, steady = likelihood.state_dict(), {}
    for name, s in held_out.items():
        t = training[name]
        u = (n * (2 * s).exp() + EXTRA * (2 * t + (2 * (s - t)).median()).exp()) / (n + EXTRA)
        steady[name] = 0.5 * ((many * u + 1) / (many + 1)).log()
    likelihood.load_state_dict(training | steady)


@contextmanager
def _in_float64(vae: VAE) -> Iterator[VAE]:
    """The model in float64 for a block: its numbers then depend on no other example, not even by rounding."""
    copied = copy.deepcopy(vae).double()
    yield copied.eval()


def _anomalies(vae: VAE, batches: Batches, draws: int) -> Anomalies:
    with _in_float64(vae) as exact:
        return anomalies(exact, batches, draws, bits=False)


def _scaling(x: Values) -> Scaling:
    """Standardise; a constant channel is only shifted."""
    store = InMemory(torch.from_numpy(x))
    try:
        return standardisation(store, "X")
    except ValueError:
        axes = (0, *range(2, x.ndim))
        mean, std = x.mean(axes, dtype=np.float64), x.std(axes, dtype=np.float64)
        std = np.where(std > SMALL * np.abs(x).max(axes), std, 1.0)
        return Scaling(mean=tuple(mean.tolist()), deviation=tuple(std.tolist()))


@contextmanager
def _own_generators(seed: int) -> Iterator[None]:
    """Seed the global generators for a block, and restore them."""
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
    np.random.set_state(states[0])
    random.setstate(states[1])
