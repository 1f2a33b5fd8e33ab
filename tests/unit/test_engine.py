"""Batches by token budget, what happens when one runs out of memory, and calls that are encoded ahead."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rerank_ray.errors import ModelError
from rerank_ray.models import engine
from rerank_ray.models.engine import BatchRunner, in_pools, plan_batches
from rerank_ray.models.protocol import Generate, LogLikelihood, NextToken, Prompt
from rerank_ray.records import Computed

CPU = torch.device("cpu")
lengths_of = st.lists(st.integers(1, 600), max_size=60)


@given(lengths=lengths_of, budget=st.integers(1, 2000))
def test_batches_hold_each_index_once_within_the_budget(lengths: list[int], budget: int):
    """Longest first, over all batches and within each; only a sequence above the budget passes it, alone."""
    batches = plan_batches(lengths, budget)
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= budget or len(batch) == 1


@given(lengths=lengths_of, budget=st.integers(1, 2000))
def test_no_batch_could_have_taken_one_more(lengths: list[int], budget: int):
    """A batch ends only because its next sequence would pass the budget."""
    batches = plan_batches(lengths, budget)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_plan_by_hand():
    """Budget 12: 6 fits twice (6, 5), then 4 three times (4, 3, 3), then 1."""
    assert plan_batches([3, 6, 1, 4, 5, 3], 12) == [[1, 4], [3, 0, 5], [2]]


@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), max_size=40),
    budget=st.integers(1, 2000),
    in_cache=st.integers(1, 1000),
    packed=st.booleans(),
)
def test_what_a_batch_computes_stays_in_the_cache(
    lengths: list[tuple[int, int]], budget: int, in_cache: int, packed: bool
):
    """Beside the budget, which counts the tokens that are held as well, and no batch could have taken one more. A
    packed batch computes its tokens and no padding."""
    computed = [own for _, own in lengths]
    total = [held + own for held, own in lengths]
    batches = plan_batches(total, budget, computed, in_cache, packed=packed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))

    def fits(batch: list[int]) -> bool:
        of_total, of_computed = (len(batch) * max(n[i] for i in batch) for n in (total, computed))
        of_computed = sum(computed[i] for i in batch) if packed else of_computed
        return of_total <= budget and of_computed <= in_cache

    for number, batch in enumerate(batches):
        assert len(batch) == 1 or fits(batch)
        assert number == len(batches) - 1 or not fits([*batch, batches[number + 1][0]])


@pytest.mark.parametrize(
    ("tokens_per_batch", "device", "expected"),
    [(None, CPU, [10, 10, 10]), (4096, CPU, [30]), (None, torch.device("meta"), [30])],
)
def test_the_cache_counts_on_a_cpu_without_a_budget_of_the_users(tokens_per_batch, device, expected: list[int]):
    """Thirty rows that hold 50 tokens and compute 20 each: 200 tokens are ten rows."""
    runner, seen = BatchRunner(tokens_per_batch, device, in_cache=200), []

    def forward(batch: list[int]) -> list[int]:
        seen.append(len(batch))
        return batch

    runner.run([70] * 30, forward, [50] * 30)
    assert seen == expected


class Device:
    """A forward function that doubles indices and runs out of memory above `capacity` padded tokens."""

    def __init__(self, lengths: list[int], capacity: int, error: RuntimeError | None = None) -> None:
        self.lengths, self.capacity = lengths, capacity
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.tried: list[list[int]] = []

    def __call__(self, indices: list[int]) -> list[int]:
        self.tried.append(indices)
        if len(indices) * max(self.lengths[i] for i in indices) > self.capacity:
            raise self.error
        return [2 * i for i in indices]


@given(lengths=st.lists(st.integers(1, 50), max_size=40), capacity=st.integers(50, 400))
def test_out_of_memory_halves_until_it_fits(lengths: list[int], capacity: int):
    """Every output is there, in input order, and no sequence is computed twice."""
    device = Device(lengths, capacity)
    runner = BatchRunner(400, CPU)
    assert runner.run(lengths, device) == [2 * i for i in range(len(lengths))]
    fitted = [i for batch in device.tried if len(batch) * max(lengths[i] for i in batch) <= capacity for i in batch]
    assert sorted(fitted) == list(range(len(lengths)))


def test_padding_is_counted():
    """Three sequences of 10, 20 and 30 tokens and 15 that are held already are computed at 16 and 32 positions."""
    runner = BatchRunner(64, CPU)
    runner.run([10, 20, 30 + 15], lambda batch: batch, [0, 0, 15])
    assert runner.computed == Computed(tokens=60, positions=32 + 2 * 32)


def test_the_smaller_budget_is_kept():
    """Eight sequences of 10 in a budget of 80, capacity 40: 8 fail, 4 + 4 fit; the next run starts with 4."""
    device = Device([10] * 8, 40)
    runner = BatchRunner(80, CPU)
    runner.run([10] * 8, device)
    assert [len(t) for t in device.tried] == [8, 4, 4]
    assert runner.tokens_per_batch == 40
    device.tried.clear()
    runner.run([10] * 8, device)
    assert [len(t) for t in device.tried] == [4, 4]


def test_a_single_sequence_that_does_not_fit_is_an_error():
    with pytest.raises(ModelError, match=r"a sequence of 60 tokens alone does not fit the memory: lower .*max_length"):
        BatchRunner(100, CPU).run([10, 60, 10], Device([10, 60, 10], 50))


def test_the_cpus_allocator_runs_out_of_memory_too():
    """The error is its own: nothing has so many bytes."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    device = Device([10] * 8, 40, caught.value)
    assert BatchRunner(80, CPU).run([10] * 8, device) == [2 * i for i in range(8)]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCompile",
    ],
)
def test_a_gpus_libraries_run_out_of_memory_too(words: str):
    """As PyTorch words what cuBLAS and the driver say, which are no `OutOfMemoryError`."""
    device = Device([10] * 8, 40, RuntimeError(words))
    assert BatchRunner(80, CPU).run([10] * 8, device) == [2 * i for i in range(8)]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), ValueError("bad"), MemoryError()])
def test_other_errors_are_not_taken_for_out_of_memory(error: Exception):
    calls = []

    def forward(indices: list[int]) -> list[int]:
        calls.append(indices)
        raise error

    with pytest.raises(type(error)):
        BatchRunner(100, CPU).run([10] * 5, forward)
    assert len(calls) == 1


def test_a_forward_that_loses_an_output_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        BatchRunner(100, CPU).run([1, 1], lambda indices: [0])


def test_nothing_to_run():
    assert BatchRunner(None, CPU).run([], lambda indices: pytest.fail("called")) == []


def test_defaults_by_device():
    assert BatchRunner(None, CPU).tokens_per_batch == 4096
    assert BatchRunner(None, torch.device("cuda")).tokens_per_batch == 65536


def test_devices_and_precisions():
    assert engine.pick_device("cpu") == CPU
    for name in ("cuda:77", "no-such-device"):
        with pytest.raises(ModelError, match=f"device: {name}: not usable here"):
            engine.pick_device(name)
    assert engine.pick_dtype("float16", CPU) == torch.float16
    assert engine.pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_bfloat16_in_software_is_warned_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "computes_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="dtype: bfloat16: this CPU computes it in software"):
        assert engine.pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert engine.pick_dtype("auto", CPU) == torch.float32


def test_right_pad():
    """To the next multiple of 16, unless the model's positions end before it."""
    ids, lengths = engine.right_pad([[5], [6, 7, 8]], pad_id=9)
    assert ids.tolist() == [[5] + [9] * 15, [6, 7, 8] + [9] * 13]
    limited, _ = engine.right_pad([[5], [6, 7, 8]], pad_id=9, limit=4)
    assert limited.tolist() == [[5, 9, 9, 9], [6, 7, 8, 9]]
    assert [engine.padded_length(n, 514) for n in (1, 16, 17, 513, 514)] == [16, 16, 32, 514, 514]
    assert lengths.tolist() == [1, 3]


def test_the_next_item_is_prepared_while_the_caller_works():
    """The thread is at the second item before the first one's result is used, and no further ahead than that."""
    started = [threading.Event() for _ in range(4)]

    def prepare(number: int) -> int:
        started[number].set()
        return 10 * number

    results = engine.ahead(range(4), prepare)
    assert next(results) == 0
    assert started[1].wait(5)
    assert not started[2].is_set()
    assert list(results) == [10, 20, 30]


def test_what_fails_ahead_is_raised_in_its_turn():
    def prepare(number: int) -> float:
        return 1 / number

    results = engine.ahead([1, 0, 2], prepare)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@given(
    texts=st.lists(st.text("ab", max_size=3), max_size=60),
    size=st.integers(1, 20),
    first=st.integers(0, 30),
    sort=st.booleans(),
)
def test_results_are_in_order_whatever_the_pools(texts: list[str], size: int, first: int, sort: bool):
    """Each call is encoded once: an eighth of them, and no fewer than asked, and then pools of one size. They are
    sorted where there is more than one pool."""
    calls, pools = list(enumerate(texts)), []

    def encode(pool: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        pools.append(list(pool))
        return [(2 * number, text) for number, text in pool]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_POOL", size)
        results = in_pools(calls, encode, tuple, first=first, key=(lambda call: call[1]) if sort else None)
    assert results == [(2 * number, text) for number, text in calls]
    assert len(pools[0]) == min(len(calls), max(first, min(size, math.ceil(len(calls) / 8))))
    assert all(len(pool) == size for pool in pools[1:-1])
    assert len(pools) == 1 or 0 < len(pools[-1]) <= size
    expected = sorted(calls, key=lambda call: call[1]) if sort and len(pools) > 1 else calls
    assert [call for pool in pools for call in pool] == expected


def test_the_next_pool_is_encoded_while_one_is_answered():
    """Of 8,192 calls an eighth, then 2,048 at a time: nothing is answered before the pool behind it has begun."""
    begun = [threading.Event() for _ in range(6)]
    begun[5].set()
    answered: list[int] = []

    def encode(calls: Sequence[int]) -> Sequence[int]:
        begun[-(-calls[0] // 2048)].set()
        return calls

    def answer(calls: Sequence[int]) -> Sequence[int]:
        assert begun[len(answered) + 1].wait(30)
        answered.append(len(calls))
        return calls

    assert in_pools(range(8192), encode, answer) == list(range(8192))
    assert answered == [1024, 2048, 2048, 2048, 1024]


@pytest.mark.parametrize("failing", ["encode", "answer"])
def test_an_error_in_a_pool_reaches_the_caller_and_ends_the_thread(failing: str):
    """In the second pool of four; the error is held on to, and with it all that its traceback keeps."""
    steps: list[str] = []
    threads: list[threading.Thread] = []

    def step(name: str, calls: Sequence[int]) -> Sequence[int]:
        steps.append(name)
        if name == failing and steps.count(name) == 2:
            raise ModelError(f"{name} fails")
        return calls

    def encode(calls: Sequence[int]) -> Sequence[int]:
        threads.append(threading.current_thread())
        return step("encode", calls)

    with pytest.raises(ModelError) as held:
        in_pools(range(5000), encode, lambda calls: step("answer", calls))
    assert str(held.value) == f"{failing} fails"
    assert steps.count("answer") == {"encode": 1, "answer": 2}[failing]
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def prompts(count: int, characters: int) -> list[NextToken]:
    return [NextToken(prompt=Prompt(parts=("x" * characters,), passages=()), labels=("a",)) for _ in range(count)]


def test_an_llms_first_pool_is_about_a_batch():
    """400 characters are 100 tokens, of which a GPU's batch of 65,536 holds 656 prompts, and a CPU's cache of 1,024
    eleven, or 21 where they are cut to 50."""
    gpu, cpu = (BatchRunner(None, device, in_cache=1024) for device in (torch.device("cuda"), CPU))
    assert gpu.first_pool(prompts(2000, 400), 512) == 656
    assert cpu.first_pool(prompts(2000, 400), 512) == 11
    assert cpu.first_pool(prompts(2000, 400), 50) == 21
    assert cpu.first_pool(prompts(1000, 200) + prompts(1000, 600), 512) == 11
    assert BatchRunner(4096, CPU, in_cache=1024).first_pool(prompts(2000, 400), 512) == 41


def test_what_follows_a_prompt_counts_in_its_first_pool():
    """300 characters and 100 of the continuation; no texts are written by an eighth of a pool."""
    (asked,) = prompts(1, 300)
    likelihood = LogLikelihood(prompt=asked.prompt, continuation="y" * 100)
    runner = BatchRunner(1000, CPU)
    assert runner.first_pool([likelihood] * 30, 512) == 10
    assert runner.first_pool([*[likelihood] * 30, Generate(prompt=asked.prompt, max_tokens=5)], 512) == 2048
    assert runner.first_pool([], 512) == 0


def test_a_sorting_methods_round_on_a_gpu_is_one_pool():
    """64 prompts of 500 tokens."""
    calls, pools = prompts(64, 2000), []
    first = BatchRunner(None, torch.device("cuda"), in_cache=1024).first_pool(calls, 1024)
    in_pools(calls, lambda pool: pools.append(len(pool)) or pool, list, first=first)
    assert pools == [64]


def test_what_was_moved_is_not_kept():
    """Every batch of a run goes this way: one that stays is memory that grows until there is none."""
    tensor = torch.zeros(3)
    kept = weakref.ref(tensor)
    moved = engine.moved(tensor, torch.device("cpu"))
    assert moved.tolist() == [0.0, 0.0, 0.0]
    del tensor, moved
    assert kept() is None
