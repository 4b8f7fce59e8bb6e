"""The codec: exact, as short as the bound says, and never a wrong example without an error."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch import nn

from sigma_vae import (
    VAE,
    Bernoulli,
    BitwiseCategorical,
    Categorical,
    ContinuousBernoulli,
    Fixed,
    FlatNetwork,
    Gaussian,
    HierarchicalNetwork,
    HierarchyPlan,
    Laplace,
    Logistic,
    LogisticMixture,
    PerPixel,
    Shared,
    StudentT,
    mlp,
    models,
    runs,
    sequence,
)
from sigma_vae.cli import main
from sigma_vae.codec import Codec, DamagedError
from sigma_vae.codec import bits_back as bits_back_module
from sigma_vae.codec.bits_back import (
    CELL,
    CELLS,
    LATENT_WIDTHS,
    PRECISION,
    BitsBack,
    Pops,
    Pushes,
    Rounding,
    Stack,
    _Mixture,
    code,
    frequencies,
    seed_words,
)
from sigma_vae.codec.lossless import read
from sigma_vae.config import ModelConfig
from sigma_vae.data import Scaling
from sigma_vae.evaluation import score
from sigma_vae.networks import spatial
from sigma_vae.priors import FlowMatchingPrior, FlowPrior, GaussianPrior, MixturePrior

IMAGE = (1, 4, 4)
WHOLE = 2**PRECISION


def levels_of(shape, levels=256, n=6, seed=0):
    """Smooth random examples, on their levels, both end levels among them."""
    random = np.random.default_rng(seed)
    x = (random.random((n, 1, *shape[1:])) * 0.6 + 0.2 + 0.1 * random.standard_normal((n, *shape))).clip(0, 1)
    k = np.rint(x * (levels - 1)).astype(np.int64)
    k.flat[:2] = 0, levels - 1
    return torch.from_numpy(k).float() / (levels - 1)


def jolted(network, seed=0):
    """Random weights everywhere: a fresh network's priors and posteriors are too simple to be a test."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def flat(shape, out_channels, latent_dim=3, prior=None, seed=0):
    network = jolted(mlp(shape, out_channels, latent_dim=latent_dim, width=16), seed)
    if prior is not None:
        latents = torch.randn(200, latent_dim, generator=torch.Generator().manual_seed(1)) @ torch.tensor(
            [[1.0, 0.5, 0.0], [0.0, 0.6, 0.3], [0.0, 0.0, 1.5]]
        )
        latents[:100] += 2
        prior.fit(latents)
        network.replace_prior(prior)
    return network


def hierarchy(shape, out_channels, seed=0):
    return jolted(HierarchicalNetwork(shape, out_channels, HierarchyPlan.parse("4x1,4d4,1/1,4m1,4"), 2, 8), seed)


def model(network, likelihood, shape=IMAGE, levels=256, **arguments):
    vae = VAE(network(shape, likelihood.in_channels, **arguments), likelihood)
    vae.calibrate([levels_of(shape, levels, n=32, seed=9)])
    return vae


LIKELIHOODS = {
    "gaussian/optimal": (lambda c, **k: Gaussian(c, **k), 256),
    "gaussian/optimal, level": (lambda c, **k: Gaussian(c, observes="level", **k), 256),
    "laplace/shared": (lambda c, **k: Laplace(c, Shared(), **k), 256),
    "logistic/per-pixel": (lambda c, **k: Logistic(c, PerPixel(), **k), 256),
    "student-t/fixed": (lambda c, **k: StudentT(c, Fixed(0.1), **k), 256),
    "student-t:predicted": (lambda c, **k: StudentT(c, df="predicted", **k), 256),
    "categorical": (lambda c, **k: Categorical(c, levels=17, **k), 17),
    "bitwise": (lambda c, **k: BitwiseCategorical(c, **k), 256),
    "logistic-mixture": (lambda c, **k: LogisticMixture(c, components=3, **k), 256),
    "continuous-bernoulli": (lambda c, **k: ContinuousBernoulli(c, **k), 256),
    "bernoulli": (lambda c, **k: Bernoulli(c, levels=2, **k), 2),
    "16 bits": (lambda c, **k: Gaussian(c, levels=65536, **k), 65536),
}


# The stack -----------------------------------------------------------------------------------------------------------


def test_the_stack_is_asymmetric_numeral_systems_with_our_integers():
    """An independent coder with Python's integers writes the same words."""
    random = np.random.default_rng(0)
    state, bulk = (1 << 40) + 12345, [7, 9]
    stack = Stack(np.array([*bulk, state & 0xFFFFFFFF, state >> 32], np.uint32))
    for _ in range(300):
        table = frequencies(np.sort(np.concatenate([[[0.0, 1.0]], random.random((1, 6)) ** 3], 1)))
        each = (table[0].astype(int) + 1).tolist()
        assert sum(each) == WHOLE
        symbol = int(random.integers(0, 7))
        stack.push(np.array([symbol]), table)
        if state >> (64 - PRECISION) >= each[symbol]:
            bulk.append(state & 0xFFFFFFFF)
            state >>= 32
        state = (state // each[symbol] << PRECISION) + sum(each[:symbol]) + state % each[symbol]
    assert stack.words().tolist() == [*bulk, state & 0xFFFFFFFF, state >> 32]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=14), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_pops_and_pushes_undo_each_other_from_an_empty_stack_on(inner, seed):
    table = np.repeat(frequencies(np.sort(np.array([[0.0, *inner, 1.0]]))), 5, 0)
    assert (table.astype(np.int64) + 1).sum(1).tolist() == [WHOLE] * 5
    stack = Stack()
    stack.push(np.random.default_rng(seed).integers(0, table.shape[1], 5), table)
    before, known = stack.words(), stack.seeds
    popped = [stack.pop(table) for _ in range(6)]
    for symbols in reversed(popped):
        stack.push(symbols, table)
    added = stack.seeds - known
    assert (stack.words() == np.concatenate([seed_words(stack.seeds)[:added], before])).all()


def test_frequencies_are_the_probabilities_to_16_bits():
    below = np.array([[0.0, 0.1, 0.1, 0.7, 1.0], [0.5, 0.5, 0.5, 0.5, 0.5]])
    found = (frequencies(below) + 1) / WHOLE
    assert np.abs(found - [[0.1, 0, 0.6, 0.3], [0.25] * 4]).max() < 1 / 2**16 + 6 / WHOLE
    assert np.abs(found.sum(1) - 1).max() == 0


def test_a_stack_of_given_words_ends():
    table = np.repeat(frequencies(np.array([[0.0, 0.5, 1.0]])), 100, 0)
    stack = Stack(np.array([1, 2, 3, 4], np.uint32))
    with pytest.raises(ValueError, match="ends too early"):
        stack.pop(table)


def test_a_distribution_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="diverged"):
        code(Pops(Stack()), lambda edges: edges * np.nan, (2,), 3)


# Lengths -------------------------------------------------------------------------------------------------------------


def bits_of(pushes):
    """Length of what was collected, by its frequencies."""
    return sum(
        (PRECISION - np.log2(np.take_along_axis(table, digits[:, None], 1) + 1.0)).sum() for digits, table in pushes.steps
    )


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_data_take_the_bits_of_their_mass(name, channels):
    make, levels = LIKELIHOODS[name]
    likelihood = make(channels)
    vae = model(flat, likelihood, (channels, 4, 4), levels)
    x = levels_of((channels, 4, 4), levels, n=1)
    h = vae.network.decode(torch.zeros(1, 3))
    bits_back, pushes = BitsBack(vae.eval()), Pushes()
    with torch.inference_mode():
        bits_back._levels(pushes, h, (x[0] * (levels - 1)).round().long().numpy())
        expected = -float(likelihood.log_mass(h.double(), x.double(), refitted=likelihood.has_post_hoc)) / np.log(2)
    assert bits_of(pushes) == pytest.approx(expected, rel=2e-4)


PRIORS = {"gaussian": partial(GaussianPrior, 3), "mixture": partial(MixturePrior, 3, 4)}


@pytest.mark.parametrize("name", PRIORS)
def test_latents_take_the_bits_of_their_density(name):
    """−log₂ of the density times the cells' volume: scipy's mixture, all latents together."""
    prior = flat(IMAGE, 1, prior=PRIORS[name]()).prior
    coder = _Mixture(prior)
    cells = np.random.default_rng(0).integers(CELLS // 2 - 300, CELLS // 2 + 300, (20, 3))
    z = coder.mean + coder.std * ((cells - CELLS // 2) + 0.5) * CELL
    weights, means, factors = (part.double().numpy() for part in prior.as_mixture())
    parts = [stats.multivariate_normal(m, f @ f.T).pdf(z) * np.exp(w) for w, m, f in zip(weights, means, factors, strict=True)]
    expected = -np.log2(sum(parts) * np.prod(coder.std * CELL))
    found = []
    for row in cells:
        pushes = Pushes()
        coder.code(pushes, row)
        found.append(bits_of(pushes))
    assert found == pytest.approx(expected, abs=2e-3)


def test_the_file_has_the_size_that_the_evaluation_says(digits_run):
    opened = runs.open_run(digits_run, "cpu")
    x = torch.cat([batch.x for batch in opened.data.batches("test", 256)])
    scores = score(opened.vae, opened.data.batches("test", 256), 0)
    bits = float(((scores.rate - scores.log_mass) / np.log(2)).sum())
    header = read(Codec(opened.vae).encode(x)).header
    (chunk,) = header.chunks
    assert 8 * chunk.size - 32 * chunk.seeds == pytest.approx(bits, rel=0.02)
    assert chunk.seeds < 16  # 4 latents, of at most 16 bits


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_is_lossless(name, channels):
    make, levels = LIKELIHOODS[name]
    shape = (channels, 4, 4)
    vae, x = model(flat, make(channels), shape, levels), levels_of(shape, levels)
    assert torch.equal(Codec(vae, check=False).decode(Codec(vae, check=False).encode(x)), x)


@pytest.mark.parametrize("name", [None, *PRIORS])
def test_every_prior_is_lossless(name):
    vae, x = model(flat, Gaussian(1), prior=name and PRIORS[name]()), levels_of(IMAGE)
    assert torch.equal(Codec(vae).decode(Codec(vae).encode(x)), x)


@pytest.mark.parametrize("likelihood", [Gaussian(1), LogisticMixture(1, 2)], ids=repr)
def test_hierarchical_networks_are_lossless(likelihood):
    vae, x = model(hierarchy, likelihood), levels_of(IMAGE)
    assert torch.equal(Codec(vae).decode(Codec(vae).encode(x)), x)


def test_maps_of_latents_are_lossless():
    shape = (3, 8, 12)
    vae = model(lambda shape, channels: jolted(spatial(shape, channels, width=4, plan="f4c3")), Gaussian(3), shape)
    x = levels_of(shape)
    assert torch.equal(Codec(vae).decode(Codec(vae).encode(x)), x)


@pytest.mark.parametrize("given_data", [False, True])
def test_descending_by_known_latents_is_decoding_them(given_data):
    network, x = hierarchy(IMAGE, 1).eval(), levels_of(IMAGE, n=1)
    latents = network.draw_latents(x)
    known, posteriors = iter(latents), []

    def choose(prior, posterior):
        posteriors.append(posterior)
        assert prior.loc.shape == (1, 2, *network.latents.shapes[len(posteriors) - 1][1:])
        return next(known)

    assert torch.equal(network.descend(choose, x if given_data else None), network.decode(latents))
    assert all((q is not None) == given_data for q in posteriors)


RANDOM_LIKELIHOODS = {
    "gaussian": lambda channels, **k: Gaussian(channels, Fixed(0.05), **k),
    "student-t": lambda channels, **k: StudentT(channels, Fixed(0.01), df=2, **k),
    "categorical": Categorical,
    "logistic-mixture": lambda channels, **k: LogisticMixture(channels, 2, **k),
}


@given(
    seed=st.integers(0, 2**20),
    n=st.integers(0, 5),
    chunk=st.integers(1, 4),
    case=st.sampled_from([(flat, (1, 4, 4)), (hierarchy, (1, 4, 4)), (hierarchy, (3, 4, 4)), (flat, (2, 3)), (flat, (5,))]),
    name=st.sampled_from(sorted(RANDOM_LIKELIHOODS)),
    levels=st.sampled_from([2, 3, 17, 256]),
    spread=st.floats(0.01, 30),
)
@settings(max_examples=40, deadline=None)
def test_random_models_and_data_are_lossless(seed, n, chunk, case, name, levels, spread):
    """Also of models that never saw such data, and are sure of something else: surprise costs bits, not correctness."""
    make, shape = case
    likelihood = RANDOM_LIKELIHOODS[name](shape[0], spatial_dims=len(shape) - 1, levels=levels)
    network = make(shape, likelihood.in_channels, seed=seed)
    with torch.no_grad():
        list(network.encoder.parameters())[-1].mul_(spread)
    x = torch.randint(0, levels, (n, *shape), generator=torch.Generator().manual_seed(seed)).float() / (levels - 1)
    codec = Codec(VAE(network, likelihood), shape, chunk=chunk, check=False)
    assert torch.equal(codec.decode(codec.encode(x)), x)


def test_half_precision_and_training_mode_of_the_model_do_not_matter():
    vae, x = model(flat, Gaussian(1)), levels_of(IMAGE)
    blob = Codec(vae.train()).encode(x)
    assert vae.training
    assert torch.equal(Codec(vae.eval()).decode(blob), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert Codec(vae).encode(x) == blob


OTHER_PROCESS = """
import sys, torch
from sigma_vae import models
from sigma_vae.codec import Codec
folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
codec = Codec(models.load(folder).vae)
blob = open(folder + "/x.sv", "rb").read()
try:
    x = codec.decode(blob)
except ValueError as error:
    print(error)
    sys.exit(3)
assert torch.get_num_threads() == threads
torch.save((x, codec.encode(x)), sys.argv[3])
"""


@pytest.fixture(scope="module")
def other_processes(tmp_path_factory):
    """What processes with one thread, with two, and with an older processor's instructions make of a file, and its data."""
    folder, (shape, scaling) = tmp_path_factory.mktemp("model"), ((3, 8, 8), Scaling(256))
    config = ModelConfig("hierarchical:8,8d8,1/1,8m1", "logistic-mixture:2", 2, 8)
    vae = models.vae(config, shape, scaling)
    jolted(vae.network)
    models.save(folder, vae, config, shape, scaling)
    x = levels_of(shape, n=4)
    (folder / "x.sv").write_bytes(Codec(vae).encode(x))
    old = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    started = {}
    for name, threads, environment in (("one", "1", {}), ("two", "2", {}), ("old", "1", old)):
        command = [sys.executable, "-c", OTHER_PROCESS, str(folder), threads, str(folder / f"{name}.pt")]
        environment = {**os.environ, "OMP_NUM_THREADS": threads, **environment}
        started[name] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    told = {name: (process.communicate(timeout=120)[0], process.returncode) for name, process in started.items()}
    assert all(code == 0 for _, code in told.values()), told
    return x, (folder / "x.sv").read_bytes(), {name: torch.load(folder / f"{name}.pt") for name in started}


@pytest.mark.parametrize("name", ["one", "two"])
def test_other_processes_with_one_and_two_threads_write_and_decode_the_same(other_processes, name):
    x, blob, found = other_processes
    assert torch.equal(found[name][0], x)
    assert found[name][1] == blob


def test_other_instructions_decode_the_same(other_processes):
    """An older processor's last digits are others."""
    x, _, found = other_processes
    assert torch.equal(found["old"][0], x)
    assert read(found["old"][1]).header.machine["processor"].endswith("DEFAULT")


# Refusals ------------------------------------------------------------------------------------------------------------


class Drifting(nn.Module):
    """A decoder that gives other features at each call."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(2, 16), 0

    def forward(self, z):
        self.calls += 1
        return (self.linear(z) + 0.01 * self.calls).unflatten(1, IMAGE)


def drifting():
    network = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), Drifting(), 2)
    return VAE(network, Gaussian(1, Fixed(0.1)))


def condition_reader():
    network = flat(IMAGE, 1)
    network.reads_condition = True
    return VAE(network, Gaussian(1, Fixed(0.1)))


def over_a_map():
    network, prior = spatial((1, 8, 8), 1, width=4, plan="f4c3"), FlowMatchingPrior(12, (3, 2, 2))
    prior.fitted = True
    network.replace_prior(prior)
    return VAE(network, Gaussian(1, Fixed(0.1)))


REFUSED = {
    "real values": (lambda: VAE(flat(IMAGE, 1), Gaussian(1, Fixed(0.1), levels=None)), "real-valued"),
    "no probability": (lambda: VAE(flat(IMAGE, 1), Bernoulli(1)), "levels=2"),
    "clips": (lambda: VAE(sequence((1, 8, 8), 1), Gaussian(1, Fixed(0.1))), "clips"),
    "condition": (condition_reader, "condition"),
    "flow over a map": (over_a_map, "mixture"),
    "flow": (lambda: VAE(FlatNetwork(nn.Flatten(), nn.Identity(), 3, FlowPrior(3)), Gaussian(1, Fixed(0.1))), "mixture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_the_needed_probabilities_are_refused(name):
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        Codec(make())


def test_a_scale_that_is_not_known_yet_is_refused():
    with pytest.raises(ValueError, match="calibrate"):
        Codec(VAE(flat(IMAGE, 1), Gaussian(1))).encode(levels_of(IMAGE))


def test_a_model_that_drifts_fails_the_self_check():
    with pytest.raises(ValueError, match="self-check failed"):
        Codec(drifting()).encode(levels_of(IMAGE))


def test_another_model_is_refused():
    one, other = (model(partial(flat, seed=seed), Gaussian(1)) for seed in (0, 1))
    with pytest.raises(ValueError, match="give the run that wrote it"):
        Codec(other).decode(Codec(one).encode(levels_of(IMAGE)))


def jittered(vae, size, seed=0):
    """A codec whose network's outputs are wrong by up to ``size``, as on another machine."""
    random = torch.Generator().manual_seed(seed)

    def off(values):
        return values + size * (2 * torch.rand(values.shape, generator=random, dtype=values.dtype) - 1)

    def off_normal(p):
        return p and torch.distributions.Normal(off(p.loc), p.scale * off(torch.zeros_like(p.scale)).exp())

    codec = Codec(vae, check=False)
    network = codec.bits_back.latents.network
    posterior, decode, descend = (getattr(network, name) for name in ("posterior", "decode", "descend"))
    network.posterior = lambda x: off_normal(posterior(x))
    network.decode = lambda z: off(decode(z))
    network.descend = lambda choose, x=None: off(descend(lambda p, q: choose(off_normal(p), off_normal(q)), x))
    return codec


JITTERED = {
    "flat": partial(model, flat),
    "mixture": partial(model, partial(flat, prior=MixturePrior(3, 4))),
    "hierarchy": partial(model, hierarchy),
}


@pytest.mark.parametrize("name", JITTERED)
def test_a_machine_whose_numbers_differ_by_less_than_the_margin_decodes_the_same(name, monkeypatch):
    """With a margin so wide that it is needed: without its notes the file is refused."""
    monkeypatch.setattr(bits_back_module, "MARGIN", 2.0**-20)
    vae, x = JITTERED[name](LogisticMixture(1, 2)), levels_of(IMAGE, n=12)
    blob = Codec(vae).encode(x)
    header = read(blob).header
    (chunk,) = header.chunks
    assert sum(map(len, chunk.noted)) > 0
    for seed in range(3):
        assert torch.equal(jittered(vae, 2.0**-21, seed).decode(blob), x)
    other = rewritten(blob, chunks=(replace(chunk, noted=((), ())),))
    with pytest.raises(ValueError, match=r"other numbers|ends too early|has a level"):
        jittered(vae, 2.0**-21).decode(other)


@pytest.mark.parametrize("name", JITTERED)
@pytest.mark.parametrize("size", [2.0**-12, 1e-6])
def test_a_machine_that_computes_other_numbers_is_refused(name, size):
    """By the check word; and where that would agree by chance, by what is left on the stack."""
    vae, x = JITTERED[name](Gaussian(1)), levels_of(IMAGE, n=12)
    blob, other = Codec(vae).encode(x), jittered(vae, size)
    with pytest.raises(ValueError, match="ATEN_CPU_CAPABILITY"):
        other.decode(blob)
    other._check_reader = lambda header: None
    with pytest.raises(ValueError, match=r"other numbers|ends too early|has a level"):
        other.decode(blob)


def test_masses_that_differ_by_less_than_the_margin_code_the_same(monkeypatch):
    monkeypatch.setattr(bits_back_module, "MASS_MARGIN", 2.0**-32)
    random, values = np.random.default_rng(0), np.arange(1100, 3000)  # 3 stds

    def below(edges, size=2.0**-32):
        return stats.norm(2048, 300).cdf(edges) + size * (2 * random.random(edges.shape) - 1)

    encoder, stack = Rounding(), Stack()
    pushes = Pushes(encoder)
    code(pushes, partial(below, size=0), (4, 4, 4), len(values), values)
    pushes.onto(stack)
    assert 10 < len(encoder.noted) < 10_000
    assert (code(Pops(stack, Rounding(encoder.noted)), below, (4, 4, 4), len(values)) == values).all()


def test_a_file_of_an_older_format_is_refused():
    blob = Codec(model(flat, Gaussian(1)), check=False).encode(levels_of(IMAGE))
    with pytest.raises(ValueError, match="has format 1, this version reads 2; decode it with the version that wrote it"):
        read(blob[:7] + b"\x01" + blob[8:])


def test_whole_numbers_are_refused_with_the_scale_that_they_need():
    with pytest.raises(ValueError, match="divide the levels by 255"):
        Codec(model(flat, Gaussian(1))).encode(torch.zeros(2, *IMAGE, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (torch.zeros(1, 5, 4), "its shape is"),
        (torch.full(IMAGE, 0.3001), "off the levels"),
        (torch.full(IMAGE, 256 / 255), "levels go from"),
        (torch.full(IMAGE, torch.nan), "off the levels"),
    ],
)
def test_what_the_model_cannot_represent_is_refused_or_stored_as_it_is(example, words):
    vae, x = model(flat, Gaussian(1)), levels_of(IMAGE)
    mixed = [*x[:2], example, *x[2:]]
    with pytest.raises(ValueError, match=rf"position 2: .*{words}.*raw"):
        Codec(vae, IMAGE).encode(mixed)
    blob = Codec(vae, IMAGE, chunk=3).encode(mixed, raw=True)
    found = Codec(vae).unpack(blob)
    assert read(blob).header.raw_positions == (2,)
    assert found.positions == list(range(7))
    back = [torch.from_numpy(each) / (1 if each.dtype.kind == "f" else 255) for each in found.examples]
    assert all(np.allclose(one, other, atol=1e-7, equal_nan=True) for one, other in zip(back, mixed, strict=True))


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed():
    """A codec, eight examples, and their file in four chains with a raw example."""
    codec = Codec(model(flat, Gaussian(1)), IMAGE, chunk=2)
    x = [*levels_of(IMAGE, n=8), torch.full((1, 2, 2), 0.123)]
    return codec, x, codec.encode(x, raw=True)


def corrupted(blob, random):
    """Bytes altered, cut, repeated, inserted or exchanged."""
    at, other = (int(i) for i in random.integers(0, len(blob), 2))
    kind = random.integers(0, 6)
    if kind == 0:
        return blob[:at] + bytes([blob[at] ^ 1 << int(random.integers(0, 8))]) + blob[at + 1 :]
    if kind == 1:
        return blob[:at]
    if kind == 2:
        return blob[:at] + random.bytes(int(random.integers(1, 40))) + blob[at:]
    if kind == 3:
        return blob[: min(at, other)] + blob[max(at, other) :]
    if kind == 4:
        return blob[:at] + random.bytes(int(random.integers(1, 9))) + blob[at + 9 :]
    return blob + blob[at:]


def test_ten_thousand_corruptions_give_an_error_or_the_same_examples(packed):
    codec, x, blob = packed
    random, refused = np.random.default_rng(0), 0
    for _ in range(10_000):
        other = corrupted(blob, random)
        if other == blob:
            continue
        with pytest.raises(ValueError, match=r"damaged|no file of|format"):
            codec.unpack(other)
        refused += 1
    assert refused > 9_900
    assert len(codec.unpack(blob).examples) == len(x)


@pytest.mark.parametrize("cut", [1, 30, 60])
def test_a_truncated_file_says_which_examples_are_whole_and_gives_them(packed, cut):
    codec, x, blob = packed
    with pytest.raises(DamagedError, match=r"bytes too few; .* whole are \d of 9") as caught:
        codec.unpack(blob[:-cut])
    assert caught.value.whole == codec.unpack(blob[:-cut], "skip").positions
    assert len(caught.value.whole) < 9
    for i, example in zip(caught.value.whole, codec.unpack(blob[:-cut], "skip").examples, strict=True):
        assert torch.equal(codec._as_values(example), x[i])


def test_an_altered_part_in_the_middle_costs_its_own_examples_only(packed):
    codec, _, blob = packed
    header = read(blob).header
    start = len(blob) - sum(part.size for part in (*header.chunks, header.raw))
    at = start + header.chunks[0].size + 3
    other = blob[:at] + bytes([blob[at] ^ 255]) + blob[at + 1 :]
    with pytest.raises(DamagedError, match=r"1 of 5 parts .* 7 of 9 examples: 0-1, 4-8"):
        codec.unpack(other)
    assert codec.unpack(other, "skip").positions == [0, 1, 4, 5, 6, 7, 8]


def rewritten(blob, **entries):
    """A file with other entries in its header, and digests that fit: not damaged, but false."""
    from sigma_vae.codec.lossless import write

    opened = read(blob)
    return write(replace(opened.header, **entries), [each for each in opened.payloads if each is not None])


@pytest.mark.parametrize("entries", [{"levels": -1}, {"raw_positions": (99,)}, {"raw": None}, {"about": 3}, {"shape": (1, -4)}])
def test_headers_that_contradict_themselves_are_refused(packed, entries):
    with pytest.raises(ValueError, match="no header of coded examples"):
        read(rewritten(packed[2], **entries))


def test_a_file_for_another_shape_is_refused_before_anything_is_computed(packed):
    with pytest.raises(ValueError, match="examples of shape"):
        packed[0].unpack(rewritten(packed[2], shape=(1, 10**6, 10**6)))


def test_false_streams_give_an_error(packed):
    """Chains with fitting digests that no encoder wrote: another seed count, another order, more examples, noise."""
    codec, _, blob = packed
    header = read(blob).header
    first, second, *rest = header.chunks
    for chunks in [
        (replace(first, seeds=first.seeds + 1), second, *rest),
        (replace(first, content=second.content), second, *rest),
        (replace(first, examples=3), replace(second, examples=1), *rest),
    ]:
        with pytest.raises(ValueError, match=r"other numbers|ends too early|has a level"):
            codec.unpack(rewritten(blob, chunks=chunks))
    with pytest.raises(ValueError, match=r"other numbers|ends too early|has a level"):
        codec._unchained(first, np.random.default_rng(0).bytes(400))


# The command line ----------------------------------------------------------------------------------------------------


def test_a_run_compresses_its_own_data(digits_run, tmp_path, capsys):
    file, out = tmp_path / "x.sv", tmp_path / "out"
    assert main(["compress", str(digits_run), "--out", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["examples"], told["bytes"]) == (180, file.stat().st_size)
    assert main(["decompress", str(digits_run), str(file), "--out", str(out)]) == 0
    store = runs.open_run(digits_run, "cpu").data.test
    assert np.array_equal(np.load(out / "examples.npy"), store.take(torch.arange(180)).numpy())


@pytest.fixture(scope="module")
def picture_run(tmp_path_factory):
    """A run of 8×8 pictures with two levels, in two folders, and the folder of the pictures."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(24):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(255 * random.integers(0, 2, (8, 8)).astype(np.uint8)).save(path)
    run = tmp_path_factory.mktemp("run") / "masks"
    words = "--network mlp --likelihood bernoulli --max-steps 5 --latent-dim 2 --prior standard --device cpu"
    assert main(["train", str(folder), *words.split(), "--out", str(run), "--json"]) == 0
    return run, folder


def test_pictures_come_back_with_their_names(picture_run, tmp_path):
    run, folder = picture_run
    assert main(["compress", str(run), str(folder), "--out", str(tmp_path / "x.sv")]) == 0
    assert main(["decompress", str(run), str(tmp_path / "x.sv"), "--out", str(tmp_path / "out")]) == 0
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    assert names == sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png"))
    for name in names:
        assert np.array_equal(Image.open(folder / name), Image.open(tmp_path / "out" / name))


def test_pictures_of_another_size_or_off_the_levels_are_refused_or_stored(picture_run, tmp_path, capsys):
    run, folder = picture_run
    odd, grey, deep, colour = (tmp_path / name for name in ("odd.png", "grey.png", "deep.png", "colour.bmp"))
    random = np.random.default_rng(1)
    Image.fromarray(np.full((3, 5), 255, np.uint8)).save(odd)
    Image.fromarray(random.integers(0, 2, (8, 8)).astype(np.uint8)).save(grey)  # 0 and 1 of 255, not levels 0 and 1
    Image.fromarray(random.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(colour)
    Image.fromarray(65535 * random.integers(0, 2, (8, 8)).astype(np.uint16)).save(deep)  # two levels, but not of 8 bits
    paths = [folder / "a" / "0.png", odd, grey, deep, colour]
    words = ["compress", str(run), *map(str, paths), "--out"]
    assert main([*words, str(tmp_path / "x.sv")]) == 1
    assert "--raw yes" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "x.sv"), "--raw", "yes"]) == 0
    assert main(["decompress", str(run), str(tmp_path / "x.sv"), "--out", str(tmp_path / "out")]) == 0
    for path in paths:
        name = path.name if path.suffix == ".png" else f"{path.name}.png"
        assert np.array_equal(Image.open(path), Image.open(tmp_path / "out" / name)), path


def test_a_damaged_file_is_refused_or_its_whole_examples_restored(digits_run, tmp_path, capsys):
    file = tmp_path / "x.sv"
    assert main(["compress", str(digits_run), "--out", str(file), "--chunk", "100", "--check", "no"]) == 0
    file.write_bytes(file.read_bytes()[:-5])
    words = ["decompress", str(digits_run), str(file), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "100 of 180 examples: 0-99; --damaged skip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--damaged", "skip"]) == 0
    assert len(np.load(tmp_path / "out" / "examples.npy")) == 100


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "", None, "c:\\x.png"])
def test_names_that_lead_out_of_the_folder_are_refused(picture_run, tmp_path, capsys, name):
    run, folder = picture_run
    assert main(["compress", str(run), str(folder / "a" / "0.png"), "--out", str(tmp_path / "x.sv"), "--check", "no"]) == 0
    blob = (tmp_path / "x.sv").read_bytes()
    (tmp_path / "x.sv").write_bytes(rewritten(blob, about={"names": [name]}))
    assert main(["decompress", str(run), str(tmp_path / "x.sv"), "--out", str(tmp_path / "out")]) == 1
    assert "no name inside" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "RUN", "--out", "x.zip"], "should end in .sv"),
        (["compress", "RUN", "digits", "mnist-5k", "--out", "x.sv"], "one data set or file"),
        (["compress", "RUN", "a.jpg", "a.jpg.png", "--out", "x.sv"], "restored as a.jpg.png"),
        (["compress", "RUN", "a:b.png", "--out", "x.sv"], "no name inside"),
        (["compress", "RUN", "broken.png", "--out", "x.sv"], "cannot be kept without loss"),
        (["decompress", "RUN", "RUN/config.yaml", "--out", "out"], "no file of"),
        (["decompress", "RUN", "x.sv", "--out", "RUN"], "not an empty folder"),
    ],
)
def test_wrong_words_are_explained(digits_run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "a.jpg.png", "a:b.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(name)
    Path("broken.png").write_bytes(b"no picture")
    assert main([word.replace("RUN", str(digits_run)) for word in words]) == 1
    assert message in capsys.readouterr().err


def test_the_package_needs_no_constriction(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    Codec(model(flat, Gaussian(1)))
    with pytest.raises(ModuleNotFoundError, match="constriction"):
        Stack()
    assert Path(bits_back_module.__file__).exists()
    assert sum(LATENT_WIDTHS) == np.log2(CELLS)
