"""Distances between sets of features: closed forms, SciPy's matrix root, brute force."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from sigma_vae.evaluation.quality import frechet_distance, kernel_distance, precision_recall, radii


def features(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> torch.Tensor:
    """Features with exactly these moments: noise, whitened by its own covariance, then coloured."""
    noise = np.random.default_rng(seed).standard_normal((n, len(mean)))
    noise -= noise.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.atleast_2d(np.cov(noise, rowvar=False))), noise.T)
    return torch.from_numpy((np.linalg.cholesky(covariance) @ white).T + mean)


def rotation(d: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def correlated(n: int, d: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((n, d)) @ random.standard_normal((d, d)) + random.standard_normal(d)


def by_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    """The formula as it is written."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(means + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real))


SPREADS = {"alike": (1.0, 1.0), "wider": (1.0, 9.0), "narrow": (1e-4, 4.0)}


@pytest.mark.parametrize("spreads", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("d", [1, 3, 40])
def test_gaussians_that_commute_have_the_distance_of_their_axes(d: int, spreads: tuple[float, float]) -> None:
    variances = [scale * np.linspace(1, 5, d) for scale in spreads]
    q, apart = rotation(d, 0), np.linspace(-2, 3, d)
    x, y = (
        features(200, mean, q @ np.diag(v) @ q.T, seed)
        for seed, (mean, v) in enumerate(zip((0 * apart, apart), variances, strict=True))
    )
    expected = (apart**2).sum() + ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_two_dimensions_have_a_closed_form() -> None:
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.8], [-0.8, 3.0]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))  # tr √M = √(tr M + 2 √det M)
    x, y = features(50, np.zeros(2), a, 0), features(80, np.array([1.0, 2.0]), b, 1)
    assert frechet_distance(x, y) == pytest.approx(5 + np.trace(a) + np.trace(b) - 2 * root, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(500, 300, 20), (400, 400, 100), (1000, 999, 5)])
def test_the_distance_is_that_of_the_matrix_root(n: int, m: int, d: int) -> None:
    x, y = correlated(n, d, 0), correlated(m, d, 1)
    ours = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(by_matrix_root(x, y), rel=1e-6)
    assert ours == pytest.approx(frechet_distance(torch.from_numpy(y), torch.from_numpy(x)), rel=1e-9)


@pytest.mark.parametrize("more", [0, 5, 400])
def test_features_that_never_vary_change_nothing(more: int) -> None:
    """The covariance has no inverse then, and with many of them fewer examples than features."""
    x, y = correlated(60, 4, 0), correlated(70, 4, 1)
    q = rotation(4 + more, 3)
    wider = [torch.from_numpy(np.pad(values, ((0, 0), (0, more))) @ q) for values in (x, y)]
    assert frechet_distance(*wider) == pytest.approx(by_matrix_root(x, y), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(100, 8), (20, 64)])
def test_a_set_is_at_no_distance_from_itself(n: int, d: int) -> None:
    x = torch.from_numpy(correlated(n, d, 0))
    assert frechet_distance(x, x[torch.randperm(n)]) == pytest.approx(0, abs=1e-10 * float(x.square().sum() / n))
    assert precision_recall(x, x)[:2] == (1, 1)
    assert precision_recall(x, x).coverage == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_of_low_precision_are_computed_with_in_float64(dtype: torch.dtype) -> None:
    x, y = (torch.from_numpy(correlated(200, 6, seed)).to(dtype) for seed in (0, 1))
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.double())
    assert kernel_distance(x, y, subsets=2) == kernel_distance(x.double(), y.double(), subsets=2)
    assert precision_recall(x, y) == precision_recall(x.double(), y.double())


# -- kernel distance -------------------------------------------------------------------------------------------------------


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy, sum by sum (Gretton et al. 2012, equation 3)."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    own = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(own - 2 * kernel(x, y).sum() / (n * m))


def test_the_kernel_distance_of_whole_sets_is_the_discrepancy() -> None:
    x, y = correlated(90, 12, 0), correlated(90, 12, 1)
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert (found.subsets, found.subset_size) == (1, 90)
    assert found.mean == pytest.approx(mmd(x, y), rel=1e-6)
    assert found.standard_deviation is None


def test_the_kernel_distance_is_the_mean_over_subsets() -> None:
    x, y = correlated(200, 12, 0), correlated(150, 12, 1)
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=7, subset_size=40, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        rows = [[torch.randperm(len(values))[:40].numpy() for values in (x, y)] for _ in range(7)]
    values = [mmd(x[a], y[b]) for a, b in rows]
    assert (found.subsets, found.subset_size) == (7, 40)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-6)
    assert found.standard_deviation == pytest.approx(np.std(values), rel=1e-6)


def test_subsets_belong_to_the_seed_and_leave_torchs_alone() -> None:
    x, y = (torch.from_numpy(correlated(100, 4, seed)) for seed in (0, 1))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (kernel_distance(x, y, subsets=3, subset_size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_kernel_distance_of_one_distribution_is_around_zero() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 2000, 8)))
    found = kernel_distance(*x, subsets=20, subset_size=500)
    assert abs(found.mean) < 3 * found.standard_deviation
    assert kernel_distance(x[0], x[1] + 1, subsets=20, subset_size=500).mean > 30 * found.standard_deviation


# -- precision and recall --------------------------------------------------------------------------------------------------


def brute_force(real: np.ndarray, made: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Pair by pair."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))

    def reach(points: np.ndarray) -> list[float]:
        return [
            sorted(distance(point, other) for j, other in enumerate(points) if j != i)[k - 1] for i, point in enumerate(points)
        ]

    real_reach, made_reach = reach(real), reach(made)
    balls = [sum(distance(r, m) <= radius for r, radius in zip(real, real_reach, strict=True)) for m in made]
    recalled = [any(distance(r, m) <= radius for m, radius in zip(made, made_reach, strict=True)) for r in real]
    covered = [min(distance(r, m) for m in made) <= radius for r, radius in zip(real, real_reach, strict=True)]
    return (
        sum(ball > 0 for ball in balls) / len(made),
        sum(recalled) / len(real),
        sum(balls) / (k * len(made)),
        sum(covered) / len(real),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "shift", "spread"), [(40, 30, 0.0, 1.0), (30, 45, 1.5, 1.0), (35, 35, 0.3, 0.4)])
def test_precision_and_recall_are_those_of_brute_force(
    n: int, m: int, shift: float, spread: float, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(n)
    real, made = random.standard_normal((n, 3)), spread * random.standard_normal((m, 3)) + shift
    expected = brute_force(real, made, k)
    assert any(0 < share < 1 for share in expected)
    for at_once in (2**24, 100):  # all together, and a few rows at a time
        monkeypatch.setattr("sigma_vae.evaluation.quality.AT_ONCE", at_once)
        a, b = torch.from_numpy(real), torch.from_numpy(made)
        assert precision_recall(a, b, k) == pytest.approx(expected, rel=1e-12)
        assert precision_recall(a, b, k, radii(a, k)) == precision_recall(a, b, k)


def test_samples_of_one_mode_are_precise_and_recall_half() -> None:
    random = np.random.default_rng(0)
    modes = random.standard_normal((2, 400, 2)) * 0.1 + np.array([[[0.0, 0.0]], [[10.0, 0.0]]])
    real, made = np.concatenate([modes[0, :200], modes[1, :200]]), modes[0, 200:]
    found = precision_recall(torch.from_numpy(real), torch.from_numpy(made))
    assert found.precision > 0.9
    assert found.recall == pytest.approx(0.5, abs=0.05)
    assert found.coverage == pytest.approx(0.5, abs=0.05)
    assert found.density == pytest.approx(1, abs=0.3)
    assert precision_recall(torch.from_numpy(made), torch.from_numpy(real)).precision == pytest.approx(0.5, abs=0.05)


# -- mistakes --------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "sizes": (torch.zeros(9, 3), torch.zeros(9, 4), "from the same extractor"),
    "axes": (torch.zeros(9), torch.zeros(9), "features \\(n, d\\)"),
    "too few": (torch.zeros(9, 3), torch.zeros(1, 3), "at least"),
}


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, precision_recall])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_sets_that_do_not_fit_get_a_sentence(mistake: str, distance) -> None:
    x, y, says = MISTAKES[mistake]
    with pytest.raises(ValueError, match=says):
        distance(x, y)


def test_the_kernel_distance_of_one_pair_of_subsets_has_no_std():
    found = kernel_distance(torch.randn(50, 3), torch.randn(50, 3))
    assert (found.subsets, found.standard_deviation) == (1, None)
    assert found.to_json()["standard_deviation"] is None
