"""The command ``pick``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from rich.table import Table

from ..described import rebuild
from ..functional import check_alpha, write_weights
from ..metrics import Estimate, Grid
from ..rewards import Reward, RewardBank
from ..steerable import SteerablePolicy
from ..steerable.checkpoint import read_rewards, run_folder
from ..tables import print_table
from ..types import Preference, PromptBatch
from .measure import Measured, Meter, first_prompts, quantities_of
from .search import Wish, check_quantity, find_preference, parse_wishes

__all__ = ["pick"]

_STARTS = 6  # points of a front that are measured again


def pick(
    ckpt: str,
    maximize: str,
    where: str = "",
    prompts: str | None = None,
    search_prompts: int = 48,
    check_prompts: int = 96,
    samples: int = 1,
    evaluations: int = 16,
    alphas: list[float] | None = None,
    margin: float = 1.64,
    rows: int = 128,
    seed: int = 0,
    base: str | None = None,
    device: str | None = None,
) -> None:
    """Finds the preference that gives the most of one reward under floors and ceilings on others.

    It asks the policy itself: on training prompts while it searches, and on held-out ones to say
    what came of it. Ends with status 1 where the wishes cannot all be met, or are missed on the
    held-out prompts by more than the interval.

    Args:
        ckpt: A run's folder or a .ckpt file, which knows its rewards.
        maximize: A reward (or ``kl``, ``length``).
        where: Floors and ceilings on means of raw rewards, of ``kl`` (nats) or ``length``
            (tokens), as in "support>=0.5,length<=12".
        prompts: A data source instead of the run's own, half of it for the search.
        search_prompts: Prompts of the search; as many others decide among the best few.
        check_prompts: Held-out prompts that the result is measured on.
        samples: Responses per prompt and preference.
        evaluations: Preferences to try after the first ones.
        alphas: Least and largest alpha to consider; those of training if left out.
        margin: Standard errors by which a mean must be better than its bound in the search.
        rows: Responses that are sampled at once.
        seed: Key of all draws.
        base: Where the base lies, if not where the run says.
        device: Where to compute; the first GPU if there is one, else the CPU.
    """
    for name, number, least in (
        ("search_prompts", search_prompts, 1),
        ("check_prompts", check_prompts, 2),
        ("samples", samples, 1),
        ("evaluations", evaluations, 0),
        ("rows", rows, 1),
        ("seed", seed, 0),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}; got {number}.")
    rewards = RewardBank(
        {
            name: reward if isinstance(reward, str) else rebuild(reward, Reward)
            for name, reward in read_rewards(ckpt).items()
        }
    )
    quantities = quantities_of(rewards.names)
    check_quantity(maximize, quantities)
    wishes = parse_wishes(where, quantities)
    data = _data(run_folder(ckpt) / "config.yaml", prompts)
    search_batch, check_batch = _batches(data, 2 * search_prompts, check_prompts)
    policy = SteerablePolicy.from_pretrained(ckpt, base=base, device=device)
    rewards.to(policy.policy.model.device)
    low_high = _alphas(policy, alphas)
    settings: dict[str, Any] = {"samples": samples, "rows": rows, "seed": seed}
    needs_kl = "kl" in (maximize, *(wish.quantity for wish in wishes))
    half = (len(search_batch) + 1) // 2
    meter, confirm = (
        Meter(policy, rewards, search_batch.select(part), with_kl=needs_kl, **settings)
        for part in (range(half), range(half, len(search_batch)))
    )
    starts = _starts(policy, maximize, wishes, low_high)
    print(f"searching on {half} prompts, {len(starts)} starts", file=sys.stderr)
    found = find_preference(
        meter, confirm, maximize, wishes, starts, low_high, evaluations=evaluations, margin=margin
    )
    best = found[0]
    if isnan(_mean(best, quantities, maximize)):
        raise ValueError(
            f"Reward '{maximize}' scored none of the responses; look at the columns that it reads."
        )
    print(f"checking on {len(check_batch)} held-out prompts", file=sys.stderr)
    (checked,) = Meter(policy, rewards, check_batch, **settings).measure(best.preference)
    estimates = dict(zip(quantities, checked.estimates(), strict=True))
    print(f"pick: {_options(policy.names, checked.preference)}")
    _report(maximize, wishes, estimates, len(check_batch))
    missed = [w for w in wishes if not w.shortfall(_mean(best, quantities, w.quantity)) <= 0]
    if missed:
        _report_infeasible(quantities, missed, found)
    elif missed := [w for w in wishes if not _reaches(w, estimates[w.quantity])]:
        print(
            f"not confirmed: {', '.join(map(str, missed))}, met in the search, is missed on the "
            "held-out prompts; a larger --margin or more --search_prompts are safer"
        )
    if missed:
        sys.exit(1)


def _data(config: Path, prompts: str | None) -> Any:
    """The run's data module, or one on another source."""
    settings: dict[str, Any] = {"class_path": "clp_lightning.PromptDataModule", "init_args": {}}
    if config.is_file():
        settings = yaml.safe_load(config.read_text())["data"]
    elif prompts is None:
        raise ValueError(f"There is no {config} that says which data the run had: give --prompts.")
    if prompts is not None:
        own = {"source": prompts, "holdout": 0.5, "eval_source": None, "eval_split": None}
        settings = settings | {"init_args": settings["init_args"] | own}
    return rebuild(settings, LightningDataModule)


def _batches(data: Any, search: int, check: int) -> tuple[PromptBatch, PromptBatch]:
    """Training prompts to search on, and held-out ones."""
    data.prepare_data()
    data.setup("fit")
    both = []
    for what, loader, count in (
        ("training", data.train_dataloader(), search),
        ("held-out", data.val_dataloader(), check),
    ):
        batches: list[PromptBatch] = []
        for batch in loader:
            batches.append(PromptBatch.check(batch))
            if sum(map(len, batches)) >= count:
                break
        if sum(map(len, batches)) < 2:
            raise ValueError(f"The data has fewer than two {what} prompts: give --prompts.")
        both.append(first_prompts(batches, count))
    return both[0], both[1]


def _alphas(policy: SteerablePolicy, given: list[float] | None) -> tuple[float, float]:
    known = given or policy.trained.alpha_range or [policy.usual_alpha()]
    for alpha in known:
        check_alpha(alpha)
    return min(known), max(known)


def _starts(
    policy: SteerablePolicy, maximize: str, wishes: Sequence[Wish], alphas: tuple[float, float]
) -> Preference:
    """The best points of the run's front; without one, a grid."""
    names, front = policy.names, policy.trained.front
    points = [] if front is None else [p for p in front["points"] if _known(p, maximize, wishes)]
    if not points:
        return Grid(divisions=2, alphas=sorted(set(alphas))).preferences(names)

    def key(point: dict[str, Any]) -> tuple[float, float]:
        missing = [max(0.0, float(w.shortfall(_value(point, w.quantity)))) for w in wishes]
        return sum(missing), -_value(point, maximize)

    chosen = sorted(points, key=key)[:_STARTS]
    weights = torch.tensor([[p["weights"][name] for name in names] for p in chosen])
    low, high = alphas
    alpha = torch.tensor([min(max(p["alpha"], low), high) for p in chosen])
    return Preference(weights / weights.sum(-1, keepdim=True), alpha)


def _value(point: dict[str, Any], quantity: str) -> float:
    number: float = {**point, **point["rewards"]}[quantity]
    return number


def _known(point: dict[str, Any], maximize: str, wishes: Sequence[Wish]) -> bool:
    return all(
        _value(point, quantity) is not None
        for quantity in (maximize, *(wish.quantity for wish in wishes))
    )


def _mean(measured: Measured, quantities: Sequence[str], quantity: str) -> float:
    return float(measured.means[quantities.index(quantity)])


def _report(
    maximize: str,
    wishes: Sequence[Wish],
    estimates: Mapping[str, Estimate],
    num_prompts: int,
) -> None:
    """Prints what the preference gives on held-out prompts."""
    table = Table(title=f"On {num_prompts} held-out prompts, 95 % intervals")
    for heading in ("", "mean", "interval", "wanted", ""):
        table.add_column(heading, justify="right")
    for quantity, estimate in estimates.items():
        own = [wish for wish in wishes if wish.quantity == quantity]
        wanted = ["maximal"] * (quantity == maximize) + [str(w)[len(quantity) :] for w in own]
        verdicts = [_verdict(wish, estimate) for wish in own]
        mean = "-" if estimate.mean is None else f"{estimate.mean:.3g}"
        interval = "-" if estimate.low is None else f"[{estimate.low:.3g}, {estimate.high:.3g}]"
        table.add_row(quantity, mean, interval, ", ".join(wanted), ", ".join(verdicts))
    print_table(table)


def _verdict(wish: Wish, estimate: Estimate) -> str:
    if estimate.mean is None:
        return "never scored"
    missing = float(wish.shortfall(estimate.mean))
    if missing <= 0:
        return "met"
    if _reaches(wish, estimate):
        return f"met within the interval (mean misses by {missing:.3g})"
    return f"missed by {missing:.3g}"


def _reaches(wish: Wish, estimate: Estimate) -> bool:
    """Whether the interval holds a value that meets the wish."""
    better = estimate.high if wish.at_least else estimate.low
    return better is not None and float(wish.shortfall(better)) <= 0


def _options(names: Sequence[str], preference: Preference) -> str:
    """The preference as options of the other commands."""
    weights = dict(zip(names, preference.weights[0].tolist(), strict=True))
    return f"--weights {write_weights(weights, 4)} --alpha {round(float(preference.alpha[0]), 4):g}"


def _report_infeasible(
    quantities: Sequence[str], missed: Sequence[Wish], found: Sequence[Measured]
) -> None:
    print("infeasible: no preference that was tried meets all wishes on the prompts of the search")
    for wish in missed:
        closest = float(wish.shortfall(_mean(found[0], quantities, wish.quantity)))
        means = [_mean(m, quantities, wish.quantity) for m in found]
        values = [mean for mean in means if not isnan(mean)]
        if not values:
            print(f"  {wish}: never scored; look at the columns that it reads")
            continue
        extreme = max(values) if wish.at_least else min(values)
        word = "highest" if wish.at_least else "lowest"
        print(f"  {wish}: missed by {closest:.3g}; {word} value that was reached: {extreme:.3g}")
