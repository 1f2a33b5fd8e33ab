"""What jobs ask of a cluster, and what is said where it has less."""

import pytest

from rerank_ray.settings.distill import DistillExecutionSettings
from rerank_ray.settings.jobs import ExecutionSettings
from rerank_ray.settings.resources import Resources


def test_a_ranking_job_needs_cpus_beside_its_replicas():
    needs = ExecutionSettings(actors=4, cpus_per_actor=2, gpus_per_actor=0.5).needs
    assert needs == Resources(cpus=9.5, gpus=2.0)


def test_training_needs_all_its_workers_or_the_fewest_it_goes_on_with():
    of_all = DistillExecutionSettings(workers=8, cpus_per_worker=2, gpus_per_worker=1)
    assert of_all.needs == Resources(cpus=16, gpus=8)
    assert of_all.model_copy(update={"min_workers": 2}).needs == Resources(cpus=4, gpus=2)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"CPU": 9.5, "GPU": 2.0}, None),
        ({"CPU": 8.0, "GPU": 2.0, "memory": 1e9}, "the job needs 9.5 CPUs and Ray has 8"),
        ({"CPU": 16.0}, "the job needs 2 GPUs and Ray has 0"),
        ({"CPU": 8.0, "GPU": 1.0}, "the job needs 9.5 CPUs and Ray has 8, and 2 GPUs and Ray has 1"),
        ({}, "the job needs 9.5 CPUs and Ray has 0, and 2 GPUs and Ray has 0"),
    ],
)
def test_what_is_missing_is_said(there, said):
    assert Resources(cpus=9.5, gpus=2.0).missing_from(there) == said


def test_shares_of_gpus_add_up():
    assert ExecutionSettings(actors=25, gpus_per_actor=0.28).needs.missing_from({"CPU": 99.0, "GPU": 7.0}) is None
