"""Adaptive exits on real lists: what they save, and what they lose against computing all layers.

    RERANK_RAY_DATA=DIR python benchmarks/adaptive_exit.py RUN [--max-loss 0.03] [--rounds 3]

RUN is the distillation run of a layer-wise student, as `rerank-ray pipeline configs/pipelines/trec-dl.yaml` leaves it.
The margins are found on the queries that it held out (they stay in its student's folder) and tried on BM25's lists
of TREC-DL 2019, whose qrels measure what was lost. What is promised holds of lists like those: SPLADE's, against
SPLADE's order. Seconds are those of the process, on one thread: all layers, each exit, and adaptive exits in
alternation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import DL19_QRELS, Qrels, alternate, publish, qrels_of, ratio, trec_dl_lists

from rerank_ray.calibrate_exit import calibrate_exit
from rerank_ray.metrics.evaluation import evaluate_rankings
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.ranking.rankers import Ranker
from rerank_ray.ranking.scheduler import Outcome
from rerank_ray.records import ranking_of
from rerank_ray.settings.rankers import CrossEncoderRankerSettings

QUERIES = 43
METRIC = "ndcg@10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--max-loss", type=float, default=0.03)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    requests = trec_dl_lists(QUERIES, 100)
    qrels = qrels_of(DL19_QRELS)
    student = Path(options.run, "student")
    report = calibrate_exit(str(student), None, options.max_loss)
    layers = report.layers
    chosen = {
        f"all {layers[-1]} layers": layers[-1],
        **{f"exit at layer {n}": n for n in layers[:-1]},
        "adaptive exit": "adaptive",
    }
    loaded: dict[str, CrossEncoder] = {}
    rankers = {name: Ranker(settings(student, layer), loaded) for name, layer in chosen.items()}
    (adaptive,) = (backend.adaptive for backend in loaded.values() if backend.adaptive)
    outcomes: dict[str, list[Outcome]] = {}

    def rank(name: str) -> None:
        outcomes[name] = rankers[name].rank(requests)

    seconds = alternate({name: partial(rank, name) for name in rankers}, options.rounds, time.process_time)
    whole = next(iter(rankers))
    values = {name: ndcg(outcomes[name], qrels) for name in rankers}
    rows = {
        name: {
            METRIC: f"{statistics.mean(values[name]):.4f}",
            "lost": "" if name == whole else mean_and_error(np.subtract(values[whole], values[name])),
            "layers a pair": f"{adaptive.layers_computed if name == 'adaptive exit' else chosen[name]:.2f}",
            "pairs/s": sum(map(len, requests)) / statistics.median(seconds[name]),
            "times as fast": ratio(seconds[whole], seconds[name]),
        }
        for name in rankers
    }
    publish(
        "adaptive_exit",
        title="Adaptive exits of a layer-wise student",
        about=f"BM25's lists of TREC-DL 2019, one thread, CPU seconds. `lost`: nDCG@10 against all layers, ± its "
        f"standard error over the {len(requests)} queries. Calibrated for a loss of at most {options.max_loss} with "
        f"some 90 % confidence by Student's t on {report.lists} held-out lists of SPLADE against SPLADE's order, where "
        f"the layers {' · '.join(map(str, layers))} have {' · '.join(f'{v:.3f}' for v in report.ndcg)}: "
        "what is promised holds of lists like those.",
        rows=rows,
        facts={
            "margins": report.calibration.margins,
            "layers computed on the calibration lists": report.calibration.layers_computed,
            "loss on the calibration lists": report.calibration.loss,
            "its bound": report.calibration.loss_bound,
        },
    )


def settings(student: Path, layer: int | str) -> CrossEncoderRankerSettings:
    model = {"kind": "cross_encoder", "path": str(student), "max_length": 256, "exit_layer": layer}
    return CrossEncoderRankerSettings.model_validate({"model": model})


def ndcg(outcomes: list[Outcome], qrels: Qrels) -> list[float]:
    """Of each query."""
    rankings = {o.request.query.query_id: ranking_of(o.request, o.scores, "").doc_ids for o in outcomes}
    return list(evaluate_rankings(qrels, {"": rankings}, [METRIC])[""].per_query[METRIC].values())


def mean_and_error(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
