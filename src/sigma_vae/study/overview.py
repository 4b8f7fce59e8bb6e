"""What several studies say of each claim, on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sigma_vae.study.claims import CLAIMS
from sigma_vae.study.comparisons import settings
from sigma_vae.study.folder import spec_of
from sigma_vae.study.judging import Word
from sigma_vae.study.sections import HOW
from sigma_vae.study.templates import SIGNS, template

__all__ = ["verdicts"]


class Found(NamedTuple):
    """One verdict: the study, and what in it."""

    study: str
    setting: str
    word: Word
    finding: str

    @property
    def where(self) -> str:
        """The study, and its setting where it has several."""
        return f"{self.study} ({self.setting})" if self.setting else self.study


class Judged(NamedTuple):
    """A claim with all that was found."""

    name: str
    sentence: str
    rule: str
    found: tuple[Found, ...]

    def among(self, word: str) -> list[str]:
        """The studies with this verdict, and in brackets their settings where they have several.

        >>> found = (Found("a", "batch 16", "holds", ""), Found("a", "batch 64", "holds", ""), Found("b", "", "does not", ""))
        >>> Judged("1", "", "", found).among("holds"), Judged("1", "", "", found).among("does not")
        (['a (batch 16, batch 64)'], ['b'])
        """
        settings: dict[str, list[str]] = {}
        for found in self.found:
            if found.word == word:
                settings.setdefault(found.study, []).append(found.setting)
        inside = {study: ", ".join(dict.fromkeys(filter(None, names))) for study, names in settings.items()}
        return [f"{study} ({names})" if names else study for study, names in inside.items()]


def verdicts(studies: Sequence[Path]) -> str:
    """A page in Markdown: each claim with the studies in which it holds, does not, or is not shown, the numbers, and the rule.

    It is made from the same files as :func:`~sigma_vae.study.report`, and says nothing that their reports do not. Claims that no study has
    measured are named at the end.

    Args:
        studies: their folders; the page calls them by the folders' names.

    Raises:
        ValueError: none is given, one is no study's folder, or of one no cell has ended.
    """
    if not studies:
        raise ValueError("no study is given; name the folders of some: sigma-vae study verdicts docs/studies/*")
    specs = {study: spec_of(study) for study in studies}
    measured = {study: settings(spec, study) for study, spec in specs.items()}
    judged = [
        Judged(
            claim.name,
            claim.sentence,
            claim.rule,
            tuple(
                Found(study.name, setting, verdict.word, verdict.finding)
                for study, found in measured.items()
                for setting, verdict in claim.verdicts(found)
                if not verdict.lacks
            ),
        )
        for claim in CLAIMS
    ]
    return template("verdicts.md.j2", escape=False).render(
        studies={study.name: spec.title for study, spec in specs.items()},
        claims=[claim for claim in judged if claim.found],
        missing=[claim for claim in judged if not claim.found],
        signs=SIGNS,
        how=HOW,
    )
