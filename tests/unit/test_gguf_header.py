"""A GGUF file's header, read once while a model is loaded."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from rerank_ray.models.gguf_header import read_once

VOCABULARY = ["<s>", "a", "🦟", "הפרעוש"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = str(tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([0.0, -1.5, -2.0, float("-inf")])
    writer.add_tensor("blk.0.attn_q.weight", np.arange(32, dtype=np.float32).reshape(4, 8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(reader: gguf.GGUFReader) -> tuple[dict, dict]:
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: np.array(t.data) for t in reader.tensors}


def test_it_is_read_once_and_says_the_same(file: str):
    fields, tensors = contents(gguf.GGUFReader(file))
    assert fields["tokenizer.ggml.tokens"] == VOCABULARY
    with read_once(file):
        reader = gguf.GGUFReader(file)
        assert gguf.GGUFReader(file) is reader
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3) is not names
        assert contents(reader)[0] == fields
        np.testing.assert_equal(contents(reader)[1], tensors)
        with read_once(file):
            assert gguf.GGUFReader(file) is reader
        assert gguf.GGUFReader(file) is reader
    with read_once(file):
        assert gguf.GGUFReader(file) is not reader


def test_the_package_is_left_as_it_was(tmp_path: Path):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(4))
    with pytest.raises(ValueError, match="version"), read_once(str(broken)):
        gguf.GGUFReader(str(broken))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
