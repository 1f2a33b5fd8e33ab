"""Students: what they start from, and what of them is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rerank_ray.config import Fraction, Settings
from rerank_ray.settings.models import ModelSettings
from rerank_ray.settings.optimizer import OptimizerSettings

StudentHead = Literal["linear", "similarity", "yes_no", "token_logit", "bi_encoder", "colbert", "mvp"]
_LAYERED: tuple[StudentHead, ...] = ("linear", "similarity")
PROMPTED_HEADS: tuple[StudentHead, ...] = ("yes_no", "token_logit")
_PREFIXED: tuple[StudentHead, ...] = ("linear", "bi_encoder")


class ExitWarmUpSettings(Settings):
    """What early exits of a similarity student learn before the labels: to score as its untrained last layer does.

    An early layer's states were never trained to be compared. In each step one training list's query, variants of it
    and spans of its passages (the inverse cloze task, Lee et al. 2019) are scored against its passages at every exit,
    and the KL to the untrained last layer's distribution is taken. No label is looked at. All layers train, and
    embeddings do not.
    """

    steps: PositiveInt = 300
    """Optimizer steps."""
    texts: tuple[str, ...] = ()
    """Candidate Parquet whose lists are drawn from beside the training lists, but for those of held-out queries: a few
    training lists are soon learnt by heart."""
    passages: Annotated[int, Field(ge=2)] = 28
    """Passages of a list that a step draws."""
    spans: NonNegativeInt = 40
    """Spans of 3 to 9 words that a step draws from the list's other passages, to be queries beside the list's own. A
    span of one of those passages would tell it from all others by its words alone."""
    variants: NonNegativeInt = 20
    """Variants of the list's query, to be queries too: each keeps some 0.6 of the words, and every other one has one to
    three of another passage's among them."""
    replaced_words: Fraction = 0.1
    """Share of the passages' words that are exchanged for other passages', after every other passage was cut at its
    ends, so that none is read twice; 0 takes the passages as they are."""
    max_passage_length: PositiveInt = 128
    """Tokens of a passage; longer ones are cut."""
    temperature: PositiveFloat = 0.2
    """Divides the scores of both sides."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-4)
    """`averaging` has no part in it."""


class LoraSettings(Settings):
    """Low-rank adapters on linear layers in place of full training (Hu et al. 2022); new parameters are trained whole.

    Their rate is the optimizer's `learning_rate`, for which 1e-4 is usual.
    """

    rank: PositiveInt = 16
    """Of each adapter's two matrices."""
    alpha: PositiveInt = 32
    """An adapter's product is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Of what an adapter reads."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Ends of the linear layers' names, for example `[q_proj, v_proj]`; null is every linear layer but the head."""
    dora: bool = False
    """Learn the weights' magnitudes apart from their directions (DoRA, Liu et al. 2024)."""
    save: Literal["merged", "adapter"] = "merged"
    """`merged` adds the adapters to the weights of the saved student, which then loads everywhere; `adapter` saves them
    alone, in PEFT's layout, and loading needs `base`."""


class FreezeSettings(Settings):
    """Parts of the pretrained model that training leaves as they are."""

    embeddings: bool = False
    """Of tokens, and what else the architecture keeps with them; an output layer that shares their weights too."""
    layers: NonNegativeInt = 0
    """The first so many layers; of a seq2seq model, its encoder's."""


class StudentSettings(Settings):
    """The student and how it starts."""

    base: str
    """Pretrained model to start from: hub id, folder, `package://` or GGUF file. A student of ours with the same head
    goes on from that, whatever gate, scale and interaction are."""
    revision: str | None = None
    """Hub commit or tag."""
    head: StudentHead = "linear"
    """`linear` is the architecture's own head, on the first token of an encoder or the last of a decoder, and loads
    anywhere; `similarity` makes a cross-encoder start from a bi-encoder's cosine. Decoders and seq2seq models stay
    language models with `yes_no`, the log-odds of a prompt's two answers, and `token_logit`, one token's logit.
    `bi_encoder` (cosine) and `colbert` (MaxSim) embed query and document apart. `mvp`, of T5 kinds, compares the
    passages of a list."""
    layers: tuple[PositiveInt, ...] | None = None
    """Layers that get a head, ascending, the last one included: a layer-wise student. null is the last layer only."""
    max_length: PositiveInt = 256
    """Tokens of query and document together; where they are encoded apart, the document has what the query leaves."""
    max_query_length: Annotated[int, Field(ge=4)] = 64
    """Tokens of the query, special ones among them, of which there are three at most; longer ones are cut."""
    query_prefix: str | None = None
    """linear and bi_encoder: put before every query; null is `query: ` for decoders with a linear head, as RankLLaMA's,
    `Query: ` for T5's encoder, and otherwise nothing."""
    document_prefix: str | None = None
    """linear and bi_encoder: put before every document; null as for queries."""
    instruction: str | None = None
    """linear, decoders: what stands after query and document, as FlagEmbedding's LLM rerankers have it: the pair is
    then `[bos] query "\\n" document "\\n" instruction` with the prefixes `A: ` and `B: `, and `rerank-ray export` can
    write the layer-wise student for FlagEmbedding. null joins a pair as the tokenizer does, with nothing behind."""
    prompt: str = "yes_no"
    """yes_no and token_logit: a built-in template's name or the path of a YAML template, of method yes_no."""
    token: str = "<extra_id_10>"
    """token_logit: whose logit after the prompt is the score, in place of the template's answers; the default is
    RankT5's, a word that T5 never learnt to say."""
    views: PositiveInt = 4
    """mvp: vectors of each passage, read at as many of T5's sentinel tokens (MVP, Na et al. 2025)."""
    gate: float = -8.0
    """similarity: initial attention bias between the segments; −8 shuts it, 0 leaves attention free."""
    scale: PositiveFloat | tuple[PositiveFloat, ...] = 4.0
    """similarity, bi_encoder, colbert: initial factor of cosine and MaxSim, which sets the untrained scores on
    the scale of its labels: on SPLADE's lists of TREC-DL MiniLM's KL to z-scored labels is 0.49 at 4, 0.53 at 2 and
    1.09 at 12. A list has one for each of `layers`."""
    interaction: Annotated[float, Field(ge=0.0)] | tuple[Annotated[float, Field(ge=0.0)], ...] = 2.0
    """similarity: initial weight of MaxSim beside the cosine; 0 starts as the bi-encoder itself. Of 0, 0.5, 1, 2 and 4
    the untrained MiniLM student agrees best with SPLADE's lists of TREC-DL 2021 and 2022 at 2 (nDCG@10 against the
    teacher's first ten: 0.48, and 0.40 at 0). A list has one for each of `layers`: an early layer's cosine tells
    little (MiniLM's fourth: 0.18), its MaxSim more (0.39)."""
    branch_layers: NonNegativeInt = 0
    """similarity, with several `layers`: how many of its layers each early exit has to itself, copies of the
    backbone's last to start with; the layers below are shared (BranchyNet's side branches, Teerapittayanon et al.
    2016). A fixed exit costs what it does without; every early exit that adaptive exits try costs so many layers
    more."""
    exit_warm_up: ExitWarmUpSettings | None = None
    """similarity, with several `layers`: train the early exits on unlabelled text first."""
    dropout: Fraction | None = 0.0
    """Hidden and attention dropout; null keeps the checkpoint's. Any dropout on attention rules out its fused kernel,
    which doubles the memory of a step."""
    take_layers: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Start from some of the layers of `base`, which is then a smaller model: these, counted from 1 and ascending, or
    with one number n every n-th (Shleifer & Rush 2020). null is all. A seq2seq model's are its encoder's; T5's
    first must be among them, for it alone knows positions."""
    freeze: FreezeSettings = FreezeSettings()
    lora: LoraSettings | None = None
    """null trains all weights that are not frozen."""
    gradient_checkpointing: bool = False
    """Compute each layer again for its backward, for the memory of long inputs and deep models."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint ships."""
    allow_pickle: bool = False
    """Load `.bin` weights; unpickling runs code of whoever made the file."""

    @model_validator(mode="after")
    def _the_query_leaves_room(self) -> StudentSettings:
        if self.max_query_length > self.max_length - 8:
            raise ValueError(
                f"max_query_length ({self.max_query_length}) must be at most max_length ({self.max_length}) − 8, or no "
                "token is left for the document"
            )
        return self

    @model_validator(mode="after")
    def _each_exit_starts(self) -> StudentSettings:
        count = len(self.layers or (None,))
        for name in ("scale", "interaction"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != count:
                raise ValueError(f"{name} has {len(given)} entries for {count} layer(s) with a head (layers)")
        for name in ("exit_warm_up", "branch_layers"):
            if getattr(self, name) and (self.head != "similarity" or count == 1):
                raise ValueError(f"{name} is for head: similarity with several layers: leave it out")
        if self.branch_layers and self.branch_layers >= self.layers[0]:
            raise ValueError(
                f"branch_layers ({self.branch_layers}) must be below the first of layers ({self.layers[0]}), or its "
                "exit shares no layer with the others"
            )
        return self

    @model_validator(mode="after")
    def _every_option_counts(self) -> StudentSettings:
        owners = {"layers": _LAYERED, "query_prefix": _PREFIXED, "document_prefix": _PREFIXED}
        owners |= {"prompt": PROMPTED_HEADS, "token": ("token_logit",), "instruction": ("linear",), "views": ("mvp",)}
        for option, heads in owners.items():
            if getattr(self, option) != type(self).model_fields[option].default and self.head not in heads:
                raise ValueError(f"{option} is for head {' and '.join(heads)}, and the head is {self.head}")
        if self.lora is not None and self.branch_layers:
            raise ValueError("branch_layers are trained as they are, and lora trains adapters alone: leave one out")
        if self.lora is not None and self.freeze != FreezeSettings():
            raise ValueError("freeze changes nothing with lora, which trains adapters alone: leave it out")
        if self.lora is not None and self.lora.save == "adapter" and self.take_layers is not None:
            raise ValueError(
                "lora.save: adapter is of no use without all layers of base: leave save or take_layers out"
            )
        return self

    def model_settings(self) -> ModelSettings:
        return ModelSettings(
            path=self.base,
            revision=self.revision,
            max_length=self.max_length,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )
