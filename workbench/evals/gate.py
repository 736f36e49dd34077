"""The gate: rules in TOML that a candidate must pass, and the verdict on a comparison with a reason for each rule.

    confidence = 0.95                  # of every interval that a rule reads (default 0.95)
    min_examples = 100                 # fewer: not proven (default 1)

    [[rules]]
    kind = "better"                    # proven better: the interval of the gain lies above min_gain
    metric = "exact_match"
    min_gain = 0.0                     # in the metric's own unit (default 0)

    [[rules]]
    kind = "not_worse"                 # proven not worse by more than max_loss: the interval of the gain lies above -max_loss
    metric = "json_valid"
    max_loss = 0.02

    [[rules]]
    kind = "slices_not_worse"          # the same on every slice of a tag
    metric = "exact_match"
    tag = "slice"                      # default: the slices of all tags
    max_loss = 0.1
    min_examples = 20                  # smaller slices are not judged (default 20)

    [[rules]]
    kind = "speed_not_worse"           # proven not worse by more than max_percent
    metric = "tpot_ms"                 # ttft_ms, tpot_ms, e2e_ms, output_tokens_per_s
    max_percent = 20.0

A rule passes when its interval proves it, refuses when the loss is proven (for slices: after Holm's correction over them) and the
estimate is beyond what the rule allows, and is not proven otherwise. Verdict: *refuse* if any rule refuses, else *not proven* if
any is not proven, else *promote*. A candidate that is truly worse by the allowed loss passes a rule on right/wrong scores with a chance of about
(1 - confidence) / 2, and all rules together with no more than the least of them.

Boundary: reads rules and judges. Running the comparison and moving aliases is `workbench.evals.gate_job`'s.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from workbench.evals.errors import GateRulesError, UnknownMetricError
from workbench.evals.report import Comparison, PairedMetric
from workbench.evals.scorers import Metric
from workbench.evals.speed import SPEED_METRICS, SpeedMetric
from workbench.evals.statistics import CONFIDENCE, holm


class Verdict(str, Enum):
    PROMOTE = "promote"
    NOT_PROVEN = "not proven"
    REFUSE = "refuse"


class RuleKind(str, Enum):
    BETTER = "better"
    NOT_WORSE = "not_worse"
    SLICES_NOT_WORSE = "slices_not_worse"
    SPEED_NOT_WORSE = "speed_not_worse"


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the gate. `allowed`: min_gain, max_loss, or max_percent."""

    kind: RuleKind
    metric: str
    allowed: float
    tag: str | None = None
    min_examples: int = 20


@dataclass(frozen=True, slots=True)
class GateRules:
    rules: tuple[Rule, ...]
    confidence: float = CONFIDENCE
    min_examples: int = 1
    source: str = ""

    @property
    def metrics(self) -> list[str]:
        """Quality metrics that the rules need, each once, in order."""
        return list(dict.fromkeys(r.metric for r in self.rules if r.kind is not RuleKind.SPEED_NOT_WORSE))

    @property
    def needs_speed(self) -> bool:
        return any(rule.kind is RuleKind.SPEED_NOT_WORSE for rule in self.rules)


@dataclass(frozen=True, slots=True)
class Reason:
    """What one rule found, in plain words. `outcome`: the verdict that this rule alone would give."""

    rule: str
    outcome: Verdict
    text: str

    def to_dict(self) -> dict[str, str]:
        return {"rule": self.rule, "outcome": self.outcome.value, "text": self.text}


@dataclass(frozen=True, slots=True)
class Decision:
    verdict: Verdict
    reasons: tuple[Reason, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict.value, "reasons": [reason.to_dict() for reason in self.reasons]}


# ── reading rules ───────────────────────────────────────────────────────────────────────────────────────────────────────

_LIMITS = {
    RuleKind.BETTER: ("min_gain", 0.0),
    RuleKind.NOT_WORSE: ("max_loss", None),
    RuleKind.SLICES_NOT_WORSE: ("max_loss", None),
    RuleKind.SPEED_NOT_WORSE: ("max_percent", None),
}


def default_rules_path() -> Path:
    """The rules that come with the project."""
    from workbench.settings import data_dir

    return data_dir() / "gates" / "default.toml"


def load_rules(path: str | Path | None = None) -> GateRules:
    """Read a rules file; None: the one that comes with the project.

    Raises:
        GateRulesError: naming the file, the rule and what is wrong with it.
    """
    file = Path(path).expanduser() if path is not None else default_rules_path()
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise _wrong(
            f"the rules {str(file)!r} cannot be read: {error.strerror or error}", str(file)
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _wrong(f"{file.name} is not TOML: {error}", str(file)) from error
    return parse_rules(values, source=str(file))


def parse_rules(values: Mapping[str, Any], *, source: str = "rules") -> GateRules:
    """Check the values of a rules file. Raises GateRulesError."""
    unknown = sorted(set(values) - {"confidence", "min_examples", "rules"})
    if unknown:
        raise _wrong(f"{source}: unknown setting {unknown[0]!r}", unknown[0])
    tables = values.get("rules")
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise _wrong(f"{source}: there must be at least one [[rules]] table", tables)
    confidence = _number(values.get("confidence", CONFIDENCE), f"{source}: confidence", 0.5, 0.9999)
    rules = tuple(_rule(table, f"{source}, rule {i}") for i, table in enumerate(tables, start=1))
    return GateRules(
        rules, confidence, int(_number(values.get("min_examples", 1), f"{source}: min_examples", 1)), source
    )


def fitting_rules(metrics: Sequence[Metric], *, has_slices: bool, speed: bool) -> GateRules:
    """Rules for a comparison that names none: the project's own where they fit, else the same shape on its own metrics.

    The first metric must be better, on no slice worse by more than 0.1, the other bounded ones not worse by more than 0.02.
    Without a measurement of speed there is no rule on it.
    """
    names = [metric.name for metric in metrics]
    bundled = load_rules()
    if has_slices and set(bundled.metrics) <= set(names):
        rules = tuple(r for r in bundled.rules if speed or r.kind is not RuleKind.SPEED_NOT_WORSE)
        return replace(bundled, rules=rules)
    rules = (Rule(RuleKind.BETTER, names[0], 0.0),)
    rules += tuple(Rule(RuleKind.NOT_WORSE, m.name, 0.02) for m in metrics[1:] if m.bound is not None)
    if has_slices and metrics[0].bound is not None:
        rules += (Rule(RuleKind.SLICES_NOT_WORSE, names[0], 0.1),)
    if speed:
        rules += (Rule(RuleKind.SPEED_NOT_WORSE, "tpot_ms", 20.0),)
    return GateRules(rules, source="the comparison's own metrics")


def check_rules(rules: GateRules, metrics: Iterable[str]) -> None:
    """Refuse rules that name no metric of the comparison, before anything runs. Raises UnknownMetricError."""
    known = list(metrics)
    for number, rule in enumerate(rules.rules, start=1):
        places = list(SPEED_METRICS) if rule.kind is RuleKind.SPEED_NOT_WORSE else known
        if rule.metric not in places:
            raise UnknownMetricError(
                f"rule {number} ({rule.kind.value}) names the metric {rule.metric!r}, which this comparison does not have",
                value=rule.metric, limit=places, param="metric", remedy=f"Metrics: {', '.join(places)}.",
            )  # fmt: skip


def _rule(table: Mapping[str, Any], where: str) -> Rule:
    try:
        kind = RuleKind(table.get("kind"))
    except ValueError as error:
        kinds = [kind.value for kind in RuleKind]
        raise _wrong(f"{where}: kind must be one of {', '.join(kinds)}", table.get("kind"), kinds) from error
    limit, default = _LIMITS[kind]
    allowed_keys = {"kind", "metric", limit} | (
        {"tag", "min_examples"} if kind is RuleKind.SLICES_NOT_WORSE else set()
    )
    unknown = sorted(set(table) - allowed_keys)
    if unknown:
        raise _wrong(
            f"{where} ({kind.value}): unknown setting {unknown[0]!r}", unknown[0], sorted(allowed_keys)
        )
    metric, tag = table.get("metric"), table.get("tag")
    if not isinstance(metric, str) or not metric:
        raise _wrong(f"{where} ({kind.value}): metric must name a metric", metric)
    if tag is not None and not isinstance(tag, str):
        raise _wrong(f"{where} ({kind.value}): tag must be a text", tag)
    return Rule(
        kind,
        metric,
        _number(table.get(limit, default), f"{where} ({kind.value}): {limit}", 0.0),
        tag,
        int(_number(table.get("min_examples", 20), f"{where}: min_examples", 1)),
    )


def _number(value: Any, what: str, low: float, high: float | None = None) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value < low or (high is not None and value > high) or value != value:
        accepted = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise _wrong(f"{what} must be a number {accepted}, got {value!r}", value, accepted)
    return float(value)


def _wrong(message: str, value: Any, limit: Any = None) -> GateRulesError:
    return GateRulesError(
        message, value=value, limit=limit, param="rules", remedy="data/gates/default.toml shows every kind of rule."
    )  # fmt: skip


# ── judging ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def decide(rules: GateRules, comparison: Comparison) -> Decision:
    """The verdict on B of a comparison that was made with the rules' confidence.

    Raises:
        UnknownMetricError: a rule names no metric of the comparison.
    """
    check_rules(rules, comparison.metrics)
    assert comparison.confidence == rules.confidence, (comparison.confidence, rules.confidence)
    reasons = [_judge(rule, comparison) for rule in rules.rules]
    if comparison.n < rules.min_examples:
        text = f"There are {comparison.n} examples; the gate asks for at least {rules.min_examples}."
        reasons.append(Reason("min_examples", Verdict.NOT_PROVEN, text))
    outcomes = {reason.outcome for reason in reasons}
    verdict = next((v for v in (Verdict.REFUSE, Verdict.NOT_PROVEN) if v in outcomes), Verdict.PROMOTE)
    return Decision(verdict, tuple(reasons))


def _judge(rule: Rule, comparison: Comparison) -> Reason:
    if rule.kind is RuleKind.SPEED_NOT_WORSE:
        return _judge_speed(rule, comparison.speed.get(rule.metric))
    if rule.kind is RuleKind.SLICES_NOT_WORSE:
        return _judge_slices(rule, comparison)
    return _judge_metric(rule, comparison.metrics[rule.metric])


def _judge_metric(rule: Rule, metric: PairedMetric) -> Reason:
    name = f"{rule.kind.value} {rule.metric}"
    needed = rule.allowed if rule.kind is RuleKind.BETTER else -rule.allowed
    low, figures = metric.gain_low, _figures(metric)
    passes = low is not None and low > needed
    if rule.kind is RuleKind.BETTER:
        passes = passes and metric.proven
    if passes:
        what = "is better" if rule.kind is RuleKind.BETTER else f"is not worse by more than {rule.allowed:g}"
        return Reason(name, Verdict.PROMOTE, f"{metric.name} {what}: {figures}.")
    if metric.outcome == "worse" and metric.gain < needed:
        return Reason(name, Verdict.REFUSE, f"{metric.name} is worse: {figures}.")
    text = f"{metric.name} is not proven to be "
    text += (
        f"better{f' by more than {rule.allowed:g}' if rule.allowed else ''}"
        if rule.kind is RuleKind.BETTER
        else f"at most {rule.allowed:g} worse"
    )
    return Reason(name, Verdict.NOT_PROVEN, f"{text}: {figures}.{_advice(rule, metric)}")


def _advice(rule: Rule, metric: PairedMetric) -> str:
    needed = metric.examples_needed
    if rule.kind is RuleKind.BETTER and metric.gain > 0 and needed is not None and needed > metric.n:
        return f" About {needed} examples would prove a difference of this size."
    return ""


def _judge_slices(rule: Rule, comparison: Comparison) -> Reason:
    name = f"slices_not_worse {rule.metric}"
    family = [
        s
        for s in comparison.slices
        if s.name == rule.metric
        and s.n >= rule.min_examples
        and (rule.tag is None or str(s.slice).partition("=")[0] == rule.tag)
    ]
    if not family:
        which = f"of the tag {rule.tag!r}" if rule.tag else "at all"
        text = f"There are no slices {which} with at least {rule.min_examples} examples to judge {rule.metric} on."
        return Reason(name, Verdict.NOT_PROVEN, text)
    adjusted = holm([s.p_value for s in family])
    worst = min(family, key=lambda s: s.gain)
    for s, p_value in sorted(zip(family, adjusted, strict=True), key=lambda pair: pair[0].gain):
        if p_value <= 1 - comparison.confidence and s.gain < -rule.allowed:
            text = f"On {s.slice} {s.name} is worse by more than the allowed {rule.allowed:g}: {_figures(s)}"
            return Reason(name, Verdict.REFUSE, f"{text}, p = {p_value:.2g} over {len(family)} slices.")
    unproven = [s for s in family if s.gain_low is None or s.gain_low <= -rule.allowed]
    if unproven:
        first = min(unproven, key=lambda s: s.gain_low if s.gain_low is not None else float("-inf"))
        text = f"{len(unproven)} of {len(family)} slices are not proven to be at most {rule.allowed:g} worse, first {first.slice}"
        return Reason(name, Verdict.NOT_PROVEN, f"{text}: {_figures(first)}.")
    text = f"{rule.metric} is not worse by more than {rule.allowed:g} on any of {len(family)} slices; the least, {worst.slice}"
    return Reason(name, Verdict.PROMOTE, f"{text}: {_figures(worst)}.")


def _judge_speed(rule: Rule, metric: SpeedMetric | None) -> Reason:
    name = f"speed_not_worse {rule.metric}"
    if metric is None or metric.percent_low is None or metric.percent_high is None:
        return Reason(name, Verdict.NOT_PROVEN, f"{rule.metric} was not measured.")
    figures = (
        f"{metric.a:.3g} → {metric.b:.3g} {metric.unit}, "
        f"{metric.percent:+.1f} % [{metric.percent_low:+.1f}, {metric.percent_high:+.1f}]"
    )
    least, most = metric.percent_low, metric.percent_high
    if metric.higher_is_better:
        least, most = -most, -least
    if most <= rule.allowed:
        text = f"{rule.metric} is not worse by more than {rule.allowed:g} %: {figures}."
        return Reason(name, Verdict.PROMOTE, text)
    if least > rule.allowed:
        text = f"{rule.metric} is worse by more than the allowed {rule.allowed:g} %: {figures}."
        return Reason(name, Verdict.REFUSE, text)
    text = f"{rule.metric} is not proven to be at most {rule.allowed:g} % worse: {figures}."
    return Reason(name, Verdict.NOT_PROVEN, text)


def _figures(metric: PairedMetric) -> str:
    limits = (
        "no interval"
        if metric.low is None or metric.high is None
        else f"{metric.low:+.3g} to {metric.high:+.3g}"
    )
    return f"{metric.a:.3g} → {metric.b:.3g}, difference {metric.diff:+.3g} [{limits}], n = {metric.n}"
