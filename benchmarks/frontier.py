"""Loss against size: what `mixed` keeps in 16 bit, against groups kept at random and those with the largest weight error, all measured.

    python -m benchmarks.frontier ARTIFACT --out frontier.json

ARTIFACT: one that Octavo made with every linear layer in 8 bit, for instance of the recipe llama-int8-gptq. What each group loses alone is
measured on one text (seed + 1, as `mixed` does), and each choice as a whole on another (seed + 2), on which `mixed` chooses between the
solver's and those with the largest errors, and on a third (seed + 3), on which they are compared; in the same arithmetic: the model with
the codes of the artifact in all groups but those kept. Exits with 1 where another choice of the same size loses less there than `mixed`'s.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from convert.mixed import Choice, Option, bytes_of, filled, frontier
from convert.pipeline import plan, recipe_of
from convert.progress import Lines
from convert.sensitivity import artifact_trials, entries_of, measure, together, weight_error

#: Of the bytes of all linear layers in 16 bit, what may be kept.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
#: Orders drawn at random for each share.
DRAWS = 3


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
    by_block = sorted(range(len(trials)), key=lambda i: -losses[i].block_error)
    draw = random.Random(0)
    choices: list[tuple[float, str, Choice]] = [(0.0, "nothing", [0] * len(trials))]
    for share in SHARES:
        most = int(share * sum(before - after for before, after in zip(plain, now, strict=True)))
        choices.append((share, "solver", max((c for c in best if bytes_of(groups, c) <= most), key=lambda c: bytes_of(groups, c))))
        choices.append((share, "largest weight error", filled(by_error, groups, most=most)))
        choices.append((share, "largest error in its block", filled(by_block, groups, most=most)))
        orders = [draw.sample(range(len(trials)), len(trials)) for _ in range(DRAWS)]
        choices += [(share, "random", filled(order, groups, most=most)) for order in orders]
    settings = job.recipe.calibration
    assert settings is not None
    whole = [together([trial for trial, j in zip(trials, choice, strict=True) if not j]) for _, _, choice in choices]
    on = []
    for seed in (settings.seed + 1, settings.seed + 2):  # of which measure takes the next
        other = job.recipe.model_copy(update={"calibration": settings.model_copy(update={"seed": seed})})
        on.append(measure(plan(other), whole, progress, tokens=asked.tokens, device=asked.device)[0])
    rows = [
        {
            "share": share,
            "by": by,
            "kept_groups": sum(choice),
            "extra_bytes": bytes_of(groups, choice),
            "kl_nats_chosen_on": first.kl_nats,
            "kl_nats": loss.kl_nats,
            "standard_error": loss.standard_error,
        }
        for (share, by, choice), first, loss in zip(choices, *on, strict=True)
    ]
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(
        "| kept of the linear bytes | `mixed` | losses alone | largest weight error | largest error in its block | at random (each of 3) |"
    )
    print(f"|---|---|---|---|---|---|\n| 0 | {rows[0]['kl_nats']:.5f} | | | | |")
    worse = 0
    for share in SHARES:
        here = [row for row in rows if row["share"] == share]
        mixed = min(here[:3], key=lambda row: row["kl_nats_chosen_on"])
        cells = [f"{row['kl_nats']:.5f}" for row in here[:3]]
        at_random = ", ".join(f"{row['kl_nats']:.5f}" for row in here[3:])
        kept = f"{mixed['kept_groups']} groups, {mixed['extra_bytes'] / 1e6:.2f} MB"
        print(f"| {share:.0%} | {mixed['kl_nats']:.5f} ({kept}) | {' | '.join(cells)} | {at_random} |")
        worse += sum(row["kl_nats"] < mixed["kl_nats"] for row in here)
    print(f"{worse} of {(2 + DRAWS) * len(SHARES)} other choices lose less than that of `mixed` in their size")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
