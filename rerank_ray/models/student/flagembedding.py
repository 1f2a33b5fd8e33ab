"""Layer-wise decoder students in FlagEmbedding's MiniCPM layout (bge-reranker-v2-minicpm-layerwise, Chen et al. 2024).

FlagEmbedding's `LayerWiseFlagLLMReranker` reads it with the MiniCPM that it brings, and this package as kind
`layerwise`. MiniCPM with scales of 1 is Llama; Qwen 2 is that with biases on three of the attention's four projections.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from rerank_ray.errors import ModelError
from rerank_ray.models.instructed_pairs import DOCUMENT_PREFIX, QUERY_PREFIX
from rerank_ray.models.student import lora
from rerank_ray.models.student.base import Student, save_tokenizer
from rerank_ray.models.student.decoder import DecoderStudent

_MODEL_TYPES = ("llama", "mistral", "qwen2")
_COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id"),
)


def write_flagembedding(student: Student, folder: Path) -> None:
    """Write config, weights and tokenizer.

    Raises:
        ModelError: FlagEmbedding would score otherwise, or can't read such a model at all.
    """
    if reason := _why_not(student):
        raise ModelError(f"FlagEmbedding's layer-wise layout can't hold this student: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    weights = _weights(student)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = student.pretrained.config
    published = {key: getattr(config, key) for key in _COPIED} | {
        "architectures": ["LayerWiseMiniCPMForCausalLM"],
        "model_type": "minicpm",
        "start_layer": student.layers[0],
        "head_multi": True,
        "head_type": "simple",
        "scale_emb": 1,
        # They divide by √layers again.
        "scale_depth": math.sqrt(config.num_hidden_layers),
        "dim_model_base": config.hidden_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "attention_bias": any(name.endswith("q_proj.bias") for name in weights),
        "pad_token_id": student.tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "use_cache": False,
        "torch_dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    save_tokenizer(student.tokenizer, folder)
    _for_transformers_4(folder / "tokenizer_config.json")


def _why_not(student: Student) -> str | None:
    description, config = student.description, student.pretrained.config
    kind, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    if not isinstance(student, DecoderStudent):
        return f"it is for decoders with head linear, not for {kind} with head {description.head}"
    if description.instruction is None or (
        (description.query_prefix, description.document_prefix) != (QUERY_PREFIX, DOCUMENT_PREFIX)
    ):
        return (
            "FlagEmbedding puts `A: ` and `B: ` before the texts of a pair and an instruction behind it, and this one "
            "learnt another form: distil with student.instruction and without prefixes"
        )
    if len(student.layers) != student.layers[-1] - student.layers[0] + 1:
        return f"all layers from the first to the last have a head there, and here {list(student.layers)} have"
    if kind not in _MODEL_TYPES:
        return f"{kind} computes otherwise than MiniCPM; {', '.join(_MODEL_TYPES)} can be written"
    if rope["rope_type"] != "default":
        return f"its positions are of type {rope['rope_type']}, not default"
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
    if width is not None and width * heads != config.hidden_size:
        return f"its {heads} attention heads are {width} wide, which is not hidden_size / num_attention_heads"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < description.max_length:
        return f"its attention slides over {window} tokens"
    if getattr(config, "mlp_bias", False):
        return "its feed-forward layers have biases"
    return None


def _weights(student: DecoderStudent) -> dict[str, torch.Tensor]:
    model = lora.merged(student.pretrained)
    weights = {f"model.{name}": tensor for name, tensor in model.base_model.state_dict().items()}
    # One switch of the config is for the biases of all four projections, and Qwen 2 has three.
    for name in [n for n in weights if n.endswith("q_proj.bias")]:
        output = name.replace("q_proj", "o_proj")
        weights.setdefault(output, torch.zeros_like(weights[output.replace("bias", "weight")][:, 0]))
    heads = [student.early_heads[str(layer)] for layer in student.layers[:-1]] + [model.score]
    return weights | {f"lm_head.{number}.linear_head.weight": head.weight for number, head in enumerate(heads)}


def _for_transformers_4(path: Path) -> None:
    """FlagEmbedding's layer-wise reader needs transformers 4, which doesn't know the names of 5."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2) + "\n")
