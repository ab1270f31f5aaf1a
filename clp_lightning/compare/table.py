"""The tables of a comparison, for readers and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ..tables import markdown_table, point_label
from .runs import GAPS

__all__ = ["COSTS", "flat_rows", "markdown", "terminal_tables"]

Numbers = Mapping[str, float | None]

COSTS = {
    "optimizer_steps": "optimizer steps",
    "responses": "responses",
    "sampled_tokens": "sampled tokens",
    "reward_calls": "reward calls",
    "wall_s": "training, s",
    "trained_parameters": "trained parameters",
    "models": "models",
    "forwards": "forwards a token",
}

_NOTES = """\
**V** is the objective, averaged over the grid; *value gain* is V minus that of the reference (mean
of all runs' references, one baseline for all); *worst V* the V of the point where it is least. *KL*
(nats) and *length* (tokens) are means over the grid. The hypervolume is that of the points' mean
normalised rewards above ({point}); that of the reference is of as many redraws of its responses as
there are points.

Means over seeds, with 95 % intervals from 1,000 resamples: seeds are drawn with replacement, then
prompts, each with its whole grid. All runs answered the same {prompts} prompts, so one draw serves
them all and differences are paired. A method with one seed has the noise of prompts only, and with
two or three the part of the seeds is too small. A closed gap is exact within a run: its interval is
over seeds alone, and *worst* is the least of all weightings and seeds.

**p** tests that the hypervolume equals that of {against}: within each prompt the answers to the
whole grid exchange labels between all runs of the two methods, 1,000 times; two-sided. It asks
whether *these trained policies* differ on prompts like these: what other trainings would give is in
the intervals, not in p. It is not corrected for the number of tests, and with few prompts there are
few ways to exchange labels (8 prompts, one seed each: p cannot be below 0.008).
"""

_COST_NOTES = """\
Cost is that of training one seed, without fronts and reward statistics; *training, s* is wall time.
A run that trains several copies (Rewarded Soups: the `Vertices` sampler) counts all of them, and
where a method's points come from several runs (`A+B`) their costs are added up. *Models*: networks
in memory to answer every preference, a base with all its deltas being one. *Forwards a token*:
policies that are run for every token of a response.
"""


def _columns(comparison: Mapping[str, Any]) -> dict[str, tuple[str, list[Numbers | None]]]:
    """Name: heading and a number of each method, of every column that some method has."""
    methods, against = comparison["methods"], comparison["against"]
    headings = {
        "closed_gap": "closed gap",
        "closed_gap_worst": "closed gap, worst",
        "closed_gap_unseen": "closed gap, unseen contexts",
        "closed_gap_unseen_worst": "closed gap, unseen contexts, worst",
        "value_gain": "value gain",
        "value_difference": f"V minus that of {against}",
        "worst_value": "worst V",
        "steering_gain": "steering gain",
        "consistency": "consistency",
        "envy": "envy",
    }
    found = {
        name: (heading, [method["metrics"].get(name) for method in methods])
        for name, heading in headings.items()
    }
    alphas = [volume["alpha"] for volume in methods[0]["hypervolume"]]
    for i, alpha in enumerate(alphas):
        at = f", alpha {alpha:g}" if len(alphas) > 1 else ""
        volumes = [method["hypervolume"][i] for method in methods]
        found[f"hypervolume{at}"] = f"hypervolume{at}", volumes
        found[f"p{at}"] = f"p{at}", [_p(volume["p"]) for volume in volumes]
    for name, heading in (("kl", "KL"), ("length", "length")):
        found[name] = heading, [method["metrics"].get(name) for method in methods]
    return {
        name: (heading, numbers)
        for name, (heading, numbers) in found.items()
        if any(number and number["mean"] is not None for number in numbers)
    }


def _p(value: float | None) -> Numbers:
    """Three digits are all that 1,000 permutations tell."""
    return {"mean": value and round(value, 3)}


def flat_rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of compare.csv, one for each method; None is unknown or undefined."""
    rows = []
    for i, method in enumerate(comparison["methods"]):
        row = {"method": method["label"], "seeds": len(method["runs"])}
        for name, (_, numbers) in _columns(comparison).items():
            number = numbers[i] or {}
            row[name] = number.get("mean")
            if not name.startswith("p"):
                row |= {f"{name}_{end}": number.get(end) for end in ("low", "high")}
        rows.append(row | {name: method["cost"].get(name) for name in COSTS})
    return rows


def terminal_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """What the command prints: numbers, then cost, a column for each method."""
    methods = comparison["methods"]
    title = f"{comparison['prompts']} prompts, 95 % intervals"
    tables = [Table(title=title), Table(title="Cost of one seed")]
    for table in tables:
        table.add_column("", no_wrap=True)
        for method in methods:
            table.add_column(method["label"], justify="right", overflow="fold")
    tables[0].add_row("seeds", *(str(len(method["runs"])) for method in methods))
    for heading, numbers in _columns(comparison).values():
        cells = [_shown(number).replace(" [", "\n[") for number in numbers]
        tables[0].add_row(heading, *cells)
    for name, heading in COSTS.items():
        tables[1].add_row(heading, *(_count(method["cost"].get(name)) for method in methods))
    return tables


def markdown(comparison: Mapping[str, Any], picture: bool) -> str:
    """compare.md.

    Args:
        comparison: The contents of compare.json.
        picture: Whether there is a compare.png.
    """
    methods, columns = comparison["methods"], _columns(comparison)
    body = [
        [m["label"], str(len(m["runs"])), *(_shown(numbers[i]) for _, numbers in columns.values())]
        for i, m in enumerate(methods)
    ]
    volumes = iter(comparison["reference"]["hypervolume"])
    reference = ["reference", ""] + [
        _number(next(volumes)) if name.startswith("hypervolume") else "" for name in columns
    ]
    costs = [[m["label"], *(_count(m["cost"].get(name)) for name in COSTS)] for m in methods]
    decoding = ", ".join(f"{key} {value}" for key, value in comparison["decoding"].items())
    notes = _NOTES.format(
        point=", ".join(f"{value:g}" for value in comparison["reference_point"]),
        prompts=comparison["prompts"],
        against=comparison["against"],
    )
    head = ["method", "seeds", *(heading for heading, _ in columns.values())]
    parts = [
        "# Comparison\n",
        f"{len(methods[0]['points'])} preferences, {comparison['prompts']} prompts; {decoding}.\n",
        *["![Fronts, and V by preference](compare.png)\n"] * picture,
        markdown_table(head, [*body, reference]) + "\n",
        notes,
        "## Cost\n",
        markdown_table(["method", *COSTS.values()], costs) + "\n",
        _COST_NOTES,
        *_by_preference(comparison),
        *(part for name in GAPS for part in _gaps(comparison, name)),
        "## Units\n",
        _units(comparison),
    ]
    if comparison["warnings"]:
        parts += ["## Warnings\n", "".join(f"- {text}\n" for text in comparison["warnings"])]
    return "\n".join([*parts, "## Runs\n", _runs(methods)])


def _by_preference(comparison: Mapping[str, Any]) -> list[str]:
    """V of every point, and the other methods' less it."""
    methods, names = comparison["methods"], comparison["rewards"]
    base = next(m for m in methods if m["label"] == comparison["against"])
    others = [method for method in methods if method is not base]
    head = [" / ".join(names), "alpha", f"V of {base['label']}"]
    rows = [
        [
            point_label(point, names),
            f"{point['alpha']:g}",
            _shown(point["value"]),
            *(_bold(method["points"][g]["value_difference"]) for method in others),
        ]
        for g, point in enumerate(base["points"])
    ]
    note = (
        f"V of {base['label']}, and what the other methods have more (or less) than it, paired by "
        "prompts; bold where the interval leaves 0 out.\n"
    )
    table = markdown_table([*head, *(m["label"] for m in others)], rows)
    return ["## By preference\n", f"{table}\n", note]


def _gaps(comparison: Mapping[str, Any], name: str) -> list[str]:
    """Of every point, if some method knows them."""
    methods, names = comparison["methods"], comparison["rewards"]
    known = [method for method in methods if name in method["points"][0]]
    if not known:
        return []
    rows = [
        [
            point_label(point, names),
            f"{point['alpha']:g}",
            *(_shown(method["points"][g][name]) for method in known),
        ]
        for g, point in enumerate(methods[0]["points"])
    ]
    head = [" / ".join(names), "alpha", *(method["label"] for method in known)]
    where = " on unseen contexts" if name.endswith("unseen") else ""
    return [f"## Closed gap{where} by preference\n", f"{markdown_table(head, rows)}\n"]


def _units(comparison: Mapping[str, Any]) -> str:
    """What normalised means."""

    def listed(statistics: Mapping[str, Any]) -> str:
        return "; ".join(
            f"{name} {_rounded(*pair)}" if pair else f"{name} never varies"
            for name, pair in statistics.items()
        )

    units = comparison["units"]
    said = (
        "Normalised rewards, and so V and hypervolume, are in the units of "
        f"`{units['run']}` (mean, deviation): {listed(units['statistics'])}."
    )
    if not units["renormalized"]:
        return f"{said} All runs have these.\n"
    others = "".join(f"- `{n}`: {listed(each)}\n" for n, each in units["renormalized"].items())
    return (
        f"{said} These runs were trained with others, and their raw rewards are normalised anew. "
        "Each was trained for V in its own units, so a weighting means something slightly "
        f"different to it:\n\n{others}"
    )


def _rounded(mean: float, std: float) -> str:
    """Statistics that were worked out from float32."""
    return f"{round(mean / std, 6) * std + 0:.4g}, {std:.4g}"


def _runs(methods: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for method in methods:
        runs = [f"`{run['name']}` (seed {run['seed']})" for run in method["runs"]]
        engines = {run["engine"] for run in method["runs"] if run["engine"]}
        answered = f"; answered by {', '.join(sorted(engines))}" if engines else ""
        lines.append(f"- {method['label']}: {', '.join(runs)}{answered}\n")
    return "".join(lines)


def _bold(number: Numbers) -> str:
    low, high = number["low"], number["high"]
    outside = low is not None and high is not None and not low <= 0 <= high
    return f"**{_shown(number)}**" if outside else _shown(number)


def _shown(number: Numbers | None) -> str:
    """A mean with its interval, as many digits as the interval is worth."""
    mean, low, high = ((number or {}).get(part) for part in ("mean", "low", "high"))
    if low is None or high is None or low == mean == high:
        return _number(mean)
    digits = 2
    while digits < 4 and high - low < 5 * 10.0**-digits:
        digits += 1
    return f"{_number(mean, digits)} [{low:.{digits}f}, {high:.{digits}f}]"


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
