"""Loss against size: what the solver keeps in 16 bit, against groups kept at random and those with the largest weight error, all measured.

    python benchmarks/frontier.py ARTIFACT --out frontier.json

ARTIFACT: one that Octavo made with every linear layer in 8 bit, for instance of the recipe llama-int8-gptq. What each group loses alone is
measured on one text (seed + 1, as `mixed` does), and each choice as a whole on another (seed + 2), in the same arithmetic: the model with
the codes of the artifact in all groups but those kept. Exits with 1 where another choice of the same size loses less than the solver's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path

from convert.mixed import Choice, Option, bytes_of, frontier
from convert.pipeline import plan, recipe_of
from convert.plan import Plan
from convert.progress import Lines
from convert.sensitivity import Trial, artifact_trials, entries_of, measure

#: Of the bytes of all linear layers in 16 bit, what may be kept.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
#: Orders drawn at random for each share.
DRAWS = 3


def filled(order: list[int], groups: list[list[Option]], most: int) -> Choice:
    """Keeps one group after the other, leaving out what would take more than ``most`` bytes."""
    choice = [0] * len(groups)
    for i in order:
        tried = [*choice[:i], 1, *choice[i + 1 :]]
        if bytes_of(groups, tried) <= most:
            choice = tried
    return choice


def weight_error(job: Plan, trial: Trial) -> float:
    """The error of a group's weights as a share of their length."""
    noise = signal = 0.0
    for entry in entries_of(job.targets[0], trial.modules):
        weight = job.checkpoint.reader.read(entry.tensor.name, 0, entry.tensor.matrix_shape[0]).float()
        form = trial.forms[entry.modules[0]]
        got = form.weight(weight)
        got = got if form.divisor is None else got / form.divisor
        noise += float((got - weight).square().sum())
        signal += float(weight.square().sum())
    return math.sqrt(noise / signal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--tokens", type=int, default=1024, help="of each of both texts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON, beside the table that is printed")
    asked = parser.parse_args()
    recipe = recipe_of(asked.artifact)
    recipe = recipe.only([next(target for target in recipe.targets if target.name == asked.artifact.name)])
    job, progress = plan(recipe), Lines()
    trials = artifact_trials(job, asked.artifact)
    losses, _ = measure(job, trials, progress, tokens=asked.tokens, device=asked.device)
    plain = [sum(entry.plain.size_bytes for entry in entries_of(job.targets[0], trial.modules)) for trial in trials]
    now = [sum(entry.size_bytes for entry in entries_of(job.targets[0], trial.modules)) for trial in trials]
    groups = [
        [Option(max(loss.kl_nats, 0.0), 0), Option(0.0, before - after)] for loss, before, after in zip(losses, plain, now, strict=True)
    ]
    best = frontier(groups, points=200)
    by_error = sorted(range(len(trials)), key=lambda i: -weight_error(job, trials[i]))
    draw = random.Random(0)
    choices: list[tuple[float, str, Choice]] = [(0.0, "nothing", [0] * len(trials))]
    for share in SHARES:
        most = int(share * sum(before - after for before, after in zip(plain, now, strict=True)))
        choices.append((share, "solver", max((c for c in best if bytes_of(groups, c) <= most), key=lambda c: bytes_of(groups, c))))
        choices.append((share, "largest weight error", filled(by_error, groups, most)))
        orders = [draw.sample(range(len(trials)), len(trials)) for _ in range(DRAWS)]
        choices += [(share, "random", filled(order, groups, most)) for order in orders]
    settings = job.recipe.calibration
    assert settings is not None
    other = job.recipe.model_copy(update={"calibration": settings.model_copy(update={"seed": settings.seed + 1})})
    whole = [
        Trial(
            tuple(module for trial, j in zip(trials, choice, strict=True) if not j for module in trial.modules),
            trials[0].scheme,
            0,
            {module: form for trial, j in zip(trials, choice, strict=True) if not j for module, form in trial.forms.items()},
        )
        for _, _, choice in choices
    ]
    found, _ = measure(plan(other), whole, progress, tokens=asked.tokens, device=asked.device)
    rows = [
        {
            "share": share,
            "by": by,
            "kept_groups": sum(choice),
            "extra_bytes": bytes_of(groups, choice),
            "kl_nats": loss.kl_nats,
            "standard_error": loss.standard_error,
        }
        for (share, by, choice), loss in zip(choices, found, strict=True)
    ]
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")
    print("| kept of the linear bytes | solver | largest weight error | at random (each of 3) |\n|---|---|---|---|")
    print(f"| 0 | {rows[0]['kl_nats']:.5f} | | |")
    worse = 0
    for share in SHARES:
        here = [row for row in rows if row["share"] == share]
        solver, error, *drawn = here
        at_random = ", ".join(f"{row['kl_nats']:.5f}" for row in drawn)
        print(
            f"| {share:.0%} | {solver['kl_nats']:.5f} ({solver['kept_groups']} groups, {solver['extra_bytes'] / 1e6:.2f} MB) | "
            f"{error['kl_nats']:.5f} | {at_random} |"
        )
        worse += sum(row["kl_nats"] < solver["kl_nats"] for row in here)
    print(f"{worse} of {(1 + DRAWS) * len(SHARES)} other choices lose less than the solver's of their size")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
