"""VAEs of tables: fit a data frame, sample rows like it, impute missing values, and compute log-probabilities."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Self, cast, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import Normal

from sigma_vae import models
from sigma_vae.columns import Cell, Family
from sigma_vae.config import DataConfig, ModelConfig, TrainingConfig, check_seed
from sigma_vae.data import Batches, Scaling, Splits
from sigma_vae.data.load import mixed_splits, splits_of_frames
from sigma_vae.data.schema import TableSchema, Unknown
from sigma_vae.data.splits import SplitName
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation.base import each_example
from sigma_vae.evaluation.elbo import score
from sigma_vae.progress import steps
from sigma_vae.runs.evaluate import take_prior
from sigma_vae.training import fit
from sigma_vae.types import Batch
from sigma_vae.vae import VAE, in_eval_mode, keyed_noise

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ESS", "TabularVAE"]

ESS = "effective_sample_size"
"""Key of ``frame.attrs``: the effective sample size of conditional samples."""
PROPOSALS = 4096
"""Least number of latents that conditional samples are chosen from."""
TOGETHER = 2**20
"""Features decoded together."""
ENCODED = 50_000
"""Most rows that the prior is fitted to."""
WIDTH = 200
BATCH, LEARNING_RATE = 256, 3e-3
EPOCHS, LEAST_STEPS, MOST_STEPS = 100, 500, 5_000


class Weighted(NamedTuple):
    """Latents drawn for rows ``(draws, rows, latent_dim)``, their log importance weights and features."""

    log_weights: Tensor
    features: Tensor


@final
class TabularVAE:
    r"""A VAE with a likelihood of its own for each column, for data frames as they come.

    Numbers, counts, text, categoricals, booleans, dates and missing values are read; see :class:`~sigma_vae.data.schema.TableSchema`
    for the columns and :class:`~sigma_vae.likelihoods.mixed.Mixed` for their likelihoods. Missing values are not scored: they
    are taken to be missing at random given the others.

    Args:
        latent_dim: number of latents; at most one for each column, as unused ones slow training down.
        width: units of each hidden layer of the encoder and the decoder, which have two each.
        prior: what is fitted to the latents after training: ``"auto"``, ``"standard"`` for N(0, I), ``"mixture"``, ...
        training: settings of the training; unless given, 500 steps or 100 epochs (at most 5 000 steps) of 256 rows, with a
            learning rate that falls from 0.003 to 0.
        families: families of columns, in place of the inferred ones.
        exclude: columns to leave out.
        unknown: a category that :meth:`fit` has not seen is an ``"error"``, or ``"other"``: missing, if the column has no other
            category.
        validation_fraction: share of the rows that are held out for σ, the choice of the weights and the prior.
        seed: of the weights, the held-out rows and the noise.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        progress: show a progress bar.

    >>> import pandas as pd
    >>> size = np.random.RandomState(0).randn(200)
    >>> frame = pd.DataFrame({"size": size.round(2), "large": size > 0})
    >>> model = TabularVAE(latent_dim=2, width=16, training=TrainingConfig(max_steps=50)).fit(frame)
    >>> model.sample(3).dtypes.tolist() == frame.dtypes.tolist(), model.log_prob(frame).shape
    (True, (200,))
    >>> small = model.sample(20, where={"large": False})
    >>> bool(small["large"].any()), small.attrs["effective_sample_size"] > 100
    (False, True)
    """

    vae: VAE
    """The model, after :meth:`fit`."""
    schema: TableSchema
    """The columns, after :meth:`fit`."""

    def __init__(
        self,
        *,
        latent_dim: int = 20,
        width: int = WIDTH,
        prior: str = models.AUTO,
        training: TrainingConfig | None = None,
        families: Mapping[str, Family] | None = None,
        exclude: Sequence[str] = (),
        unknown: Unknown = "error",
        validation_fraction: float = 0.1,
        seed: int = 0,
        device: str = "auto",
        progress: bool = False,
    ) -> None:
        check_seed(seed)
        self.config = ModelConfig("mlp", "mixed", latent_dim, width, prior=prior)
        self.latent_dim = latent_dim
        self.training = training
        families = {} if families is None else families
        self.data = DataConfig(
            "frame",
            mixed=True,
            families=tuple(f"{name}={family}" for name, family in families.items()),
            exclude=tuple(exclude),
            unknown=unknown,
            validation_fraction=validation_fraction,
            split_seed=seed,
        )
        self.seed, self.device, self.progress = seed, device, progress

    def fit(self, frame: "pd.DataFrame | str | Path", validation: "pd.DataFrame | None" = None) -> Self:
        """Find the columns' types, train, solve each σ on held-out rows, and fit the prior.

        Args:
            frame: the rows; or the path of a file, or of a folder with train.csv, which is read and split as ``sigma-vae
                train`` does it. A large Parquet file is read a part at a time, into a mapped file beside it.
            validation: held-out rows, in place of a share of these.

        Raises:
            ValueError: there are too few rows, no column that varies, or a path and ``validation`` are given.
        """
        if not isinstance(frame, str | Path):
            data = self._held_out(frame, validation)
        elif validation is None:
            data = mixed_splits(replace(self.data, source=str(frame)))
        else:
            raise ValueError(f"fit takes validation beside a data frame, got it beside {frame}; put both into a folder")
        schema = data.scaling.schema
        assert schema is not None
        self.config = replace(self.config, latent_dim=min(self.latent_dim, len(schema.columns)))
        torch.manual_seed(self.seed)
        vae = models.vae(self.config, data.shape, data.scaling)
        fit(vae, data, self.training or _training(len(data.train)), seed=self.seed, device=self.device, progress=self.progress)
        take_prior(self.config.prior, vae, data, self.seed, ENCODED)
        self.vae, self.schema = vae.eval(), schema
        return self

    def _held_out(self, frame: "pd.DataFrame", validation: "pd.DataFrame | None") -> Splits:
        """Training and validation rows; the latter stand for a test split too, which is not used."""
        if validation is None:
            held_out = max(1, round(self.data.validation_fraction * len(frame)))
            if held_out >= len(frame):
                raise ValueError(f"fit needs two rows or more, got {len(frame)}; add some")
            order = np.random.RandomState(self.seed).permutation(len(frame))
            frame, validation = frame.iloc[np.sort(order[held_out:])], frame.iloc[np.sort(order[:held_out])]
        parts: dict[SplitName, pd.DataFrame] = {"train": frame, "validation": validation, "test": validation}
        frames = {split: part.reset_index(drop=True) for split, part in parts.items()}
        return splits_of_frames(frames, self.data, "frame")

    @torch.no_grad()
    def sample(
        self,
        n: int,
        where: Mapping[str, Cell] | None = None,
        *,
        discrete: Literal["draw", "mode"] = "draw",
        missing: bool = True,
        seed: int = 0,
    ) -> "pd.DataFrame":
        r"""Draw rows, in the dtypes, categories, ranges and decimals of the data.

        With ``where``, rows have these values, and the rest is drawn given them. Latents z are drawn from a half-and-half
        mixture of the prior and the posterior given the known columns, and chosen with weights
        :math:`w = p(x_{\text{known}} | z)\, p(z) / q(z)` (sampling importance resampling, Rubin 1988).
        ``frame.attrs["effective_sample_size"]`` is :math:`(\sum w)^2 / \sum w^2`: below the number of rows, many of them share
        their latents.

        Args:
            n: number of rows.
            where: values of columns.
            discrete: draw discrete columns given the latents, or take their ``"mode"``: the likeliest category, and the mean
                count. Relations between columns are then sharper than in the data, and rare categories rarer: a classifier
                that is trained on such rows may do better.
            missing: leave values of each column missing at random, as often as in the data; but for known columns.
            seed: of the draws.

        Raises:
            ValueError: a column or a category does not exist, or no latent gives the known values a probability.
        """
        if n < 1:
            raise ValueError(f"n is the number of rows and at least 1, got {n}")
        if discrete not in ("draw", "mode"):
            raise ValueError(f'discrete is "draw" or "mode", got {discrete!r}')
        check_seed(seed)
        generator = torch.Generator(self._vae.device).manual_seed(seed)
        if where:
            features, size, known = self._features_where(n, where, seed)
        else:
            z = self._vae.network.prior.sample(n, generator)
            features, size, known = self._vae.network.decode(z), None, None
        rows = self._vae.likelihood(features)
        x = rows.sample(generator=generator).cpu()
        if discrete == "mode":
            numbers = sum(map(len, self.schema.row.numbers))  # which come first in a row
            x[:, numbers:] = rows.mean[:, numbers:].cpu()
        if missing:
            x = self.schema.with_missing(x, torch.Generator().manual_seed(seed))
        if known is not None:
            x = self._with_known(x, known.expand(n, -1))
        frame = self.schema.decode(x, missing=missing)
        if size is not None:
            frame.attrs[ESS] = size
        return frame

    @torch.no_grad()
    def log_prob(self, frame: "pd.DataFrame", draws: int = 256, *, seed: int = 0) -> npt.NDArray[np.float64]:
        r"""Log-probability of the observed values of each row, in nats: a density in the data's units, times masses.

        .. math:: \log \tfrac1K \sum_k p(x|z_k)\, p(z_k) / q(z_k), \qquad q = \tfrac12 q(z|x) + \tfrac12 p(z)

        It is a lower bound in expectation, and rises to log p(x) with the number of draws (Burda et al. 2016). Half of the draws
        come from the prior, so that no weight is more than twice p(x|z).

        Args:
            frame: rows.
            draws: K.
            seed: of the noise, which belongs to the position of the row.
        """
        parts = [
            torch.logsumexp(weighted.log_weights, 0) - np.log(len(weighted.log_weights))
            for weighted in self._weighted(self._encoded(frame), draws, seed)
        ]
        return cast(npt.NDArray[np.float64], torch.cat(parts).numpy())

    @torch.no_grad()
    def elbo(self, frame: "pd.DataFrame", *, seed: int = 0) -> "pd.DataFrame":
        """The ELBO of each row, in nats, and its terms: each column's log-likelihood (0 where missing) and the rate.

        Columns: those of the table, then ``rate``, then ``elbo``, the sum of the former less the rate; from one posterior draw.
        """
        import pandas as pd

        batches = Batches(InMemory(self._encoded(frame)), Scaling(schema=self.schema), 256)
        scores = score(self._vae, batches, seed)

        def terms(batch: Batch) -> Tensor:
            h = self._vae.network.infer(batch.x, noise=keyed_noise(batch.positions, seed)).h
            each: Tensor = self._vae.likelihood(h).column_log_prob(batch.x)
            return each

        each = each_example(self._vae, batches, terms)
        found = pd.DataFrame(each.numpy(), index=frame.index, columns=[column.name for column in self.schema.columns])
        return found.assign(rate=scores.rate.numpy(), elbo=(each.sum(1) - scores.rate).numpy())

    def report(self, frame: "pd.DataFrame", *, seed: int = 0) -> "pd.DataFrame":
        """Each column's family, its mean log-likelihood over observed values in nats, and bits where it is discrete."""
        import pandas as pd

        terms = self.elbo(frame, seed=seed)
        masks = self.schema.row.masks(self._encoded(frame)).numpy()
        observed = np.maximum((~masks).sum(0), 1)
        columns = self.schema.columns
        nats = terms.iloc[:, : len(columns)].to_numpy().sum(0) / observed
        discrete = np.array([column.is_discrete for column in columns])
        return pd.DataFrame(
            {
                "family": [column.family for column in columns],
                "log_likelihood_nats": nats,
                "bits": np.where(discrete, -nats / np.log(2), np.nan),
                "observed": (~masks).sum(0),
            },
            index=[column.name for column in columns],
        )

    @torch.no_grad()
    def impute(
        self, frame: "pd.DataFrame", show: Literal["mean", "draw"] = "mean", *, draws: int = 256, seed: int = 0
    ) -> "pd.DataFrame":
        """Fill in the missing values of each row, given its observed ones.

        Latents are drawn and weighted as for :meth:`log_prob`.

        Args:
            frame: rows; other columns are kept as they are.
            show: ``"mean"``: the weighted mean over latents of numbers' middles and counts' means, and the likeliest category;
                ``"draw"``: one draw from the posterior, for multiple imputation with several seeds.
            draws: number of latents for each row.
            seed: of the draws.
        """
        if show not in ("mean", "draw"):
            raise ValueError(f'show is "mean" or "draw", got {show!r}')
        x, done = self._encoded(frame), []
        generator = torch.Generator(self._vae.device).manual_seed(seed)
        for weighted in self._weighted(x, draws, seed, features=True):
            weights = torch.softmax(weighted.log_weights, 0)
            if show == "mean":
                each = self._vae.likelihood(weighted.features).mean.cpu()
                done.append((weights[..., None] * each).sum(0).float())
            else:
                chosen = torch.multinomial(weights.T, 1, generator=generator)[:, 0]
                h = weighted.features[chosen, torch.arange(len(chosen))]
                done.append(self._vae.likelihood(h).sample(generator=generator).cpu())
        filled = self.schema.decode(self._with_known(torch.cat(done), x))
        filled.index = frame.index
        masks = self.schema.row.masks(x).numpy()
        result = frame.set_axis([str(name) for name in frame.columns], axis=1).copy()
        for i, column in enumerate(self.schema.columns):
            if masks[:, i].any():
                result[column.name] = (
                    filled[column.name].where(masks[:, i], result[column.name]).astype(filled[column.name].dtype)
                )
        return result

    @torch.no_grad()
    def encode(self, frame: "pd.DataFrame") -> npt.NDArray[np.float32]:
        """Posterior means of each row's latents, ``(rows, latent_dim)``."""
        batches = Batches(InMemory(self._encoded(frame)), Scaling(schema=self.schema), 256)
        found = each_example(self._vae, batches, lambda batch: self._vae.encode(batch.x).loc)
        return cast(npt.NDArray[np.float32], found.float().numpy())

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors) and a description (JSON) with the schema."""
        models.save(Path(folder), self._vae, self.config, (self.schema.row.width,), Scaling(schema=self.schema))

    @classmethod
    def load(cls, folder: str | Path, *, unknown: Unknown = "error", device: str = "cpu") -> Self:
        """Read what :meth:`save` wrote, or a run of ``sigma-vae train TABLE --likelihood mixed``; nothing is unpickled.

        Raises:
            ValueError: the folder holds no model, or one of other data.
        """
        return cls.of(models.load(folder), str(folder), unknown=unknown, device=device)

    @classmethod
    def of(cls, saved: models.Saved, name: str, *, unknown: Unknown = "error", device: str = "cpu") -> Self:
        """Wrap a model that is already open; ``name`` is for the error.

        Raises:
            ValueError: it has no schema.
        """
        if saved.scaling.schema is None:
            raise ValueError(f"{name} is no model of a table with columns of all types; train one: --likelihood mixed")
        made = cls(unknown=unknown, device=device)
        made.config, made.vae, made.schema = saved.config, saved.vae.to(device).eval(), saved.scaling.schema
        return made

    @property
    def _vae(self) -> VAE:
        if not hasattr(self, "vae"):
            raise ValueError("this TabularVAE is not fitted yet; call fit(frame), or TabularVAE.load(folder)")
        return self.vae

    def _encoded(self, frame: "pd.DataFrame") -> Tensor:
        self._vae  # noqa: B018 (raises where nothing is fitted)
        if not len(frame):
            raise ValueError("expected at least one row, got none")
        return self.schema.encode(frame, unknown=self.data.unknown)

    def _with_known(self, x: Tensor, known: Tensor) -> Tensor:
        """Rows with the observed values of others."""
        row, x = self.schema.row, x.clone()
        masks = row.masks(known)
        observed = ~masks[:, row.owners]
        x[:, : row.features] = torch.where(observed, known[:, : row.features], x[:, : row.features])
        x[:, row.features :] = torch.where(masks, x[:, row.features :], 0.0)
        return x

    def _features_where(self, n: int, where: Mapping[str, Cell], seed: int) -> tuple[Tensor, float, Tensor]:
        """Features of n latents given known columns, the effective sample size, and the known row."""
        import pandas as pd

        names = [column.name for column in self.schema.columns]
        if unknown := [name for name in where if name not in names]:
            raise ValueError(f"where names columns of the model, {', '.join(names)}; got {unknown[0]!r}")
        known = self.schema.encode(pd.DataFrame({name: [value] for name, value in where.items()}), columns=list(where))
        draws = max(PROPOSALS, 20 * n)
        (weighted,) = self._weighted(known, draws + draws % 2, seed, features=True)
        weights = torch.softmax(weighted.log_weights[:, 0], 0)
        if not weights.isfinite().all():
            raise ValueError(f"the model gives {dict(where)} no probability; give other values")
        size = float(1 / weights.square().sum())
        generator = torch.Generator(self._vae.device).manual_seed(seed)
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        return weighted.features[chosen, 0], size, known

    def _weighted(self, x: Tensor, draws: int, seed: int, *, features: bool = False) -> Iterator[Weighted]:
        """Importance-weighted latents of rows, a few rows at a time; half of them from the prior."""
        if draws < 2:
            raise ValueError(f"draws counts latents drawn for each row and is at least 2, got {draws}")
        half, network, likelihood = draws // 2, self._vae.network, self._vae.likelihood
        most = max(1, TOGETHER // (2 * half * max(likelihood.in_channels, WIDTH)))
        with in_eval_mode(self._vae):
            for positions in steps("rows", torch.split(torch.arange(len(x)), most), len):
                part = x[positions].to(self._vae.device)
                q = network.posterior(part)
                noise = keyed_noise(positions, seed)
                unit = noise(torch.Size([len(part), half, q.loc.shape[1]])).transpose(0, 1).to(q.loc)
                generator = torch.Generator(self._vae.device).manual_seed(seed)
                prior = network.prior.sample(half, generator)[:, None].expand(-1, len(part), -1)
                z = torch.cat([q.loc + q.scale * unit, prior])
                log_prior = network.prior.log_prob(z)
                log_proposal = torch.logaddexp(_log_density(q, z), log_prior) - np.log(2)
                h = network.decode(z.flatten(0, 1)).reshape(2 * half, len(part), -1)
                log_weights = likelihood(h).log_prob(part) + log_prior - log_proposal
                yield Weighted(log_weights.double().cpu(), h if features else h[:0])


def _training(rows: int) -> TrainingConfig:
    """Training on so many rows: large batches and few steps, as columns of a table are learned fast."""
    steps = min(max(EPOCHS * -(-rows // BATCH), LEAST_STEPS), MOST_STEPS)
    return TrainingConfig(schedule="cosine", batch_size=BATCH, learning_rate=LEARNING_RATE, max_steps=steps)


def _log_density(q: Normal, z: Tensor) -> Tensor:
    found: Tensor = q.log_prob(z)  # type: ignore[no-untyped-call]
    return found.sum(-1)
