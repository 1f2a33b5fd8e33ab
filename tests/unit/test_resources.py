"""What jobs ask of a cluster, and what is said where it has less."""

import pytest
from pydantic import ValidationError

from rerank_ray.settings.distill import DistillExecutionSettings
from rerank_ray.settings.jobs import ExecutionSettings
from rerank_ray.settings.resources import Needs, Resources


def test_a_ranking_job_needs_cpus_beside_its_replicas():
    needs = ExecutionSettings(actors=4, cpus_per_actor=2, gpus_per_actor=0.5).needs
    assert needs == Needs(total=Resources(cpus=9.5, gpus=2.0), one=Resources(cpus=2, gpus=0.5))


def test_training_needs_all_its_workers_or_the_fewest_it_goes_on_with():
    of_all = DistillExecutionSettings(workers=8, cpus_per_worker=2, gpus_per_worker=1)
    assert of_all.needs == Needs(total=Resources(cpus=16, gpus=8), one=Resources(cpus=2, gpus=1))
    assert of_all.model_copy(update={"min_workers": 2}).needs.total == Resources(cpus=4, gpus=2)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ([{"CPU": 9.5, "GPU": 2.0}], None),
        ([{"CPU": 8.0, "GPU": 2.0, "memory": 1e9}], "the job needs 9.5 CPUs and Ray has 8"),
        ([{"CPU": 16.0}], "the job needs 2 GPUs and Ray has 0"),
        ([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}], "the job needs 9.5 CPUs and Ray has 8, and 2 GPUs and Ray has 1"),
        ([], "the job needs 9.5 CPUs and Ray has 0, and 2 GPUs and Ray has 0"),
    ],
)
def test_what_is_missing_is_said(there, said):
    assert ExecutionSettings(actors=2, cpus_per_actor=4, gpus_per_actor=1).needs.missing_from(there) == said


def test_a_replica_must_fit_on_one_node():
    """Three nodes of 8 CPUs have 24 together, and none has 16."""
    needs = ExecutionSettings(cpus_per_actor=16, memory_gb_per_actor=4).needs
    small, large = {"CPU": 8.0, "memory": 2.0**33}, {"CPU": 16.0, "memory": 2.0**32}
    said = needs.missing_from([small] * 3)
    assert said.startswith("each replica or training worker needs 16 CPUs and 4 GiB of memory on one node, and no node")
    assert needs.missing_from([small, large]) is None
    said = ExecutionSettings(actors=8, memory_gb_per_actor=4).needs.missing_from([small, large])
    assert said == "the job needs 32 GiB of memory and Ray has 12"


def test_shares_of_gpus_add_up():
    assert ExecutionSettings(actors=25, gpus_per_actor=0.28).needs.missing_from([{"CPU": 99.0, "GPU": 7.0}]) is None


def test_gpus_are_shares_of_one_or_whole():
    """As Ray reserves them, and as NCCL connects workers: each with a GPU of its own."""
    for gpus in (0, 0.5, 1, 2):
        assert ExecutionSettings(gpus_per_actor=gpus).gpus_per_actor == gpus
    with pytest.raises(ValidationError, match=r"1\.5: Ray reserves a share of one GPU, or whole ones"):
        ExecutionSettings(gpus_per_actor=1.5)
    assert DistillExecutionSettings(gpus_per_worker=0.5).workers == 1
    with pytest.raises(ValidationError, match=r"gpus_per_worker: 0\.5 with workers: 2: NCCL connects no two"):
        DistillExecutionSettings(workers=2, gpus_per_worker=0.5)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        DistillExecutionSettings(gpus_per_worker=2)


def test_the_most_that_any_step_needs():
    first = ExecutionSettings(actors=4, cpus_per_actor=1).needs
    second = DistillExecutionSettings(workers=1, cpus_per_worker=2, gpus_per_worker=1).needs
    assert Needs.largest([first, second]) == Needs(total=Resources(5.5, 1), one=Resources(2, 1))
