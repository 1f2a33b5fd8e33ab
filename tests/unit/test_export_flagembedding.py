"""Students in FlagEmbedding's layer-wise layout: read by our own reader and by a plain MiniCPM written from its config,
in float32."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.instructed import INSTRUCTION, PAIRS, instructed_student
from fixtures.students import load, scores, start
from safetensors.torch import load_file
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoTokenizer

from rerank_ray import cli
from rerank_ray.errors import ConfigError, ModelError
from rerank_ray.export import export
from rerank_ray.models.backends import load_backend
from rerank_ray.models.protocol import Pair
from rerank_ray.models.student import load_student
from rerank_ray.settings.models import LayerwiseSettings, ModelSettings
from rerank_ray.settings.student import StudentSettings

QUERIES, DOCUMENTS = (list(side) for side in zip(*PAIRS, strict=True))
FORM = "flagembedding-layerwise"


def exported(student, folder: Path, **given) -> Path:
    student.save(folder / "student")
    options = {"form": FORM, "layer": None, "int8": False, "overwrite": False} | given
    export(str(folder / "student"), str(folder / "out"), **options)
    return folder / "out"


class MiniCPM:
    """MiniCPM (Hu et al. 2024) on one sequence at a time: Llama with its embeddings scaled by `scale_emb` and what each
    block adds by `scale_depth` / √layers."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def scores(self, query: str, document: str) -> list[float]:
        """Of every layer with a head, for the pair in FlagEmbedding's form."""
        texts = [f"A: {query}", "\n", f"B: {document}", "\n", INSTRUCTION]
        ids = [self.tokenizer.bos_token_id, *(i for text in texts for i in self.ids(text))]
        config, w = self.config, self.weights
        hidden = w["model.embed_tokens.weight"][ids] * config["scale_emb"]
        scale = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
        found = []
        for number in range(config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            hidden = hidden + scale * self.attention(self.norm(hidden, f"{layer}.input_layernorm"), layer)
            x = self.norm(hidden, f"{layer}.post_attention_layernorm")
            gate, up, down = (w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            hidden = hidden + scale * linear(silu(linear(x, gate)) * linear(x, up), down)
            if number + 1 >= config["start_layer"]:
                head = w[f"lm_head.{number + 1 - config['start_layer']}.linear_head.weight"]
                found.append(float(self.norm(hidden, "model.norm")[-1] @ head[0]))
        return found

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def attention(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        heads, width = self.config["num_attention_heads"], x.shape[-1] // self.config["num_attention_heads"]
        q, k, v = (
            self.project(x, f"{layer}.self_attn.{n}_proj").view(len(x), -1, width).transpose(0, 1) for n in "qkv"
        )
        repeats = heads // self.config["num_key_value_heads"]
        k, v = (self.rotated(k).repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0))
        attended = scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        return self.project(attended.transpose(0, 1).reshape(len(x), -1), f"{layer}.self_attn.o_proj")

    def project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """x [heads, positions, width], each pair (i, i + width/2) turned by position · theta^(−2i/width)."""
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1])[:, None] * self.config["rope_theta"] ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_same_scores_at_every_layer(kind: str, tmp_path: Path):
    """Ours and plain MiniCPM score what the student scores; Qwen's missing bias is zero, its first token the last."""
    student = instructed_student(tmp_path / "base", kind)
    expected = scores(student, QUERIES, DOCUMENTS)
    out = exported(student, tmp_path)
    plain = MiniCPM(out)
    assert (plain.config["start_layer"], plain.config["model_type"]) == (2, "minicpm")
    assert plain.config["attention_bias"] is (kind == "qwen2")
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer.get("additional_special_tokens") == (["<|end|>"] if kind == "qwen2" else None)
    assert (tokenizer["tokenizer_class"], "extra_special_tokens" in tokenizer) == ("PreTrainedTokenizerFast", False)
    with torch.no_grad():
        theirs = torch.tensor([plain.scores(q, d) for q, d in PAIRS]).T
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)
    for number, layer in enumerate((2, 3, 4)):
        settings = LayerwiseSettings(
            path=str(out), dtype="float32", max_length=300, exit_layer=layer, instruction=INSTRUCTION
        )
        answers = load_backend(settings).run([Pair(query=q, text=d) for q, d in PAIRS])
        torch.testing.assert_close(torch.tensor([a.value for a in answers]), expected[number], atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[2]).abs().max() > 0.1


def test_up_to_a_layer_from_the_command_line(tmp_path: Path):
    """Layers 2 and 3 of four, and a card whose configuration gives their scores."""
    student = instructed_student(tmp_path / "base")
    student.save(tmp_path / "student")
    out = tmp_path / "out"
    arguments = ["export", str(tmp_path / "student"), "--format", FORM, "--layer", "3", "--out", str(out)]
    assert cli.main(arguments) == 0
    plain = MiniCPM(out)
    assert plain.config["num_hidden_layers"] == 3
    with torch.no_grad():
        found = torch.tensor([plain.scores(q, d) for q, d in PAIRS]).T
    torch.testing.assert_close(found, scores(student, QUERIES, DOCUMENTS)[:2], atol=1e-4, rtol=1e-4)
    card = (out / "README.md").read_text()
    assert "head on layers 2 to 3" in card
    ranker = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["ranker"]
    assert ranker["model"] == {
        "kind": "layerwise",
        "path": "FOLDER",
        "max_length": 300,
        "exit_layer": 3,
        "instruction": INSTRUCTION,
    }
    # FlagEmbedding cuts to max_length + separator + instruction and then adds both again.
    around = 2 * (len(plain.ids("\n")) + len(plain.ids(INSTRUCTION)))
    assert f"query_max_length=40,\n    max_length={300 - around},\n    prompt={INSTRUCTION!r}" in card
    assert "cutoff_layers=[3]" in card


def test_adapters_are_merged(tmp_path: Path):
    """LoRA adapters that training left apart are in the weights of the layout."""
    from fixtures.students import stirred

    from rerank_ray.models.student import adapt

    base = tmp_path / "base"
    instructed_student(base)
    lora = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"], "save": "adapter"}
    given = {"layers": (2, 3, 4), "instruction": INSTRUCTION, "max_length": 300, "max_query_length": 40}
    student = stirred(start(base, "linear", **given))
    adapt(student, StudentSettings.model_validate({"base": str(base), "lora": lora, **given}))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    expected = scores(student.eval(), QUERIES, DOCUMENTS)
    out = exported(student, tmp_path)
    assert not any("lora" in name for name in load_file(out / "model.safetensors"))
    plain = MiniCPM(out)
    with torch.no_grad():
        found = torch.tensor([plain.scores(q, d) for q, d in PAIRS]).T
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_how_an_instructed_pair_is_put(tmp_path: Path):
    """As FlagEmbedding puts it; the query is cut to its length and the document to the rest, saved and loaded too."""
    student = instructed_student(tmp_path / "base", max_length=100, max_query_length=10)
    student.save(tmp_path / "s")
    for one in (student, load(tmp_path / "s")):
        ids = one.encode(["cat", "cat " * 50], ["dog", "dog " * 90])
        texts = [one.tokenizer.decode(e["input_ids"]) for e in ids]
        assert texts[0] == f"<s>A: cat\nB: dog\n{INSTRUCTION}"
        assert len(ids[1]["input_ids"]) == 100
        assert texts[1].endswith(f"\n{INSTRUCTION}")
        query = one.tokenizer.encode(texts[1].split("\n")[0], add_special_tokens=False)
        assert len(query) == 1 + 10


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"instruction": None}, "distil with student.instruction"),
        ({"query_prefix": "Q: "}, "distil with student.instruction and without prefixes"),
        ({"layers": (2, 4)}, r"all layers from the first to the last have a head there, and here \[2, 4\] have"),
    ],
)
def test_students_that_the_layout_cannot_hold(given: dict, said: str, tmp_path: Path):
    student = instructed_student(tmp_path / "base", **given)
    with pytest.raises(ModelError, match=said):
        exported(student, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen3"}, "qwen3 computes otherwise than MiniCPM; llama, mistral, qwen2 can be written"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "positions are of type llama3"),
        ({"head_dim": 16}, "its 4 attention heads are 16 wide"),
        ({"sliding_window": 299}, "slides over 299 tokens"),
        ({"mlp_bias": True}, "biases"),
    ],
)
def test_backbones_that_the_layout_cannot_hold(changes: dict, said: str, tmp_path: Path):
    from rerank_ray.models.student.flagembedding import write_flagembedding

    student = instructed_student(tmp_path / "base")
    student.pretrained.config = type("Config", (), vars(student.pretrained.config) | {"model_type": "llama"} | changes)
    with pytest.raises(ModelError, match=said):
        write_flagembedding(student, tmp_path / "out")


def test_encoders_have_no_instruction(tiny_bert: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="a bert is no decoder, so no instruction can stand behind its pairs"):
        start(tiny_bert, "linear", instruction=INSTRUCTION)
    with pytest.raises(ModelError, match="for decoders with head linear, not for bert with head linear"):
        exported(start(tiny_bert, "linear", layers=(2, 3)), tmp_path)
    with pytest.raises(ConfigError, match="--int8 is of --format onnx"):
        export(str(tmp_path / "student"), str(tmp_path / "out"), form=FORM, layer=None, int8=True, overwrite=False)


def test_an_instruction_leaves_room_for_the_pair(tiny_llama: Path):
    with pytest.raises(ModelError, match=r"student: max_length \(64\) leaves \d+ tokens for query and passage"):
        start(tiny_llama, "linear", instruction=INSTRUCTION, max_query_length=50)


def test_an_instructed_student_is_no_cross_encoder_of_sentence_transformers(tmp_path: Path):
    """Its card says how it is read here: sentence-transformers would leave the instruction out."""
    out = exported(instructed_student(tmp_path / "base"), tmp_path, form="transformers")
    card = (out / "README.md").read_text()
    assert "CrossEncoder(" not in card
    assert "kind: cross_encoder" in card
    student = load_student(ModelSettings(path=str(out)))
    torch.testing.assert_close(
        scores(student, QUERIES, DOCUMENTS)[0],
        scores(instructed_student(tmp_path / "base"), QUERIES, DOCUMENTS)[-1],
        atol=1e-4,
        rtol=1e-4,
    )
