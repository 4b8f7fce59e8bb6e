"""A user's own networks, registered by an installed package's entry points, on every command of the README."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = '''
"""Two networks: one with every capability of flat latents, and one with nothing but what the contract asks for."""

from sigma_vae.networks import mlp
from sigma_vae.types import Network


class Bare(Network):
    """A network that only trains and generates."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def latents(self):
        return self.inner.latents

    def infer(self, x, context=None, mask=None, noise=None, condition=None):
        return self.inner.infer(x, context, mask, noise)

    def generate(self, n, context=None, generator=None, temperature=1.0, condition=None):
        return self.inner.generate(n, context, generator, temperature)


class Whole(Bare):
    """A network that also encodes, decodes and takes another prior."""

    def posterior(self, x, condition=None):
        return self.inner.posterior(x)

    def decode(self, z, condition=None):
        return self.inner.decode(z)

    @property
    def prior(self):
        return self.inner.prior

    def replace_prior(self, prior):
        self.inner.replace_prior(prior)


def bare(shape, out_channels, latent_dim=4, width=16):
    """A network of a test that keeps its latents to itself."""
    return Bare(mlp(shape, out_channels, latent_dim=latent_dim, width=width))


def whole(shape, out_channels, latent_dim=4, width=16):
    """A network of a test with a posterior and a prior."""
    return Whole(mlp(shape, out_channels, latent_dim=latent_dim, width=width))
'''

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
import json, sys, torch
from sigma_vae.cli import main
torch.set_num_threads(1)
codes = [main(words) for words in json.loads(sys.argv[1])]
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package that has both networks."""
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "own_networks.py").write_text(PACKAGE)
    info = folder / "own_networks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-networks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sigma_vae.networks]\nbare = own_networks:bare\nwhole = own_networks:whole\n")
    return folder


def run(installed: Path, folder: Path, commands: list[list[str]]) -> tuple[list[int], str]:
    """Exit codes of these commands, run in this folder by one process that sees the package; and all that they printed."""
    paths = os.pathsep.join([str(installed), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout + result.stderr


def named(network: str, prior: str) -> list[list[str]]:
    return [[{"NETWORK": network, "PRIOR": prior}.get(word, word) for word in words] for words in README]


def test_a_whole_network_passes_every_command(installed: Path, tmp_path: Path) -> None:
    codes, said = run(installed, tmp_path, named("whole", "mixture"))
    assert codes == [0] * len(README), said
    first, again = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("first", "again"))
    assert first["prior"].startswith("mixture:")
    assert again["elbo_nats"] == first["elbo_nats"]
    assert first["information"]
    model = json.loads((tmp_path / "first" / "model" / "model.json").read_text())
    assert model["packages"]["network"] == "own-networks"


def test_a_bare_network_passes_every_command_but_those_of_its_latents(installed: Path, tmp_path: Path) -> None:
    codes, said = run(installed, tmp_path, named("bare", "standard"))
    refused = [words[0] for words, code in zip(README, codes, strict=True) if code]
    assert refused == ["encode", "fit-prior"], said
    assert "does not define posterior(x)" in said
    assert "single layer of flat latents" in said


def test_help_and_errors_know_the_networks_of_packages(installed: Path, tmp_path: Path) -> None:
    script = SCRIPT.replace("[main(words) for words in json.loads(sys.argv[1])]", "0; main(['train', '--help'])")
    paths = os.pathsep.join([str(installed), *filter(None, sys.path)])
    env = os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"}
    told = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True, timeout=120)
    assert "- whole: A network of a test with a posterior" in told.stdout
    _, said = run(installed, tmp_path, [["train", "digits", "--network", "whle"]])
    assert "did you mean 'whole'?" in said
    _, said = run(tmp_path, tmp_path, [["train", "digits", "--network", "whole"]])
    assert "there is no network 'whole'" in said


def test_a_run_names_the_package_that_is_missing(installed: Path, tmp_path: Path) -> None:
    commands = [["train", "digits", "--network", "whole", "--max-steps", "2", "--out", "run"]]
    assert run(installed, tmp_path, commands)[0] == [0]
    codes, said = run(tmp_path, tmp_path, [["sample", "run"], ["evaluate", "run"]])
    assert codes == [1, 1]
    assert "comes from the package own-networks" in said
