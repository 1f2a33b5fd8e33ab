"""What reinforcement did to a small model: the curves of a finished `rerank-ray reinforce` run.

rerank-ray ingest beir $RERANK_RAY_DATA/cranfield --split train --depth 30 --out data/cranfield-train
rerank-ray label configs/label/first-stage.yaml --set input=data/cranfield-train --run runs/cranfield-first-stage
rerank-ray reinforce configs/reinforce/smollm2.yaml --run runs/smollm2
python benchmarks/reinforcement.py runs/smollm2
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from harness import DOCS, publish

matplotlib.use("Agg")
from matplotlib import pyplot

NAMES = {
    "reward": "mean reward, drawn",
    "well_formed": "well-formed, drawn",
    "validation_reward": "mean reward, held out",
    "validation_well_formed": "well-formed, held out",
    "prompts_without_signal": "prompts whose answers are all worth the same",
}


def main(run: Path) -> None:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = {
        f"step {m['step']}": {shown: round(m[name], 3) if name in m else "" for name, shown in NAMES.items()}
        for m in metrics
    }
    publish(
        "reinforcement",
        title="Reinforcement: SmolLM2 learns the form of an answer",
        about=(
            "ProRank's warm-up on Cranfield's training queries (configs/reinforce/smollm2.yaml): 1 for an answer that "
            "is one digit, 1 more for the right one. Answers drawn at temperature 1 are means since the row before; "
            "held-out ones are greedy."
        ),
        rows=rows,
    )
    draw(metrics, DOCS / "benchmarks" / "reinforcement.png")


def draw(metrics: Sequence[dict], path: Path) -> None:
    """Reward and share of well-formed answers over the steps; drawn answers at the middle of the steps they are of."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    drawn = [(before["step"], after) for before, after in itertools.pairwise(metrics)]
    middles = [(start + m["step"]) / 2 for start, m in drawn]
    steps = [m["step"] for m in metrics]
    for axis, name, title, top in (
        (axes[0], "reward", "Mean reward (0 to 2)", 2.05),
        (axes[1], "well_formed", "Share of well-formed answers", 1.03),
    ):
        axis.plot(middles, [m[name] for _, m in drawn], "o-", label="drawn at temperature 1")
        held_out = [m[f"validation_{name}"] for m in metrics]
        axis.plot(steps, held_out, "s--", label="held-out queries, greedy", alpha=0.7)
        axis.set(title=title, xlabel="step", ylim=(0, top), xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
