"""What to compare: two versions, a dataset, scorers, how many examples. Bound to the address; starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.ui import markup
from workbench.ui.glossary import tip
from workbench.ui.registry_view import CHAMPION

if TYPE_CHECKING:
    from workbench.versions.registry import VersionInfo


@dataclass(frozen=True, slots=True)
class Choice:
    """What the form says. No scorers means the dataset's own; no limit means every example."""

    a: str
    b: str
    dataset: str
    scorers: tuple[str, ...]
    limit: int | None
    seed: int
    speed: bool
    gate: str | None
    divergence: bool = False

    def spec(self) -> dict[str, Any]:
        """The job's spec."""
        given: dict[str, Any] = {
            "a": self.a, "b": self.b, "dataset": self.dataset, "seed": self.seed, "speed": self.speed, "gate": self.gate,
        }  # fmt: skip
        if self.scorers:
            given["scorers"] = list(self.scorers)
        if self.limit is not None:
            given["limit"] = self.limit
        if self.divergence:
            given["divergence"] = True
        return given

    @property
    def title(self) -> str:
        return f"{self.a} against {self.b} on {self.dataset}"


def default_pair(refs: Sequence[str], champion: str | None) -> tuple[str, str]:
    """A is the champion or the first; B the lowest other version above it, else any other."""
    a = champion if champion is not None and champion in refs else refs[0]
    name = a.partition("/")[0]
    others = [ref for ref in refs if ref != a]
    own = [ref for ref in others if ref.partition("/")[0] == name and _number(ref) > _number(a)]
    ranked = sorted(own, key=_number) or others or [a]
    return a, ranked[0]


def _number(ref: str) -> int:
    tail = ref.partition("/")[2]
    return int(tail) if tail.isdigit() else 0


def show(
    known: Mapping[str, VersionInfo],
    champion: str | None,
    datasets: Sequence[str],
    scorers: Sequence[str],
    endpoints: Sequence[str] = (),
) -> Choice:
    """Render the form. `known` (by `NAME/VERSION`) and `datasets` must not be empty; others than those may be typed.

    `endpoints`: ids of their models, offered beside the versions.
    """
    first, second = default_pair(list(known), champion)
    a = _version("A, the version to beat", "a", known, endpoints, first, f"Mostly the @{CHAMPION}.")
    told = "A registered version, a folder, a hub id, or a model of an endpoint."
    b = _version("B, the candidate", "b", known, endpoints, second, told)
    dataset = st.selectbox(
        "Dataset", list(datasets), key="dataset", bind="query-params", accept_new_options=True,
        help="A bundled one, one in HOME_DIR/datasets, or the path of a JSONL file.",
    )  # fmt: skip
    limit = st.number_input(
        "Examples at most", 1, None, None, key="examples", bind="query-params", placeholder="all",
        help="The same ones each time, chosen by their ids.",
    )  # fmt: skip
    with st.expander("Scorers, speed and gate"):
        chosen = st.multiselect(
            "Scorers", list(scorers), key="scorers", bind="query-params", placeholder="the dataset's own"
        )
        speed = st.toggle(
            "Measure speed too",
            key="speed",
            bind="query-params",
            help="Each version alone, in alternating blocks.",
        )
        divergence = st.toggle(
            "Compare token distributions", key="divergence", bind="query-params", help=tip("kl")
        )
        gate = st.text_input(
            "Gate rules",
            key="gate",
            bind="query-params",
            placeholder="the default rules",
            help=f"{tip('gate')} A TOML file.",
        )
        seed = st.number_input(
            "Seed", 0, 2**31, 0, key="compare_seed", bind="query-params", help="Of the bootstrap."
        )
    return Choice(
        a, b, dataset or datasets[0], tuple(chosen), limit, seed, speed, (gate or "").strip() or None, divergence
    )  # fmt: skip


def _version(
    label: str, key: str, known: Mapping[str, VersionInfo], endpoints: Sequence[str], default: str, help: str
) -> str:
    refs = [*known, *endpoints]
    chosen = st.selectbox(
        label,
        refs,
        index=refs.index(default),
        key=key,
        bind="query-params",
        accept_new_options=True,
        help=help,
    )
    info = known.get(chosen or "")
    if info is not None:
        st.html(markup.version_name(info.ref.name, info.ref.version, info.ref.digest, info.aliases))
    return str(chosen or default)
