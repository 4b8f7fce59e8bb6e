"""Which runs a claim is about: a study's settings, some of them, or runs set beside each other along something else."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

from sigma_vae.config import RunConfig
from sigma_vae.study.comparisons import ARM, Done, Setting
from sigma_vae.study.words import told

__all__ = ["BATCH_SIZES", "EVERY", "FLAT", "KL_WEIGHTS", "OTHER_NETWORKS", "Among", "batch_arm", "weight_arm"]

CALIBRATED = ("gaussian/optimal", "gaussian/shared")
OTHERS = ("hierarchical", "sequence")


class Among(NamedTuple):
    """A choice of settings, and what a study lacks where there are none."""

    needs: str
    chosen: Callable[[Sequence[Setting]], Sequence[Setting]]


def weight_arm(kl_weight: float) -> str:
    """The arm of a KL weight."""
    return f"KL weight {kl_weight:g}"


def batch_arm(likelihood: str, batch_size: int) -> str:
    """The arm of a batch size."""
    return f"{likelihood}, {batch_size}"


def _is_other(setting: Setting) -> bool:
    """A ladder of latents, or a model of video."""
    return setting.network.startswith(OTHERS)


def _other_networks(found: Sequence[Setting]) -> Sequence[Setting]:
    return [replace(s, words=", ".join(filter(None, (s.words, s.network)))) for s in found if _is_other(s)]


def _by_weight(found: Sequence[Setting]) -> Sequence[Setting]:
    def same(config: RunConfig) -> Hashable:
        return replace(config, seed=0, training=replace(config.training, kl_weight=1.0))

    return _grouped(found, same, lambda config: weight_arm(config.training.kl_weight))


def _by_batch_size(found: Sequence[Setting]) -> Sequence[Setting]:
    """Of equal numbers of images: steps times batch size, or epochs."""

    def same(config: RunConfig) -> Hashable:
        training, model = config.training, replace(config.model, likelihood=CALIBRATED[0])
        if training.max_steps is not None:
            training = replace(training, max_steps=training.max_steps * training.batch_size, epochs=1)
        return replace(config, seed=0, model=model, training=replace(training, batch_size=1, validate_every=None))

    return _grouped(found, same, lambda config: batch_arm(config.model.likelihood, config.training.batch_size))


def _grouped(
    found: Sequence[Setting], same: Callable[[RunConfig], Hashable], arm_of: Callable[[RunConfig], str]
) -> Sequence[Setting]:
    """Runs with a calibrated σ, those that have the same together, where they are more than one arm."""
    import pandas as pd

    groups: dict[Hashable, list[Done]] = {}
    for done in (done for setting in found for arm in setting.arms for done in setting.of(arm)):
        if done.cell.config.model.likelihood in CALIBRATED:
            groups.setdefault(same(done.cell.config), []).append(done)
    together = []
    for group in groups.values():
        ended: dict[str, list[Done]] = {}
        for done in group:
            ended.setdefault(arm_of(done.cell.config), []).append(done)
        if len(ended) > 1:
            arms = {arm: dones[0].cell.config.model.likelihood for arm, dones in ended.items()}
            by_key = {done.cell.key: arm for arm, dones in ended.items() for done in dones}
            table = pd.concat([setting.table for setting in found])
            table = table[table["key"].isin(list(by_key))]
            table = table.assign(**{ARM: [by_key[key] for key in table["key"]]})
            together.append(Setting(_words(group, list(groups.values())), arms, found[0].priors, ended, table))
    return together


def _words(group: Sequence[Done], groups: Sequence[Sequence[Done]]) -> str:
    """What all of it have in common, and not all of the others."""
    common = {name: value for name, value in group[0].cell.place.items() if all(d.cell.place[name] == value for d in group)}
    everywhere = [name for name, value in common.items() if all(d.cell.place[name] == value for other in groups for d in other)]
    return told({name: value for name, value in common.items() if name not in (*everywhere, "seed")})


EVERY = Among("finished runs", lambda found: found)
FLAT = Among("a network with one layer of latents", lambda found: [setting for setting in found if not _is_other(setting)])
OTHER_NETWORKS = Among("a ladder of latents, or a model of video", _other_networks)
KL_WEIGHTS = Among("runs with a calibrated σ that differ in their KL weight", _by_weight)
BATCH_SIZES = Among("runs with a calibrated σ and as many images that differ in their batch size", _by_batch_size)
