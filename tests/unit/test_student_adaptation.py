"""Adapters, frozen parts, layers taken from a deeper model, gradient checkpointing: what is trained and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.students import DOCUMENTS, QUERIES, load, scores, start, stirred
from fixtures.tiny_models import tiny_decoder_folder, tiny_encoder_folder, tiny_t5_folder
from peft import PeftModel
from pydantic import ValidationError
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DiffLlamaConfig,
    ModernBertConfig,
    ModernBertModel,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from rerank_ray.distill.start import check_student
from rerank_ray.errors import ModelError
from rerank_ray.models.protocol import Pair
from rerank_ray.models.scalar_head import ScalarHead
from rerank_ray.models.student import Student, StudentPrompt, adapt, new_student, trained_parameters
from rerank_ray.settings.models import ScalarHeadSettings
from rerank_ray.settings.student import StudentSettings

CHAT = StudentPrompt(text="{query} | {passage} ? Yes or No", labels=("Yes", "No"))


def adapted(folder: Path, head: str = "linear", **given) -> Student:
    """A new student with settings of `adapt`, given together with others."""
    names = ("lora", "freeze", "gradient_checkpointing")
    student = start(folder, head, prompt=CHAT, **{k: v for k, v in given.items() if k not in names})
    chosen = {k: v for k, v in given.items() if k in names}
    adapt(student, StudentSettings(base=str(folder), head=head, **chosen))
    return student


def trained(student: Student) -> Student:
    """With every trained parameter moved at random, as training would."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained_parameters(student):
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    return student


def names(student: Student) -> set[str]:
    return {n for n, p in student.named_parameters() if p.requires_grad}


# Adapters

KINDS = {
    "linear": ("bert", {"head": "linear", "layers": (1, 3)}),
    "similarity": ("bert", {"head": "similarity", "gate": -1.0, "interaction": 1.0}),
    "decoder": ("llama", {"head": "linear", "layers": (1, 2)}),
    "yes_no": ("llama", {"head": "yes_no"}),
}


@pytest.fixture(params=KINDS)
def kind(request, tiny_bert: Path, tiny_llama: Path) -> tuple[Path, dict]:
    base, given = KINDS[request.param]
    return {"bert": tiny_bert, "llama": tiny_llama}[base], given


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_a_student_with_adapters_is_saved_as_it_is(kind: tuple[Path, dict], tmp_path: Path, save: str, dora: bool):
    """New adapters change no score. Trained ones do, and the saved folder has them; saving leaves the student alone."""
    folder, given = kind
    plain = scores(start(folder, prompt=CHAT, **given))
    student = adapted(folder, **given, lora={"rank": 4, "dora": dora, "save": save})
    torch.testing.assert_close(scores(student), plain, atol=1e-5, rtol=1e-5)
    expected = scores(trained(student))
    assert (expected - plain).abs().max() > 0.1
    student.save(tmp_path / "s")
    torch.testing.assert_close(scores(student), expected, atol=0, rtol=0)
    torch.testing.assert_close(scores(load(tmp_path / "s")), expected, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "s" / "model.safetensors").exists() is (save == "merged")
    assert any("lora" in name for name in student.state_dict())


def test_a_merged_student_needs_no_peft(tiny_llama: Path, tmp_path: Path):
    """Its weights have the names of the base model's and no others."""
    student = trained(adapted(tiny_llama, lora={"rank": 4}))
    student.save(tmp_path / "s")
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = student.encode(["cat"], ["dog"])[0]["input_ids"]
    with torch.no_grad():
        logit = model.eval()(torch.tensor([ids])).logits[0, 0]
    torch.testing.assert_close(logit, scores(student, ["cat"], ["dog"])[0, 0], atol=1e-4, rtol=1e-4)


def test_an_adapter_is_in_pefts_layout(tiny_llama: Path, tmp_path: Path):
    """PEFT reads it on the base model, head included; so does the `scalar_head` backend, as it reads RankLLaMA's."""
    student = trained(adapted(tiny_llama, lora={"rank": 4, "save": "adapter", "target_modules": ["q_proj", "v_proj"]}))
    student.save(tmp_path / "s")
    expected = scores(student, ["cat"], ["dog"])[0, 0]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    model = PeftModel.from_pretrained(base, tmp_path / "s").eval()
    with torch.no_grad():
        logit = model(torch.tensor([student.encode(["cat"], ["dog"])[0]["input_ids"]])).logits[0, 0]
    torch.testing.assert_close(logit, expected, atol=1e-4, rtol=1e-4)
    backend = ScalarHead(ScalarHeadSettings(path=str(tiny_llama), adapter=str(tmp_path / "s"), dtype="float32"))
    (answer,) = backend.run([Pair(query="cat", text="dog")])
    assert answer.value == pytest.approx(expected.item(), abs=1e-4)


def test_what_adapters_leave_to_train(tiny_bert: Path):
    """Matrices of the layers' linear maps, and what is new: the head, and no embedding, norm or pooler."""
    student = adapted(tiny_bert, lora={"rank": 4})
    found = names(student)
    assert {n for n in found if "lora_" not in n} == {"model.classifier.weight", "model.classifier.bias"}
    assert len([n for n in found if "lora_A" in n]) == 3 * 6
    some = names(adapted(tiny_bert, lora={"rank": 4, "target_modules": ["attention.self.query", "value"]}))
    assert len([n for n in some if "lora_A" in n]) == 3 * 2


def test_a_target_that_is_not_there_is_refused(tiny_bert: Path):
    with pytest.raises(ModelError, match="no linear layer is called 'q_proj'; there are dense, key, query, value"):
        adapted(tiny_bert, lora={"target_modules": ["query", "q_proj"]})


# Frozen parts


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_frozen_parts(tiny_bert: Path, tiny_llama: Path, base: str):
    folder = {"bert": tiny_bert, "llama": tiny_llama}[base]
    everything = names(adapted(folder))
    found = names(adapted(folder, freeze={"embeddings": True, "layers": 1}))
    parts = {"bert": ("embeddings.", ".layer.0."), "llama": ("embed_tokens.", ".layers.0.")}[base]
    assert found == {n for n in everything if not any(part in n for part in parts)}
    assert found < everything
    with pytest.raises(ModelError, match=r"freeze\.layers: 4: the model has . layers"):
        adapted(folder, freeze={"layers": 4})


# Layers of a deeper model


@pytest.mark.parametrize(("layers", "taken"), [((1, 3), (1, 3)), ((3,), (3,)), (2, (2,)), (3, (3,))])
@pytest.mark.parametrize("head", ["linear", "similarity"])
def test_layers_are_taken(tiny_bert: Path, tmp_path: Path, head: str, layers, taken: tuple[int, ...]):
    """A model of those layers' weights, made by renaming them in its state, gives the same hidden states."""
    student = stirred(start(tiny_bert, head, take_layers=layers, gate=-1.0))
    whole = AutoModel.from_pretrained(tiny_bert)
    config = whole.config
    config.num_hidden_layers = len(taken)
    weights = {k: v for k, v in whole.state_dict().items() if "encoder.layer" not in k}
    for new, old in enumerate(taken):
        prefix = f"encoder.layer.{old - 1}."
        weights |= {k.replace(prefix, f"encoder.layer.{new}."): v for k, v in whole.state_dict().items() if prefix in k}
    expected = AutoModel.from_config(config).eval()
    expected.load_state_dict(weights)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(student.pretrained.base_model.state_dict()[name], tensor, atol=0, rtol=0)
    student.save(tmp_path / "s")
    loaded = load(tmp_path / "s")
    assert loaded.layers == (len(taken),)
    torch.testing.assert_close(scores(loaded), scores(student), atol=1e-6, rtol=1e-6)


def test_a_shallower_decoder(tiny_llama: Path, tmp_path: Path):
    """The second layer alone, saved, is transformers' own model of one layer."""
    student = start(tiny_llama, "linear", take_layers=2)
    student.save(tmp_path / "s")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s").eval()
    assert model.config.num_hidden_layers == 1
    ids = torch.tensor([student.encode(["cat"], ["dog"])[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0], scores(student, ["cat"], ["dog"])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (1, 4), 4])
def test_layers_that_can_not_be_taken(tiny_bert: Path, layers):
    with pytest.raises(ModelError, match=r"give ascending layers of 1\.\.3, or a number up to 3"):
        start(tiny_bert, "linear", take_layers=layers)


def test_layers_without_positions_are_taken_with_their_kind(tmp_path: Path):
    """SmolLM3 lists which layers know positions, and every fourth does not."""
    base = tiny_decoder_folder(tmp_path / "base", SmolLM3Config, layers=8, num_key_value_heads=2)
    student = stirred(start(base, "linear", take_layers=2))
    assert student.pretrained.config.no_rope_layers == [1, 0, 1, 0]
    student.save(tmp_path / "s")
    torch.testing.assert_close(scores(load(tmp_path / "s")), scores(student))


def test_layers_that_are_what_they_are_by_their_number(tmp_path: Path):
    """ModernBERT's first layer has no norm before its attention: another in its place would lose its own when read."""
    more = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "local_attention": 8}
    base = tiny_encoder_folder(tmp_path / "m", ModernBertModel, ModernBertConfig, layers=4, **more)
    student = stirred(start(base, "linear", take_layers=(1, 3)))
    student.save(tmp_path / "s")
    torch.testing.assert_close(scores(load(tmp_path / "s")), scores(student))
    diff = tiny_decoder_folder(tmp_path / "d", DiffLlamaConfig, layers=4, num_key_value_heads=2)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
    mixed = tiny_decoder_folder(tmp_path / "q", Qwen3MoeConfig, layers=4, num_key_value_heads=2, **moe)
    for folder, reason in ((base, r"0\.attn_norm"), (diff, r"0\.self_attn\.lambda_init"), (mixed, r"0\.mlp")):
        settings = StudentSettings(base=str(folder), take_layers=2, max_length=64, max_query_length=16)
        with pytest.raises(ModelError, match=rf"take_layers: \[2, 4\]: .* by their number \({reason}"):
            check_student(settings)


@pytest.mark.parametrize("head", ["linear", "mvp"])
def test_a_t5_of_fewer_encoder_layers(tiny_t5: Path, tmp_path: Path, head: str):
    """The decoder keeps its own. T5's first layer alone holds the relative positions of all."""
    student = stirred(start(tiny_t5, head, take_layers=(1,)))
    student.save(tmp_path / "s")
    loaded = load(tmp_path / "s")
    assert (loaded.pretrained.config.num_layers, loaded.pretrained.config.num_decoder_layers) == (1, 2)
    torch.testing.assert_close(scores(loaded), scores(student))
    with pytest.raises(ModelError, match=r"take_layers: \[2\]: .*has_relative_attention_bias"):
        start(tiny_t5, head, take_layers=(2,))


# Gradient checkpointing


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_gradient_checkpointing_has_the_plain_gradient(kind: tuple[Path, dict], lora: dict | None):
    """The same gradient from less memory: what autograd holds between the passes is a part of what it held."""
    folder, given = kind

    def gradients(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        student = trained(adapted(folder, **given, lora=lora, gradient_checkpointing=checkpointing)).train()
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
            loss = student(**student.collate(student.encode(QUERIES[:3], DOCUMENTS[:3]))).square().sum()
        loss.backward()
        return [p.grad for p in trained_parameters(student) if p.grad is not None], sum(held)

    (plain, plain_held), (checkpointed, checkpointed_held) = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 4
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert checkpointed_held < 0.7 * plain_held


# Settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": "yes_no", "layers": [1, 2]}, "layers is for head linear and similarity, and the head is yes_no"),
        ({"prompt": "monot5"}, "prompt is for head yes_no and token_logit"),
        ({"head": "yes_no", "token": "x"}, "token is for head token_logit"),
        ({"lora": {}, "freeze": {"layers": 1}}, "freeze changes nothing with lora"),
        ({"lora": {"save": "adapter"}, "take_layers": 2}, "lora.save: adapter is of no use"),
    ],
)
def test_settings_that_would_do_nothing(given: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        StudentSettings(base="m", **given)


def test_dropout_that_is_a_number_in_attention_is_set_too(tmp_path: Path):
    """T5's attention hands its rate to a function; without it the same batch scores the same in training."""
    base = tiny_t5_folder(tmp_path / "t5")
    chosen = StudentSettings(base=str(base), head="token_logit", token="cat", max_length=48, max_query_length=8)
    student = new_student(chosen, StudentPrompt(text="{query} {passage}", labels=("cat",)))
    rates = [m.dropout for m in student.modules() if isinstance(getattr(m, "dropout", None), float)]
    assert rates
    assert min(rates) > 0
    adapt(student, chosen)
    batch = student.batch(student.encode(["cat"], ["dog cat bird"]))
    student.train()
    with torch.no_grad():
        torch.testing.assert_close(student(**batch), student(**batch), rtol=0, atol=0)


# Training on

GO_ON = {
    "layer-wise": ("bert", {"head": "linear", "layers": (1, 3)}),
    "similarity": ("bert", {"head": "similarity", "layers": (2, 3), "branch_layers": 1, "interaction": 1.0}),
    "bi_encoder": ("bert", {"head": "bi_encoder"}),
    "decoder": ("llama", {"head": "linear", "layers": (1, 2)}),
    "T5's encoder": ("t5", {"head": "linear"}),
    "adapters": ("llama", {"head": "linear", "lora": {"rank": 2, "save": "adapter"}}),
}


@pytest.mark.parametrize("name", GO_ON)
def test_a_student_that_is_trained_on_begins_as_it_was(name: str, tiny_bert: Path, tiny_llama: Path, tmp_path: Path):
    kind, given = GO_ON[name]
    base = {"bert": tiny_bert, "llama": tiny_llama}.get(kind) or tiny_t5_folder(tmp_path / "t5")
    student = trained(adapted(base, **given))
    student.save(tmp_path / "s")
    again = start(tmp_path / "s", **{k: v for k, v in given.items() if k != "lora"})
    torch.testing.assert_close(scores(again), scores(load(tmp_path / "s")), atol=1e-5, rtol=1e-5)
    assert scores(again).std() > 1e-3


def test_a_trained_head_of_other_layers_is_refused(tiny_bert: Path, tmp_path: Path):
    """Before weights are read, too."""
    stirred(start(tiny_bert, "linear", layers=(1, 3))).save(tmp_path / "s")
    sizes = {"max_length": 64, "max_query_length": 16}
    chosen = StudentSettings(base=str(tmp_path / "s"), head="linear", layers=(2, 3), **sizes)
    for weights in (True, False):
        with pytest.raises(
            ModelError, match=r"head linear was trained with layers: \(1, 3\), and \(2, 3\) is asked for"
        ):
            new_student(chosen, weights=weights)
    (tmp_path / "s" / "student.json").unlink()
    assert new_student(chosen).layers == (2, 3)
