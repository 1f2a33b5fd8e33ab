"""FlagEmbedding's own layer-wise reader on a student of ours that was exported for it.

It needs transformers 4, so it runs in a virtual environment of its own, which `make interop` makes; without it the test
is skipped.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from fixtures.instructed import INSTRUCTION, PAIRS, instructed_student
from fixtures.published import minicpm_layerwise
from fixtures.students import scores

from rerank_ray.export import export
from rerank_ray.models.backends import load_backend
from rerank_ray.models.protocol import Pair
from rerank_ray.settings.models import LayerwiseSettings

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build" / "flagembedding-layerwise" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(),
    reason="no build/flagembedding-layerwise: `make interop` makes it and runs this test",
)


def theirs(**arguments) -> torch.Tensor:
    """Scores [layers, pairs] by LayerWiseFlagLLMReranker."""
    worker = ROOT / "tests" / "fixtures" / "flagembedding_layerwise.py"
    asked = json.dumps([arguments, PAIRS])
    done = subprocess.run([PYTHON, worker], input=asked, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["model"] == "LayerWiseMiniCPMForCausalLM"
    return torch.tensor(answer["scores"])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_exported_student(kind: str, tmp_path: Path):
    student = instructed_student(tmp_path / "base", kind)
    student.save(tmp_path / "student")
    out = tmp_path / "out"
    export(str(tmp_path / "student"), str(out), form="flagembedding-layerwise", layer=None, int8=False, overwrite=False)
    queries, documents = (list(side) for side in zip(*PAIRS, strict=True))
    found = theirs(model_name_or_path=str(out), cutoff_layers=[2, 3, 4], prompt=INSTRUCTION, max_length=200)
    torch.testing.assert_close(found, scores(student, queries, documents), atol=1e-4, rtol=1e-4)


def test_a_published_checkpoint_in_our_reader(tmp_path: Path):
    """The layout of bge-reranker-v2-minicpm-layerwise, MiniCPM's scales included."""
    folder = minicpm_layerwise(tmp_path / "m")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    # Saved by transformers 5 without padding, which theirs needs.
    changed = tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": tokenizer["eos_token"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    found = theirs(model_name_or_path=str(folder), cutoff_layers=[2, 4])
    for number, layer in enumerate((2, 4)):
        settings = LayerwiseSettings(path=str(folder), dtype="float32", max_length=400, exit_layer=layer)
        answers = load_backend(settings).run([Pair(query=q, text=d) for q, d in PAIRS])
        torch.testing.assert_close(torch.tensor([a.value for a in answers]), found[number], atol=1e-4, rtol=1e-4)
