"""Laws of the video network: the published sizes and recurrence, masks, state, predictions, and what VAE makes of clips."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from sigma_vae import VAE, Gaussian, Optimal, mlp, models, runs
from sigma_vae.cli import main
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.config import read as read_config
from sigma_vae.data import Batches, Scaling, Splits
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation.plots import reconstructed, save_clips
from sigma_vae.evaluation.quality import predictions, psnr, ssim
from sigma_vae.networks.sequence import Backbone, SequenceNetwork, State, dcgan, sequence, vgg
from sigma_vae.training import fit
from sigma_vae.training.objective import losses
from sigma_vae.types import Batch, Noise
from sigma_vae.vae import Scores, keyed_noise

BACKBONES = ("dcgan", "vgg")
VARIANTS = tuple(itertools.product(BACKBONES, (True, False)))
PAST, LENGTH, LATENT = 2, 6, 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network_of(
    backbone: str = "dcgan",
    learned: bool = True,
    out_channels: int = 1,
    channels: int = 1,
    past: int = PAST,
    spread: bool = True,
) -> SequenceNetwork:
    """A tiny one in float64, whose weights and running statistics are large enough for everything to depend on everything."""
    torch.manual_seed(0)
    network = sequence(
        (channels, 8, 8), out_channels, LATENT, 4, backbone=backbone, context_frames=past, learned_prior=learned
    ).double()
    with torch.no_grad():
        for module in network.modules() if spread else ():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.normal_(0, 1 / math.sqrt(module.weight[0].numel()))
                module.bias.normal_(0, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return network.eval()


def clips(n: int = 4, length: int = LENGTH, channels: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, length, channels, 8, 8), generator=generator).double() / 255


def noise_of(n: int, seed: int = 0) -> Noise:
    keyed = keyed_noise(torch.arange(n), seed)
    return lambda shape: keyed(shape).double()


def vae_of(network: SequenceNetwork, name: str = "gaussian/optimal", x: Tensor | None = None) -> VAE:
    vae = VAE(network, models.likelihood(name, 1)).double()
    vae.calibrate([clips(8, seed=9) if x is None else x])
    return vae.eval()


# -- published sizes -------------------------------------------------------------------------------------------------------


def conv_size(inputs: int, outputs: int, kernel: int) -> int:
    return (inputs * kernel**2 + 1) * outputs


def normed_size(inputs: int, outputs: int, kernel: int) -> int:
    """A convolution and its batch norm's gain and bias."""
    return conv_size(inputs, outputs, kernel) + 2 * outputs


def sizes(layers: list[tuple[int, int]], kernel: int) -> int:
    return sum(normed_size(*layer, kernel) for layer in layers)


DCGAN_64 = {
    "encoder": lambda c: sizes([(c, 64), (64, 128), (128, 256), (256, 512), (512, 128)], 4),
    "decoder": lambda c: sizes([(128, 512), (1024, 256), (512, 128), (256, 64)], 4) + conv_size(128, c, 4),
}
DCGAN_32 = {
    "encoder": lambda c: sizes([(c, 64), (64, 128), (128, 256), (256, 128)], 4),
    "decoder": lambda c: sizes([(128, 256), (512, 128), (256, 64)], 4) + conv_size(128, c, 4),
}
VGG_64 = {
    "encoder": lambda c: (
        sizes([(c, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)], 3)
        + sizes([(256, 512), (512, 512), (512, 512)], 3)
        + normed_size(512, 128, 4)
    ),
    "decoder": lambda c: (
        normed_size(128, 512, 4)
        + sizes([(1024, 512), (512, 512), (512, 256), (512, 256), (256, 256), (256, 128)], 3)
        + sizes([(256, 128), (128, 64), (128, 64)], 3)
        + conv_size(64, c, 3)
    ),
}
LSTM = 4 * 256 * (256 + 256 + 2)
"""Four gates, each of an input, a state and two biases."""


def linear_size(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


@pytest.mark.parametrize(
    ("backbone", "shape", "latent_dim", "layers"),
    [
        ("dcgan", (1, 64, 64), 10, DCGAN_64),
        ("dcgan", (1, 32, 32), 10, DCGAN_32),
        ("vgg", (3, 64, 64), 64, VGG_64),
        ("dcgan", (3, 64, 64), 24, DCGAN_64),
    ],
)
def test_modules_have_the_published_numbers_of_parameters(backbone, shape, latent_dim, layers) -> None:
    network = sequence(shape, shape[0], latent_dim, backbone=backbone)
    recurrence = network.recurrence
    gaussian = linear_size(128, 256) + LSTM + 2 * linear_size(256, latent_dim)
    expected = {
        network.encoder: layers["encoder"](shape[0]),
        network.decoder: layers["decoder"](shape[0]),
        recurrence.posterior: gaussian,
        recurrence.prior: gaussian,
        recurrence.predictor: linear_size(128 + latent_dim, 256) + 2 * LSTM + linear_size(256, 128),
    }
    for module, size in expected.items():
        assert sum(p.numel() for p in module.parameters()) == size
    assert sum(p.numel() for p in network.parameters()) == sum(expected.values())
    fixed = sequence(shape, shape[0], latent_dim, backbone=backbone, learned_prior=False)
    assert sum(p.numel() for p in fixed.parameters()) == sum(expected.values()) - gaussian


def test_weights_start_as_published() -> None:
    torch.manual_seed(0)
    network = sequence((1, 32, 32), 1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d):
            mean, count = float(isinstance(module, nn.BatchNorm2d)), module.weight.numel()
            weight = module.weight.detach()
            assert float(weight.mean()) == pytest.approx(mean, abs=5 * 0.02 / math.sqrt(count))
            assert float(weight.std()) == pytest.approx(0.02, rel=5 / math.sqrt(count))
            assert not module.bias.any()


@pytest.mark.parametrize("make", [dcgan, vgg])
@pytest.mark.parametrize("side", [8, 16, 32, 64, 128])
def test_a_backbone_takes_its_sizes(make: Callable[..., Backbone], side: int) -> None:
    encoder, decoder = make((3, side, side), 5, width=2, code_dim=7)
    code, skips = encoder(torch.rand(2, 3, side, side))
    assert code.shape == (2, 7)
    assert decoder(code, decoder.shares(skips), lambda share: share).shape == (2, 5, side, side)


# -- the recurrence, written as the paper has it ---------------------------------------------------------------------------


class Cells:
    """Linear layers and LSTM cells stepped one frame at a time; the gates written out."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        size = module.lstm.hidden_size
        self.state = [(torch.zeros(size).double(), torch.zeros(size).double()) for _ in range(module.lstm.num_layers)]

    def __call__(self, x: Tensor) -> Tensor:
        x = self.module.embed(x)
        for layer, (hidden, cell) in enumerate(self.state):
            own, back, bias, bias_back = self.module.lstm.all_weights[layer]
            i, f, g, o = (functional.linear(x, own, bias) + functional.linear(hidden, back, bias_back)).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            x = o.sigmoid() * cell.tanh()
            self.state[layer] = x, cell
        return x


def plain_decoder(network: SequenceNetwork, code: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
    """Concatenates the skip connections frame by frame."""
    decoder = network.decoder
    x = decoder.stem(code[:, :, None, None])
    for stage, skip in zip(decoder.stages, reversed(skips), strict=True):
        x = stage.rest(stage.convolution(torch.cat([decoder.between(x), skip], 1)))
    return x


class Loop:
    """SVG's loop over frames, in eval mode."""

    def __init__(self, network: SequenceNetwork) -> None:
        self.network = network
        recurrence = network.recurrence
        self.posterior, self.predictor = Cells(recurrence.posterior), Cells(recurrence.predictor)
        self.prior = Cells(recurrence.prior) if recurrence.prior is not None else None

    def normal(self, cells: Cells | None, code: Tensor) -> Normal:
        if cells is None:
            return Normal(torch.zeros(len(code), LATENT).double(), torch.ones(len(code), LATENT).double())
        hidden = cells(code)
        return Normal(cells.module.mean(hidden), (0.5 * cells.module.log_variance(hidden)).exp())

    def step(self, before: Tensor, after: Tensor | None, unit: Tensor) -> tuple[Tensor, Normal, Normal, Tensor]:
        code = self.network.encoder(before).code
        p = self.normal(self.prior, code)
        q = p if after is None else self.normal(self.posterior, self.network.encoder(after).code)
        z = q.mean + q.stddev * unit
        hidden = self.predictor(torch.cat([code, z], 1))
        return self.predictor.module.output(hidden).tanh(), q, p, z


@torch.no_grad()
@pytest.mark.parametrize(("backbone", "learned"), VARIANTS)
@pytest.mark.parametrize("past", [1, 2, 4])
def test_infer_is_the_published_recurrence(backbone: str, learned: bool, past: int) -> None:
    network, x, noise = network_of(backbone, learned, past=past), clips(), noise_of(4)
    loop, features, kl, log_ratio = Loop(network), [], 0.0, 0.0
    skips = network.encoder(x[:, past - 1]).skips
    for t in range(1, LENGTH):
        code, q, p, z = loop.step(x[:, t - 1], x[:, t], noise(torch.Size([4, LATENT])))
        if t >= past:
            features.append(plain_decoder(network, code, skips))
            kl = kl + kl_divergence(q, p).sum(1)
            log_ratio = log_ratio + (p.log_prob(z) - q.log_prob(z)).sum(1)
    inference = network.infer(x, noise=noise_of(4))
    torch.testing.assert_close(inference.h, torch.stack(features, 1))
    torch.testing.assert_close(inference.kl, kl[:, None])
    torch.testing.assert_close(inference.log_ratio, log_ratio)
    assert torch.equal(inference.target, x[:, past:])
    assert inference.h.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("backbone", "learned"), VARIANTS)
@pytest.mark.parametrize("past", [1, 3])
def test_predict_is_the_published_recurrence_with_frames_fed_back(backbone: str, learned: bool, past: int) -> None:
    network, x, noise = network_of(backbone, learned), clips(length=past), noise_of(4)
    loop, frames = Loop(network), []
    for t in range(1, past):
        loop.step(x[:, t - 1], x[:, t], 0.7 * noise(torch.Size([4, LATENT])))
    frame, skips = x[:, -1], network.encoder(x[:, -1]).skips
    for _ in range(4):
        code = loop.step(frame, None, 0.7 * noise(torch.Size([4, LATENT])))[0]
        frame = plain_decoder(network, code, skips).sigmoid()
        frames.append(frame)
    prediction = network.predict(x, 4, torch.sigmoid, noise_of(4), temperature=0.7)
    torch.testing.assert_close(prediction.frames, torch.stack(frames, 1))
    torch.testing.assert_close(prediction.h.sigmoid(), prediction.frames)


@torch.no_grad()
def test_context_may_come_separately() -> None:
    network, x = network_of(past=1), clips()
    whole = network_of(past=3).infer(x, noise=noise_of(4))
    mask = torch.ones(4, LENGTH - 3, dtype=torch.bool)
    for given in (None, mask):
        apart = network.infer(x[:, 3:], context=x[:, :3], mask=given, noise=noise_of(4))
        for ours, truth in zip(apart[:4], whole[:4], strict=True):
            torch.testing.assert_close(ours, truth)


@torch.no_grad()
@pytest.mark.parametrize("learned", [True, False])
def test_kl_is_the_mean_of_minus_log_ratio(learned: bool) -> None:
    network = network_of(learned=learned)
    x = clips(2).repeat_interleave(2000, 0)
    inference = network.infer(x, noise=noise_of(4000))
    for i in range(2):
        draws = -inference.log_ratio[2000 * i : 2000 * (i + 1)]
        assert float(draws.mean() - inference.kl[2000 * i, 0]) == pytest.approx(0, abs=4 * float(draws.std()) / math.sqrt(2000))


@torch.no_grad()
def test_features_and_prior_do_not_see_what_comes_later() -> None:
    """The bound is one only if p(x_t|...) knows of x_t through z_t alone, and of later frames nothing at all."""
    network, x = network_of(), clips()
    changed = x.clone()
    changed[:, 4] = 1 - changed[:, 4]
    steps = []
    for clip in (x, changed):
        codes = network.encoder(clip.flatten(0, 1)).code.unflatten(0, clip.shape[:2])
        steps.append(network.recurrence.advance(codes[:, :-1], codes[:, 1:], noise_of(4), State())[0])
    for before in (
        [s.prior.mean[:, :4] for s in steps],
        [s.drawn_from.mean[:, :3] for s in steps],
        [s.codes[:, :3] for s in steps],
    ):
        torch.testing.assert_close(*before)
    assert not torch.allclose(steps[0].drawn_from.mean[:, 3], steps[1].drawn_from.mean[:, 3])
    assert not torch.allclose(steps[0].prior.mean[:, 4], steps[1].prior.mean[:, 4])


@pytest.mark.parametrize(("backbone", "learned"), VARIANTS)
def test_gradients_reach_every_parameter(backbone: str, learned: bool) -> None:
    vae = vae_of(network_of(backbone, learned, spread=False))
    (-vae.elbo(clips()).total.mean()).backward()
    for name, parameter in vae.network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


# -- no number depends on others -------------------------------------------------------------------------------------------


def scores_in_batches(vae: VAE, x: Tensor, size: int, mask: Tensor | None = None) -> Scores:
    parts = []
    for i in torch.arange(len(x)).split(size):
        length = (
            int(mask[i].sum(1).max()) if mask is not None else x.shape[1]
        )  # as a loader that pads to the longest of a batch
        keyed = keyed_noise(i)
        noise = lambda shape, keyed=keyed: keyed(shape).double()  # noqa: E731
        parts.append(vae.score(x[i, :length], noise, None if mask is None else mask[i, :length]))
    return Scores(*(torch.cat(values) for values in zip(*parts, strict=True)))


LENGTHS = torch.tensor([6, 3, 5, 4, 6, 3])


def mask_of(lengths: Tensor = LENGTHS, length: int = LENGTH) -> Tensor:
    return torch.arange(length) < lengths[:, None]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["equal", "variable"])
@pytest.mark.parametrize("name", ["gaussian/optimal", "gaussian/per-image", "logistic-mixture:2"])
def test_no_number_depends_on_the_batch(name: str, lengths: Tensor | None) -> None:
    decoder = models.likelihood(name, 1)
    vae, x = vae_of(network_of(out_channels=decoder.in_channels), name), clips(6)
    mask = None if lengths is None else mask_of(lengths)
    whole = scores_in_batches(vae, x, 6, mask)
    for size in (1, 4):
        for ours, truth in zip(scores_in_batches(vae, x, size, mask), whole, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    frames = torch.full((6,), LENGTH) if lengths is None else lengths
    assert torch.equal(whole.dims, (frames - PAST) * 64)


def padded(x: Tensor, mask: Tensor, content: float) -> Tensor:
    return torch.where(mask[:, :, None, None, None], x, content)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("scale", [Optimal, lambda: Optimal(per="image"), lambda: Optimal(per="pixel")])
def test_padding_changes_nothing_in_training(backbone: str, scale: Callable[[], Optimal]) -> None:
    """Neither the ELBO nor its gradient, nor the optimal scale's statistic, nor those of batch norm."""
    x, mask = clips(6), mask_of()

    def trained(content: float) -> list[Tensor]:
        vae = VAE(network_of(backbone), Gaussian(1, scale(), mean="unit")).double().train()
        elbo, minimised = losses(
            vae, Batch(padded(x, mask, content), torch.arange(len(x)), mask), TrainingConfig(kl_weight=0.5)
        )
        minimised.mean().backward()
        gradients = [parameter.grad for parameter in vae.parameters()]
        return [elbo.total, elbo.kl, *gradients, *vae.state_dict().values()]

    for ours, truth in zip(trained(math.nan), trained(0.0), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, truth, rtol=0, atol=0)


def test_a_masked_batch_is_its_clips_cut_to_their_lengths() -> None:
    """The optimal σ is that of the valid values, in training and calibrated; the ELBO of a clip that of the clip alone."""
    network, x, mask = network_of(), clips(6), mask_of()
    vae = VAE(network, Gaussian(1, mean="unit")).double()
    cut = [x[i : i + 1, :length] for i, length in enumerate(LENGTHS.tolist())]
    vae.calibrate([Batch(padded(x, mask, math.nan), torch.arange(6), mask)], seed=3)
    vae.eval()
    stored = vae.likelihood.scale.density_log_scale.clone()
    with torch.no_grad():
        squares = []
        for i, clip in enumerate(cut):
            inference = network.infer(clip, noise=keyed_noise(torch.tensor([i]), 3))
            squares.append((inference.h.sigmoid() - inference.target).square().flatten())
    assert float(stored) == pytest.approx(0.5 * math.log(torch.cat(squares).mean()), rel=1e-9)
    elbo = vae.elbo(padded(x, mask, math.nan), mask=mask, noise=keyed_noise(torch.arange(6)))
    for i, clip in enumerate(cut):
        alone = vae.elbo(clip, noise=keyed_noise(torch.tensor([i])))
        torch.testing.assert_close(alone.total, elbo.total[i : i + 1])
        torch.testing.assert_close(alone.kl, elbo.kl[i : i + 1])
    vae.likelihood.train()  # the scale looks at the batch, batch norm does not
    inference = network.infer(x, mask=mask, noise=noise_of(6))
    vae.elbo(x, mask=mask, noise=noise_of(6))
    valid = mask[:, PAST:]
    truth = 0.5 * math.log((inference.h[valid].detach().sigmoid() - x[:, PAST:][valid]).square().mean())
    solved = vae.likelihood(*inference.scored()).log_scale
    assert float(solved) == pytest.approx(truth, rel=1e-9)


def test_batch_norm_sees_valid_frames_alone() -> None:
    network, x, mask = network_of().train(), clips(6), mask_of()
    before = copy.deepcopy(network)
    network.infer(x, mask=mask)
    before.encoder(x[mask])
    ours, truth = network.encoder.state_dict(), before.encoder.state_dict()
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value)


# -- state, and predictions ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_interleaved_calls_do_not_disturb_each_other() -> None:
    network = network_of()
    codes = [network.encoder(clips(seed=seed).flatten(0, 1)).code.unflatten(0, (4, LENGTH)) for seed in (1, 2)]
    together = [network.recurrence.advance(c, None, torch.zeros, State())[0].codes for c in codes]
    states, apart = [State(), State()], [[], []]
    for t, which in itertools.product(range(LENGTH), range(2)):
        steps, states[which] = network.recurrence.advance(codes[which][:, t : t + 1], None, torch.zeros, states[which])
        apart[which].append(steps.codes)
    for i in range(2):
        torch.testing.assert_close(torch.cat(apart[i], 1), together[i])
    before = network.infer(clips(), noise=noise_of(4))
    network.predict(clips(3, 2), 3, torch.sigmoid)
    for ours, truth in zip(network.infer(clips(), noise=noise_of(4))[:4], before[:4], strict=True):
        assert torch.equal(ours, truth)


def predicted(vae: VAE, seed: int = 0, frames: int = 4, temperature: float = 1.0, **options) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return vae.predict(clips(length=PAST), frames, 3, generator=generator, temperature=temperature, **options)


@torch.no_grad()
@pytest.mark.parametrize("learned", [True, False])
def test_predictions_repeat_with_their_generator_and_begin_alike(learned: bool) -> None:
    vae = vae_of(network_of(learned=learned))
    first, again, other = (predicted(vae, seed) for seed in (1, 1, 2))
    assert first.shape == (3, 4, 4, 1, 8, 8)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first[0], first[1])
    torch.testing.assert_close(predicted(vae, 1, frames=7)[:, :, :4], first)
    cold, cold_again = (predicted(vae, seed, temperature=0.0) for seed in (1, 2))
    assert torch.equal(cold, cold_again)
    torch.testing.assert_close(cold[0], cold[1])
    assert float((predicted(vae, 1, temperature=0.1) - cold).abs().mean()) < float((first - cold).abs().mean())


@torch.no_grad()
def test_each_frame_is_predicted_from_what_is_shown_of_the_last() -> None:
    vae, seen = vae_of(network_of()), []
    hook = vae.network.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    draws = vae.predict(clips(length=PAST), 3, show="draw")[0]
    hook.remove()
    for t in range(3):
        torch.testing.assert_close(seen[1 + t], draws[:, t])
    mean = vae.predict(clips(length=PAST), 1)[0]
    residual = vae.predict(clips(length=PAST).repeat(64, 1, 1, 1, 1), 1, show="draw", temperature=0.0)[0].sub(
        vae.predict(clips(length=PAST), 1, temperature=0.0)[0].repeat(64, 1, 1, 1, 1)
    )
    assert float(residual.std()) == pytest.approx(float(vae.likelihood.scale.density_log_scale.exp()), rel=0.05)
    assert mean.min() > 0
    assert mean.max() < 1


@torch.no_grad()
def test_samples_of_a_video_go_on_from_their_context() -> None:
    vae = vae_of(network_of())
    context = clips(length=PAST)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    samples = vae.sample(4, context=context, generator=seeded())
    assert samples.shape == (4, 10, 1, 8, 8)
    assert torch.equal(samples, vae.predict(context, 10, generator=seeded())[0])
    one = vae.sample(5, context=context[:1], generator=seeded())
    assert torch.equal(one, vae.predict(context[:1].expand(5, -1, -1, -1, -1), 10, generator=seeded())[0])
    h = vae.network.generate(4, context, seeded(), frames=10, show=lambda h: vae.likelihood(h).mean)
    torch.testing.assert_close(vae.likelihood(h).mean, samples, atol=1e-6, rtol=1e-6)
    assert vae.reconstruct(clips()).shape == (4, LENGTH - PAST, 1, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_batch_statistics_are_those_of_the_batch_and_leave_no_trace(training: bool) -> None:
    vae = vae_of(network_of())
    vae.network.train(training)
    before = copy.deepcopy(vae.state_dict())
    ours = predicted(vae, batch_statistics=True)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training == training for module in vae.network.modules())
    other = copy.deepcopy(vae)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(3)
    assert torch.equal(predicted(other, batch_statistics=True), ours)
    vae.network.eval()
    assert not torch.allclose(predicted(vae), ours)
    alone = vae.predict(clips(length=PAST)[:1], 2, temperature=0.0)[0]
    torch.testing.assert_close(alone, vae.predict(clips(length=PAST), 2, temperature=0.0)[0, :1])
    pair, four = (vae.predict(clips(length=PAST)[:n], 2, temperature=0.0, batch_statistics=True)[0, :2] for n in (2, 4))
    assert not torch.allclose(pair, four)


@torch.no_grad()
@pytest.mark.parametrize("past", [1, 2, 4])
def test_batch_statistics_are_those_of_one_time_step_as_in_svgs_evaluation(past: int) -> None:
    """SVG's loop, by hand: at each step encoder, posterior or prior, and recurrence see one frame of all clips."""
    network = network_of().train()  # as the published models are when they predict
    context, frames = clips(6, past), 3
    reference = copy.deepcopy(network)
    codes, state, shown = [], State(), []
    for t in range(past):
        code, skips = reference.encoder(context[:, t])
        codes.append(code[:, None])
    zero = lambda shape: torch.zeros(shape)  # noqa: E731
    for before, after in itertools.pairwise(codes):
        _, state = reference.recurrence.advance(before, after, zero, state)
    code = codes[-1]
    for _ in range(frames):
        steps, state = reference.recurrence.advance(code, None, zero, state)
        shown.append(reference.decoder(steps.codes[:, 0], reference.decoder.shares(skips), lambda share: share).sigmoid())
        code = reference.encoder(shown[-1]).code[:, None]
    found = network.eval().predict(context, frames, torch.sigmoid, zero, batch_statistics=True).frames
    torch.testing.assert_close(found, torch.stack(shown, 1))


# -- with everything else --------------------------------------------------------------------------------------------------


LIKELIHOODS = (
    "gaussian/optimal",
    "gaussian/optimal-image",
    "gaussian/per-pixel",
    "laplace/shared",
    "bernoulli",
    "categorical",
    "logistic-mixture:2",
)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_runs_unchanged(name: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig("sequence", name, latent_dim=LATENT, width=4)
    levels = 4 if name == "categorical" else 2 if name == "bernoulli" else 256
    vae = models.vae(config, (1, 8, 8), Scaling(levels))
    x = (clips(4, 5) * (levels - 1)).round().float() / (levels - 1)
    elbo = vae.train().elbo(x)
    (-elbo.total.mean()).backward()
    assert elbo.total.shape == (4,)
    assert elbo.total.isfinite().all()
    vae.calibrate([x])
    vae.eval()
    with torch.no_grad():
        assert vae.score(x).log_mass.shape == (4,)
        for show in ("mean", "draw"):
            frames = vae.predict(x[:, :2], 3, 2, show)
            assert frames.shape == (2, 4, 3, 1, 8, 8)
            assert frames.isfinite().all()


@pytest.mark.parametrize("name", ["sequence", *(f"sequence:{kind}" for kind in ("dcgan", "vgg", "dcgan-fixed", "vgg-fixed"))])
def test_a_saved_model_says_the_same(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name, latent_dim=LATENT, width=4, context_frames=3, prior="standard")
    vae, x = models.vae(config, (1, 8, 8), Scaling(256)), clips().float()
    vae.elbo(x)
    vae.calibrate([x])
    models.save(tmp_path, vae, config, (1, 8, 8), Scaling(256))
    loaded = models.load(tmp_path)
    assert loaded.config == config
    assert loaded.vae.network.context_frames == 3
    assert (loaded.vae.network.recurrence.prior is None) == name.endswith("fixed")
    noise = keyed_noise(torch.arange(4))
    again = keyed_noise(torch.arange(4))
    assert torch.equal(loaded.vae.elbo(x, noise=noise).total, vae.eval().elbo(x, noise=again).total)


@torch.no_grad()
def test_half_precision_keeps_densities_in_float32() -> None:
    vae, x = vae_of(network_of()).float(), clips().float()
    exact = vae.elbo(x, noise=keyed_noise(torch.arange(4)))
    with torch.autocast("cpu", torch.bfloat16):
        elbo = vae.elbo(x, noise=keyed_noise(torch.arange(4)))
    assert elbo.total.dtype == elbo.kl.dtype == torch.float32
    torch.testing.assert_close(elbo.kl, exact.kl, rtol=0.1, atol=0.1)


def dots(n: int, length: int, seed: int) -> Tensor:
    """A 2×2 dot on a torus of 8×8, going to the left or to the right."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 8, (n, 1, 2), generator=generator)
    velocity = torch.randint(0, 2, (n, 1, 1), generator=generator) * torch.tensor([0, 2]) - torch.tensor([0, 1])
    place = start + velocity * torch.arange(length)[:, None]
    x = torch.zeros(n, length, 1, 8, 8)
    clip, time = torch.meshgrid(torch.arange(n), torch.arange(length), indexing="ij")
    for down, right in itertools.product((0, 1), repeat=2):
        x[clip, time, 0, (place[..., 0] + down) % 8, (place[..., 1] + right) % 8] = 1
    return x


def test_a_tiny_model_learns_how_dots_move() -> None:
    torch.manual_seed(0)
    vae = VAE(sequence((1, 8, 8), 1, 4, 12), Gaussian(1, mean="unit"))
    train, test = dots(1024, 6, seed=0), dots(128, 6, seed=1)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for _ in range(240):
        optimizer.zero_grad()
        (-vae.elbo(train[torch.randint(len(train), (32,))]).total.mean()).backward()
        optimizer.step()
    vae.eval()
    with torch.no_grad():
        error = float((vae.predict(test[:, :2], 4)[0] - test[:, 2:]).square().mean())
    copied = float((test[:, 1:2] - test[:, 2:]).square().mean())
    average = float((train.mean((0, 1)) - test[:, 2:]).square().mean())
    assert error < 0.25 * copied
    assert error < 0.5 * average


MISTAKES = {
    "no clip": (lambda n, x: n.infer(x[:, 0]), "x holds clips"),
    "too short": (lambda n, x: n.infer(x[:, :2]), "none is left to predict"),
    "other clips": (lambda n, x: n.infer(x, context=x[:1]), "parts of the same clips"),
    "no context frame": (lambda n, x: n.infer(x, context=x[:, :0]), "context holds clips of at least one frame"),
    "nothing to go on from": (lambda n, x: n.predict(x[:, :0], 2, torch.sigmoid), "context holds clips of at least one frame"),
    "temperature": (lambda n, x: vae_of(n).predict(x, 2, temperature=-1.0), "at least 0, got -1"),
    "no temperature": (lambda n, x: n.predict(x, 2, torch.sigmoid, temperature=math.nan), "at least 0, got nan"),
    "no context clip": (lambda n, x: n.infer(x, context=x[:, 0]), "context holds clips"),
    "mask's shape": (lambda n, x: n.infer(x, mask=torch.ones(4, 3, dtype=torch.bool)), "one for each frame"),
    "mask's type": (lambda n, x: n.infer(x, mask=torch.ones(4, LENGTH)), "mask is of bool"),
    "gaps": (lambda n, x: n.infer(x, mask=torch.tensor([1, 1, 1, 0, 1, 1]).bool().expand(4, -1)), "without gaps"),
    "context masked": (lambda n, x: n.infer(x, mask=torch.tensor([1, 0, 0, 0, 0, 0]).bool().expand(4, -1)), "at least the 2"),
    "no context": (lambda n, x: n.generate(3), "needs context"),
    "no map": (lambda n, x: n.generate(4, x), "needs show"),
    "contexts": (lambda n, x: n.generate(3, x, show=torch.sigmoid), "1 or 3 clips"),
    "frames": (lambda n, x: n.predict(x, 0, torch.sigmoid), "at least 1, got 0"),
    "sample": (lambda n, x: vae_of(n).sample(2), "needs context"),
    "samples": (lambda n, x: vae_of(n).predict(x, 2, 0), "at least 1, got 0"),
    "sample contexts": (lambda n, x: vae_of(n).sample(3, context=x), "1 or 3 clips"),
    "show": (lambda n, x: vae_of(n).predict(x, 2, show="median"), 'show is "mean" or "draw"'),
    "encode": (lambda n, x: vae_of(n).encode(x), "SequenceNetwork has no single layer of flat latents"),
    "not a video": (lambda n, x: VAE(mlp((1, 8, 8), 1), Gaussian(1)).predict(x), "FlatNetwork predicts no frames"),
    "side": (lambda n, x: sequence((1, 28, 28), 1), "square frames"),
    "not square": (lambda n, x: sequence((1, 32, 64), 1), "square frames"),
    "backbone": (lambda n, x: sequence((1, 8, 8), 1, backbone="resnet"), "backbone is one of dcgan, vgg"),
    "context frames": (lambda n, x: sequence((1, 8, 8), 1, context_frames=0), "at least 1, got 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence(mistake: str) -> None:
    make, says = MISTAKES[mistake]
    with pytest.raises(ValueError, match=says):
        make(network_of(), clips())


def test_dims_of_still_examples_are_all_their_values() -> None:
    vae = VAE(mlp((1, 8, 8), 1, width=4), Gaussian(1))
    images = clips(4)[:, 0].float()
    vae.calibrate([images])
    assert vae.eval().score(images).dims.tolist() == [64] * 4


# -- Runs on clips through the command line, their pictures, and how predictions are judged ----------------------------

TRAIN_LENGTH, TEST_LENGTH, SIDE, GIVEN = 5, 7, 8, 2


def moving_clips(n: int, length: int, seed: int, channels: int = 1) -> torch.Tensor:
    """Noise that moves one pixel to the right a frame."""
    first = np.random.default_rng(seed).integers(0, 256, (n, 1, channels, SIDE, SIDE), dtype=np.uint8)
    return torch.from_numpy(np.concatenate([np.roll(first, t, -1) for t in range(length)], 1))


def splits(channels: int = 1) -> Splits:
    parts = [
        moving_clips(n, t, seed, channels)
        for seed, (n, t) in enumerate([(24, TRAIN_LENGTH), (8, TRAIN_LENGTH), (10, TEST_LENGTH)])
    ]
    return Splits(
        "moving noise",
        *map(InMemory, parts),
        Scaling(256),
        {"fingerprint": "made up", "counts": {}, "preprocessing": "none"},
        clips=True,
    )


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """A run on clips, trained for a moment; the data that every command reads are these."""
    with pytest.MonkeyPatch.context() as patch:
        named = models.data
        patch.setattr(models, "data", lambda config: splits() if config.source == "clips" else named(config))
        config = RunConfig(
            DataConfig("clips"),
            ModelConfig("sequence", latent_dim=3, width=4, context_frames=GIVEN),
            TrainingConfig(epochs=2, batch_size=8, log_every=1, ema_decay=0.9),
            device="cpu",
        )
        folder = tmp_path_factory.mktemp("runs") / "clips"
        runs.train(config, folder, progress=False)
        yield folder


def read(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def frames_of(path) -> list[np.ndarray]:
    """What a GIF shows each quarter of a second; frames that do not differ are one in the file."""
    with Image.open(path) as picture:
        found = []
        for t in range(picture.n_frames):
            picture.seek(t)
            found += [np.asarray(picture.convert("L"))] * round(picture.info["duration"] / 250)
        return found


def cell(canvas: np.ndarray, row: int, column: int, zoom: int) -> np.ndarray:
    """The image at a place of a grid, without its zoom."""
    small = canvas[::zoom, ::zoom]
    top, left = 1 + row * (SIDE + 1), 1 + column * (SIDE + 1)
    return small[top : top + SIDE, left : left + SIDE]


def test_a_run_on_clips_scores_what_it_predicts(moving) -> None:
    report = json.loads((moving / "evaluation.json").read_text())
    assert report["dims"] == (TEST_LENGTH - GIVEN) * SIDE**2
    assert report["context_frames"] == GIVEN
    run = runs.open_run(moving, "cpu")
    x = run.data.values("test")
    with torch.no_grad():
        inference = run.vae.network.infer(x, noise=keyed_noise(torch.arange(10)))
        mass = run.vae.likelihood.log_mass(inference.h, x[:, GIVEN:]).double().sum(1)
    bits = (inference.kl[:, 0].double() - mass) / math.log(2) / (TEST_LENGTH - GIVEN) / SIDE**2
    assert report["bits_per_dim"]["mean"] == pytest.approx(float(bits.mean()), rel=1e-5)


@pytest.mark.usefixtures("moving")
def test_longer_test_clips_are_fewer_beside_a_short_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sigma_vae.training.loop.CALIBRATION_VALUES", 1)
    config = RunConfig(
        DataConfig("clips"),
        ModelConfig("sequence", latent_dim=3, width=4, context_frames=GIVEN),
        TrainingConfig(max_steps=8, batch_size=7),
        device="cpu",
    )
    found = runs.train(config, tmp_path / "run", progress=False)
    assert found.about["sigma_fitted_on"]["examples"] == 8 * 7 // 8
    assert found.bounds.examples == 8 * 7 // 8 * TRAIN_LENGTH // TEST_LENGTH


def test_clips_are_reconstructed_a_few_at_a_time(moving, monkeypatch) -> None:
    run = runs.open_run(moving, "cpu")
    (batch,) = run.data.batches("test", 10)
    whole = reconstructed(run.vae, batch)
    monkeypatch.setattr("sigma_vae.evaluation.plots.AT_ONCE", 3 * TEST_LENGTH)
    infer, sizes = SequenceNetwork.infer, []
    monkeypatch.setattr(
        SequenceNetwork, "infer", lambda self, x, *more, **named: sizes.append(len(x)) or infer(self, x, *more, **named)
    )
    torch.testing.assert_close(reconstructed(run.vae, batch), whole)
    assert sizes == [3, 3, 3, 1]


def test_scores_of_clips_are_those_of_the_evaluation(moving, tmp_path) -> None:
    import pandas as pd

    assert main(["score", str(moving), "--out", str(tmp_path / "s.csv")]) == 0
    report, table = json.loads((moving / "evaluation.json").read_text()), pd.read_csv(tmp_path / "s.csv")
    assert len(table) == 10
    for name in ("bits_per_dim", "elbo_nats", "rate_nats"):
        assert table[name].mean() == pytest.approx(report[name]["mean"], rel=1e-5)


def test_a_run_on_clips_goes_on_where_it_stopped(moving, tmp_path) -> None:
    import shutil

    again = tmp_path / "again"
    shutil.copytree(moving, again)
    assert main(["resume", str(again), "--epochs", "3", "--json"]) == 0
    once = tmp_path / "once"
    config = read_config(moving / "config.yaml", RunConfig)
    training = TrainingConfig(epochs=3, batch_size=8, log_every=1, ema_decay=0.9)
    runs.train(RunConfig(config.data, config.model, training, config.seed, config.device), once, progress=False)
    assert (again / "evaluation.json").read_bytes() == (once / "evaluation.json").read_bytes()


def test_pictures_of_a_run_show_clips(moving) -> None:
    truth = splits().stored("test").numpy()
    strip = read(moving / "reconstructions.png")
    zoom = strip.shape[1] // (TEST_LENGTH * (SIDE + 1) + 1)
    assert strip.shape == ((16 * (SIDE + 1) + 1) * zoom, (TEST_LENGTH * (SIDE + 1) + 1) * zoom)
    for clip, t in ((0, 0), (3, 6)):
        np.testing.assert_array_equal(cell(strip, 2 * clip, t, zoom), truth[clip, t, 0])
    for t in range(GIVEN):  # what is given is shown as it is, what is predicted is not
        np.testing.assert_array_equal(cell(strip, 2 * 3 + 1, t, zoom), truth[3, t, 0])
    assert not np.array_equal(cell(strip, 2 * 3 + 1, GIVEN, zoom), truth[3, GIVEN, 0])
    samples = read(moving / "samples.png")
    np.testing.assert_array_equal(cell(samples, 5, 1, samples.shape[1] // (TEST_LENGTH * 9 + 1)), truth[5, 1, 0])
    assert len(frames_of(moving / "samples.gif")) == len(frames_of(moving / "reconstructions.gif")) == TEST_LENGTH


@pytest.mark.parametrize("command", ["sample", "reconstruct"])
@pytest.mark.parametrize("ending", ["png", "gif", "npz"])
def test_other_commands_take_clips(command: str, ending: str, moving, tmp_path) -> None:
    out = tmp_path / f"a.{ending}"
    assert main([command, str(moving), "--n", "12" if command == "sample" else "3", "--out", str(out)]) == 0
    if ending == "gif":
        assert len(frames_of(out)) == TEST_LENGTH
    if ending == "npz":
        with np.load(out) as arrays:
            made = arrays["samples" if command == "sample" else "reconstructions"]
            assert made.shape == (12 if command == "sample" else 3, TEST_LENGTH, 1, SIDE, SIDE)
            np.testing.assert_allclose(made[:3, :GIVEN], splits().stored("test")[:3, :GIVEN] / 255, atol=1e-6)
            if command == "sample":  # of ten clips the first come again, with other latents
                np.testing.assert_array_equal(made[10:, :GIVEN], made[:2, :GIVEN])
                assert not np.array_equal(made[10:, GIVEN:], made[:2, GIVEN:])


def test_predict_writes_a_strip_and_a_gif(moving, capsys) -> None:
    assert main(["predict", str(moving), "--n", "2", "--samples", "3"]) == 0
    assert capsys.readouterr().out.split() == [str(moving / f"predictions-test.{ending}") for ending in ("png", "gif")]
    strip, truth = read(moving / "predictions-test.png"), splits().stored("test").numpy()
    zoom = strip.shape[1] // (TEST_LENGTH * (SIDE + 1) + 1)
    assert strip.shape[0] == (2 * 4 * (SIDE + 1) + 1) * zoom
    for clip in range(2):
        for t in range(TEST_LENGTH):
            np.testing.assert_array_equal(cell(strip, 4 * clip, t, zoom), truth[clip, t, 0])
        for sample in range(1, 4):
            np.testing.assert_array_equal(cell(strip, 4 * clip + sample, 1, zoom), truth[clip, 1, 0])
    moved = frames_of(moving / "predictions-test.gif")
    assert len(moved) == TEST_LENGTH
    zoom = moved[0].shape[1] // (4 * (SIDE + 1) + 1)
    for t, frame in enumerate(moved):
        np.testing.assert_allclose(cell(frame, 1, 0, zoom).astype(int), truth[1, t, 0], atol=1)


def test_predict_takes_its_counts(moving, tmp_path) -> None:
    out = tmp_path / "a.npz"
    words = ["predict", str(moving), "--n", "3", "--samples", "2", "--context", "4", "--frames", "9", "--show", "draw"]
    made = []
    for seed in (0, 0, 1):
        assert main([*words, "--seed", str(seed), "--out", str(out)]) == 0
        with np.load(out) as arrays:
            made.append(arrays["predictions"])
    assert made[0].shape == (2, 3, 9, 1, SIDE, SIDE)
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    assert main([*words, "--batch-statistics", "--out", str(out)]) == 0
    with np.load(out) as arrays:
        assert not np.array_equal(made[0], arrays["predictions"])
    assert main([*words, "--out", str(tmp_path / "a.png")]) == 0
    strip = read(tmp_path / "a.png")
    zoom = strip.shape[1] // (13 * (SIDE + 1) + 1)
    assert (cell(strip, 0, 12, zoom) == 255).all()  # the clip has ended
    assert not (cell(strip, 1, 12, zoom) == 255).all()


VIDEO_MISTAKES = {
    "context": (["predict", "RUN", "--context", "8"], "from 1 to the 7 frames"),
    "nothing": (["predict", "RUN", "--frames", "0"], "at least 1, got 0"),
    "clips": (["predict", "RUN", "--n", "0"], "at least 1, got 0"),
    "ending": (["predict", "RUN", "--out", "a.jpg"], "should end in .png or .gif or .npz"),
    "codes": (["encode", "RUN"], "no single layer of flat latents"),
    "temperature": (["predict", "RUN", "--temperature", "-1", "--out", "a.gif"], "at least 0, got -1"),
    "network": (["train", "clips", "--network", "conv", "--out", "a"], "has clips, and the network conv is not for that"),
    "too short": (
        ["train", "clips", "--network", "sequence", "--context-frames", "5", "--out", "a"],
        "leaves nothing to predict",
    ),
}


@pytest.mark.parametrize("mistake", VIDEO_MISTAKES)
def test_a_mistake_about_videos_gets_a_sentence(mistake: str, moving, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, says = VIDEO_MISTAKES[mistake]
    assert main([str(moving) if word == "RUN" else word for word in words]) == 1
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_network_of_choice_for_clips_is_one_that_predicts() -> None:
    data = splits()
    vae = models.vae(ModelConfig(latent_dim=3, width=4), data.shape, data.scaling, clips=data.clips)
    assert vae.network.context_frames == GIVEN
    with pytest.raises(ValueError, match="has clips and needs a network that reads clips, got FlatNetwork"):
        fit(models.vae(ModelConfig(width=4), data.shape, data.scaling), data, device="cpu", progress=False)


def test_still_data_predict_nothing(digits_run, tmp_path, capsys) -> None:
    for words in (["predict", str(digits_run)], ["evaluate", str(digits_run), "--best-of", "2"]):
        assert main(words) == 1
        assert "predicts no frames" in capsys.readouterr().err
    assert main(["sample", str(digits_run), "--out", str(tmp_path / "a.gif")]) == 1
    assert main(["train", "digits", "--network", "sequence", "--out", str(tmp_path / "run")]) == 1
    assert "has no clips" in capsys.readouterr().err


def test_clips_of_other_channels_are_no_picture(tmp_path) -> None:
    for ending in ("png", "gif"):
        with pytest.raises(ValueError, match="1 or 3 channels"):
            save_clips(tmp_path / f"a.{ending}", torch.zeros(2, 3, 2, 4, 4))
    save_clips(tmp_path / "a.gif", torch.rand(2, 3, 3, 4, 4), columns=2)
    assert len(frames_of(tmp_path / "a.gif")) == 3


# -- how near predictions come ---------------------------------------------------------------------------------------------


def plain_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """One channel, window after window."""
    values = []
    for top in range(x.shape[0] - 6):
        for left in range(x.shape[1] - 6):
            a, b = (image[top : top + 7, left : left + 7].ravel() for image in (x, y))
            covariance = np.cov(a, b)
            c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
            light = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
            values.append(light * (2 * covariance[0, 1] + c2) / (covariance[0, 0] + covariance[1, 1] + c2))
    return float(np.mean(values))


@pytest.mark.parametrize("data_range", [1.0, 2.0])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_psnr_and_ssim_are_as_defined(batch: tuple[int, ...], data_range: float) -> None:
    random = np.random.default_rng(0)
    x = random.random((*batch, 3, 9, 11))
    y = np.clip(x + 0.2 * random.standard_normal(x.shape), 0, 1)
    ours = ssim(torch.from_numpy(x), torch.from_numpy(y), data_range), psnr(torch.from_numpy(x), torch.from_numpy(y))
    for i in np.ndindex(*batch):
        channels = list(zip(x[i], y[i], strict=True))
        assert float(ours[0][i]) == pytest.approx(np.mean([plain_ssim(a, b, data_range) for a, b in channels]), rel=1e-9)
        assert float(ours[1][i]) == pytest.approx(
            np.mean([-10 * np.log10(((a - b) ** 2).mean()) for a, b in channels]), rel=1e-9
        )
    with pytest.raises(ValueError, match="needs images of that size"):
        ssim(torch.zeros(1, 6, 9), torch.zeros(1, 6, 9))


def test_the_best_sample_is_the_one_with_the_highest_ssim(moving) -> None:
    run, samples = runs.open_run(moving, "cpu"), 4
    x = run.data.values("test")
    with torch.no_grad():
        values = []
        for sample in range(samples):
            noise = keyed_noise(torch.arange(10), 5 * samples + sample)
            shown = run.vae.network.predict(
                x[:, :GIVEN], TEST_LENGTH - GIVEN, lambda h: run.vae.likelihood(h).mean, noise
            ).frames
            pairs = [(shown[i, t], x[i, GIVEN + t]) for i in range(10) for t in range(TEST_LENGTH - GIVEN)]
            values.append([[float(psnr(*pair)), float(ssim(*pair))] for pair in pairs])
    table = np.array(values).reshape(samples, 10, TEST_LENGTH - GIVEN, 2)
    best = table[table[..., 1].mean(2).argmax(0), np.arange(10)]
    report = predictions(run.vae, run.data.batches("test", 4), samples, seed=5)
    for i, name in enumerate(("psnr_db", "ssim")):
        np.testing.assert_allclose(report[f"{name}_per_frame"], best[..., i].mean(0), rtol=1e-5)
        assert report[name]["mean"] == pytest.approx(best[..., i].mean(), rel=1e-5)
        assert report[name]["standard_error"] == pytest.approx(best[..., i].mean(1).std(ddof=1) / math.sqrt(10), rel=1e-3)
        assert report[f"{name}_average_sample"]["mean"] == pytest.approx(table[..., i].mean(), rel=1e-5)
        errors = best[..., i].std(0, ddof=1) / math.sqrt(10)
        np.testing.assert_allclose(report[f"{name}_per_frame_standard_error"], errors, rtol=1e-3)
        low, high = stats.norm.interval(0.95, best[..., i].mean(0), errors)
        np.testing.assert_allclose(report[f"{name}_per_frame_interval_95"], np.stack([low, high], 1), rtol=1e-4)
        each = best[..., i].mean(1)
        whole = stats.norm.interval(0.95, each.mean(), each.std(ddof=1) / math.sqrt(10))
        assert report[name]["interval_95"] == pytest.approx(whole, rel=1e-4)
    assert (report["clips"], report["noise_seed"]) == (10, 5)
    assert report["ssim"]["mean"] > report["ssim_average_sample"]["mean"]
    other = predictions(run.vae, run.data.batches("test", 4), samples, seed=5, batch_statistics=True)
    assert other["batch_statistics"]
    assert other["ssim"] != report["ssim"]


def test_one_clip_has_no_interval(moving) -> None:
    run = runs.open_run(moving, "cpu")
    report = predictions(run.vae, run.data.batches("test", 4, limit=1), 2)
    assert report["psnr_db"]["interval_95"] == [None, None]
    assert report["ssim_per_frame_interval_95"] == [[None, None]] * (TEST_LENGTH - GIVEN)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == report


def test_evaluate_reports_the_best_of_many(moving, capsys) -> None:
    before = (moving / "evaluation.json").read_text()
    assert main(["evaluate", str(moving), "--best-of", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["predictions"]["samples"] == 2
    assert len(report["predictions"]["ssim_per_frame"]) == TEST_LENGTH - GIVEN
    assert {name: value for name, value in report.items() if name not in ("predictions", "calibration")} == json.loads(before)
    assert main(["evaluate", str(moving), "--best-of", "2"]) == 0
    assert "psnr_db" in capsys.readouterr().out
    (moving / "evaluation.json").write_text(before)


def test_clips_of_another_range_have_no_psnr(moving) -> None:
    store = InMemory(255 * torch.rand(2, TEST_LENGTH, 1, SIDE, SIDE))
    with pytest.raises(ValueError, match=r"with values in \[0, 1\]"):
        predictions(runs.open_run(moving, "cpu").vae, Batches(store, Scaling(), 2), 1)


def test_only_a_video_network_predicts() -> None:
    vae = VAE(mlp((1, 8, 8), 1, width=4), Gaussian(1))
    with pytest.raises(ValueError, match="predicts no frames"):
        predictions(vae, splits().batches("test", 4))
