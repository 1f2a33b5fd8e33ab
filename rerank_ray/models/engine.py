"""What every torch backend shares: device and precision, batches by token budget, and out-of-memory recovery."""

from __future__ import annotations

import functools
import itertools
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch

from rerank_ray.errors import LostError, ModelError
from rerank_ray.models import heap
from rerank_ray.models.protocol import Answer, Generate, LogLikelihood, NextToken
from rerank_ray.records import Computed, Usage

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Output = TypeVar("Output")

_POOL = 2048
"""Calls that are encoded at a time, and sorted by length into batches, while the next ones are encoded."""
_CHARACTERS_PER_TOKEN = 4
_LENGTH_MULTIPLE = 16
_CPU_TOKENS_PER_BATCH = 4096
GPU_TOKENS_PER_BATCH = 65536
LLM_TOKENS_IN_CACHE = 1024
"""Of an LLM's activations a core's cache holds those of about so many tokens."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one; a device that is named but absent is an error.

    A GPU has its number: `cuda` alone is the thread's current one, which is another in another thread.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device: {name}: not usable here ({str(error).splitlines()[0]})") from error


def use_device(device: torch.device) -> None:
    """Make a GPU the current one of the thread that calls this, as each thread starts with the first of the node, where
    pinning memory would open a context."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def require_gpu() -> None:
    """Raise `ModelError` where torch can't use a GPU that was reserved: `auto` would compute on the CPU instead."""
    if not torch.accelerator.is_available():
        raise ModelError(
            f"a GPU is reserved here, and torch {torch.__version__} can use none: it may be built for CPUs alone, or "
            "for a later CUDA than the node's driver knows"
        )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """What weights are loaded in: `auto` is bfloat16 where the device computes it natively, float32 elsewhere.

    Warns where bfloat16 is asked for and the CPU has it in software alone.
    """
    if name == "bfloat16" and device.type == "cpu" and not computes_bfloat16(device):
        warnings.warn(
            "dtype: bfloat16: this CPU computes it in software, up to hundreds of times slower than float32; "
            "leave dtype at auto, or use a machine with AVX-512 BF16 or AMX, or a GPU",
            stacklevel=2,
        )
    if name != "auto":
        return _DTYPES[name]
    return torch.bfloat16 if computes_bfloat16(device) else torch.float32


def hide_gpus() -> None:
    """Let this process see no GPU, before it uses one. Ray hides none from a worker that reserves none: `device: auto`
    would put all of them on the first."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def use_threads(cpus: float, gpus: float) -> None:
    """Give torch a thread for each CPU that a worker has, at least one; with a GPU torch's own choice stays."""
    if not gpus:
        torch.set_num_threads(max(1, int(cpus)))


def set_up_replica(cpus: float, gpus: float) -> None:
    """Let this process score as a replica does: on no GPU that it was not given, with a thread for each CPU, and with
    memory that was freed kept for the next batch."""
    if not gpus:
        hide_gpus()
    use_threads(cpus, gpus)
    heap.keep_freed()


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device. To a GPU it goes by way of pinned memory, or the CPU would wait for all that the GPU
    still has to do."""
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@functools.cache
def computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and bool(
        torch.backends.cpu.get_cpu_capability() and torch.cpu._is_avx512_bf16_supported()
    )


def multiplies_tiles(device: torch.device) -> bool:
    """Whether bfloat16 matrices are multiplied tile by tile: by a GPU, or a CPU with AMX."""
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported()


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def ahead(items: Iterable[Item], prepare: Callable[[Item], Prepared]) -> Iterator[Prepared]:
    """`prepare(item)` of each item in order, the next one's in a thread while the caller is busy with this one's."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Prepared]] = deque()
        for item in items:
            waiting.append(thread.submit(prepare, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_pools(
    calls: Sequence[Item],
    encode: Callable[[Sequence[Item]], Prepared],
    answer: Callable[[Prepared], Sequence[Output]],
    *,
    first: int = 0,
    key: Callable[[Item], str] | None = None,
) -> list[Output]:
    """Results of calls, in order: `answer` gives those of a pool that `encode` has made, and the next pool is encoded
    in a thread meanwhile.

    The first pool is an eighth of the calls, at most 2,048, so that the model begins soon; the others are of 2,048.
    What `encode` changes (a tokenizer's truncation, a cache of texts), `answer` must leave alone.

    Args:
        first: how many calls the first pool holds at least.
        key: calls are sorted by it, where there are several pools: neighbours go into one.
    """
    first = max(first, min(_POOL, -(-len(calls) // 8)))
    order = list(range(len(calls)))
    if key is not None and first < len(calls):
        order.sort(key=lambda i: key(calls[i]))
    cuts = itertools.pairwise([0, *range(first, len(calls), _POOL), len(calls)])
    pools = [[calls[i] for i in order[start:end]] for start, end in cuts]
    # Closed here: the traceback of an error in `answer` keeps the iterator, and so the thread.
    with closing(ahead(pools, encode)) as encoded:
        answered = [result for pool in encoded for result in answer(pool)]
    results = dict(zip(order, answered, strict=True))
    return [results[i] for i in range(len(calls))]


def plan_batches(
    lengths: Sequence[int],
    tokens_per_batch: int,
    computed: Sequence[int] | None = None,
    in_cache: int | None = None,
    *,
    packed: bool = False,
) -> list[list[int]]:
    """Group sequence indices, longest first, so that no batch's `rows × longest` passes the budget.

    Longest first puts the batch that needs most memory at the start and keeps padding to the small differences
    between neighbours. A sequence longer than the budget gets a batch of its own.

    Args:
        computed: how many of each sequence's tokens a pass computes, where others are held; those are what is padded,
            so they set the order, and those of a batch stay within `in_cache`.
        packed: what a pass computes is not padded.
    """
    computed = computed or lengths
    in_cache = in_cache or math.inf
    batches: list[list[int]] = []
    longest = inside = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-computed[i], -lengths[i])):
        longest = max(longest, lengths[index])
        rows = len(batches[-1]) + 1 if batches else 0
        # In a padded batch each takes what its first one does.
        more = computed[index if packed or not batches else batches[-1][0]]
        if rows and rows * longest <= tokens_per_batch and inside + more <= in_cache:
            batches[-1].append(index)
            inside += more
        else:
            batches.append([index])
            longest, inside = lengths[index], computed[index]
    return batches


def group_in_order(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Group indices, in order, so that a group's sizes add up to at most the limit; one above it is a group alone."""
    groups: list[list[int]] = []
    held = 0
    for index, size in enumerate(sizes):
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(index)
        held += size
    return groups


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
"""What libraries say beside PyTorch's own error: the CPU's allocator, cuBLAS of its workspace, the driver."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def _check_device(device: torch.device, error: RuntimeError) -> None:
    """Raise `LostError` if a GPU fails at everything after an error: an assertion in a kernel, a wrong address and
    a fault of its memory end its work for this process."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise LostError(f"{device} takes no more work of this process: {error}") from error


class TooLongError(ModelError):
    """A sequence that alone does not fit the memory."""


class BatchRunner:
    """Runs a forward function over sequences in token-budget batches and returns its outputs in input order.

    A batch that runs out of device memory is halved and done again, and the budget stays at what fitted; every other
    error is raised, as `LostError` where a GPU is lost with it.

    Args:
        tokens_per_batch: null is the device's default.
        in_cache: tokens that a pass of a CPU computes at most, where `tokens_per_batch` is null; null is no such limit.
        packed: `forward` computes no padding.
    """

    def __init__(
        self, tokens_per_batch: int | None, device: torch.device, *, in_cache: int | None = None, packed: bool = False
    ) -> None:
        default = _CPU_TOKENS_PER_BATCH if device.type == "cpu" else GPU_TOKENS_PER_BATCH
        self._device = device
        self.tokens_per_batch = tokens_per_batch or default
        self.in_cache = in_cache if tokens_per_batch is None and device.type == "cpu" else None
        self._packed = packed
        self.computed = Computed()

    def run(
        self, lengths: Sequence[int], forward: Callable[[list[int]], Sequence], held: Sequence[int] | None = None
    ) -> list:
        """Call `forward(indices)` for each batch; it returns one output per index.

        `held` is how many of a sequence's tokens take memory but are not computed by `forward` in one pass: a prefix
        that is already there, room for an answer.
        """
        outputs: list = [None] * len(lengths)
        waiting = list(range(len(lengths)))
        computed = [length - h for length, h in zip(lengths, held or [0] * len(lengths), strict=True)]
        while waiting:
            shrunk = False
            totals, own = [lengths[i] for i in waiting], [computed[i] for i in waiting]
            for batch in plan_batches(totals, self.tokens_per_batch, own, self.in_cache, packed=self._packed):
                indices = [waiting[i] for i in batch]
                try:
                    results = forward(indices)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        _check_device(self._device, error)
                        raise
                    if len(indices) == 1:
                        raise TooLongError(
                            f"a sequence of {lengths[indices[0]]:,} tokens alone does not fit the memory: lower the "
                            f"model's max_length, or give a replica more ({error})"
                        ) from error
                    self.tokens_per_batch = max(lengths[i] for i in indices) * (len(indices) // 2)
                    shrunk = True
                    break
                for index, result in zip(indices, results, strict=True):
                    outputs[index] = result
                rows = [computed[i] for i in indices]
                self.computed.tokens += sum(rows)
                padded = sum(rows) if self._packed else len(rows) * padded_length(max(rows), None)
                self.computed.positions += padded_length(padded, None)
            waiting = [i for i in waiting if outputs[i] is None] if shrunk else []
        return outputs

    def first_pool(self, prompts: Sequence[NextToken | LogLikelihood | Generate], max_length: int) -> int:
        """How many prompts an LLM's first pool holds at least: about a batch, by four characters a token, as a pass
        takes its time however little is in it. Where texts are written, which is a pass for each token, 2,048."""
        if any(isinstance(call, Generate) for call in prompts):
            return _POOL
        asked = (c.prompt.plain_text + (c.continuation if isinstance(c, LogLikelihood) else "") for c in prompts)
        tokens = sum(min(max_length, len(text) / _CHARACTERS_PER_TOKEN) for text in asked)
        return math.ceil((self.in_cache or self.tokens_per_batch) * len(prompts) / max(1, tokens))

    def answer(
        self,
        calls: Sequence[Item],
        encode: Callable[[Sequence[Item]], list[Prepared]],
        forward: Callable[[list[Prepared]], Sequence],
        *,
        length: Callable[[Prepared], int] = len,
    ) -> list[Answer]:
        """Answers to calls: `encode` tokenises some of them, in a thread (`in_pools`), and `forward` takes a batch of
        what it returns and gives a value for each.

        Args:
            length: how many tokens an encoded call has.
        """

        def answers(encoded: list[Prepared]) -> list[Answer]:
            lengths = [length(e) for e in encoded]
            values = self.run(lengths, lambda batch: forward([encoded[i] for i in batch]))
            return [
                Answer(value=value, usage=Usage(calls=1, prompt_tokens=tokens))
                for value, tokens in zip(values, lengths, strict=True)
            ]

        return in_pools(calls, encode, answers)


def padded_length(longest: int, limit: int | None) -> int:
    """The next multiple of 16, at most `limit` (a model's last position).

    Kernels keep a compiled plan and scratch memory for each shape they meet: a few lengths instead of hundreds keep
    memory flat, and whole tiles are faster than ragged ones.
    """
    padded = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    return padded if limit is None else max(longest, min(padded, limit))


def right_pad(
    sequences: Sequence[Sequence[int]], pad_id: int, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, L] padded on the right to `padded_length`, and their lengths [B]."""
    lengths = torch.tensor([len(s) for s in sequences])
    padded = torch.full((len(sequences), padded_length(int(lengths.max()), limit)), pad_id)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return padded, lengths
