"""Recipes: strict YAML in, one frozen record out; every complaint carries ``file:line:column``.

The schema is pydantic's; positions come from the YAML node tree, so that an error found by pydantic, or later by the plan,
can name the line that caused it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from convert.algorithms import ALGORITHMS, CORRECTIONS, TRANSFORMS
from convert.datasets import is_hub_id
from convert.runtimes import HARNESSED, RUNTIMES
from formats import FORMATS
from formats.compatibility import HARDWARE
from formats.errors import RecipeError
from formats.scheme import CACHES, SCHEMES, Quality
from formats.tensors import GRAPHS

#: A recipe is written by a person; whatever unfolds to more nodes than this is an attack or an accident.
MAX_NODES = 20_000

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?i?B)")
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

Path_ = tuple[str | int, ...]


def _one_of(known: Mapping[str, object], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"no {what} is called {value!r}{_nearest(value, known)}; known are {', '.join(known)}")
        return value

    return AfterValidator(check)


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{name} is there twice")
    return names


def _parse_size(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise ValueError(f"{value!r} is no size; write 5GB, 500MB or 2GiB")
    number, unit = match.groups()
    return int(float(number) * (1024 if "i" in unit else 1000) ** _UNITS[unit.rstrip("iB")])


#: What has a compute capability, for who knows the card and not the number: `h100` looks most like ``sm_100``, which is another one.
_CARDS = {
    "sm_75": "T4, RTX 20",
    "sm_80": "A100",
    "sm_86": "A10, A40, RTX 30",
    "sm_89": "L4, L40S, RTX 40",
    "sm_90": "H100, H200",
    "sm_100": "B200, GB200",
    "sm_120": "RTX 50, RTX PRO 6000",
}


def _check_hardware(value: str) -> str:
    if value not in HARDWARE:
        known = ", ".join(f"{name} ({_CARDS[name]})" if name in _CARDS else name for name in HARDWARE)
        meant = next((name for name, cards in _CARDS.items() if value.upper() in cards.split(", ")), "")
        hint = f" (did you mean {meant}?)" if meant else _nearest(value, HARDWARE) if value.startswith(("sm", "cpu")) else ""
        raise ValueError(f"no hardware is called {value!r}{hint}; known are {known}")
    return value


def _check_strength(value: object) -> object:
    if value != "search" and not (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1):
        raise ValueError(f"{value!r} is no strength; write a number from 0 to 1, or search")
    return value


SchemeName = Annotated[str, _one_of(SCHEMES, "scheme")]
Strength = Annotated[Annotated[float, Field(ge=0, le=1)] | Literal["search"], BeforeValidator(_check_strength)]
Bytes = Annotated[int, BeforeValidator(_parse_size), Field(ge=1_000_000)]
Positive = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Rounding(_Section):
    """`rtn`: round to nearest."""

    clip: bool = False
    """Also try scales below the largest magnitude, and take the one with the smallest squared error."""


class Gptq(_Section):
    """`gptq`: each column's error is made up for in the columns after it, as the inputs that calibration saw weigh them."""

    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """The share of the mean diagonal that is added to the Hessian; ten and a hundred times as much where that is not enough."""
    block_size: Positive = 128
    """Columns that are updated together."""
    activation_order: bool = True
    """Take the columns with the largest inputs first."""
    static_groups: bool = True
    """Fix the scales of groups beforehand."""
    clip: bool = False
    """Also try scales below the largest magnitude."""


class Smoothquant(_Section):
    """`smoothquant`: large input channels are divided, and the weights that read them multiplied, by the same factors."""

    alpha: Strength = 0.5
    """How much of the difficulty moves from inputs to weights; `search` tries several for each group."""
    uncovered: Literal["error", "leave"] = "error"
    """A layer that nothing feeds which could take up the factors is an `error`; `leave` quantizes it as it is, and the ledger says so."""


class Awq(_Section):
    """`awq`: input channels that carry much get finer steps of the weight: its columns are multiplied, and what makes the input
    divided. For schemes of weights alone."""

    ratio: Strength = "search"
    """The exponent of each channel's mean magnitude; `search` tries several for each group."""
    uncovered: Literal["error", "leave"] = "error"
    """A layer that nothing feeds which could take up the factors is an `error`; `leave` quantizes it as it is, and the ledger says so."""


class BiasCorrection(_Section):
    """`bias_correction`, behind what chooses the codes: the mean error at the output is taken out of the bias, in layers that have one."""


class Recover(_Section):
    """`recover`, behind what chooses the codes: weights of quantized layers, their scales and those of static inputs are trained, the
    rest of the model stays as it is, until the quantized model predicts what the source predicts (quantization-aware distillation)."""

    steps: Positive = 500
    """Steps of the optimizer."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Train no longer than this: where fewer steps are expected to fit, the learning rate falls to its end sooner, and the manifest records
    that it was the clock's doing. Otherwise the same recipe gives the same bytes."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Of weights, at most: Adam moves an element by about so much in a step. It rises over the first twentieth and falls along a cosine."""
    scale_learning_rate: Annotated[float, Field(ge=0)] = 1e-3
    """Of scales: their relative change in a step, at most; 0 leaves them."""
    batch: Positive = 8
    """Sequences in a step."""
    generated: Annotated[int, Field(ge=0)] = 0
    """So many sequences that the source writes itself, from random first tokens, are trained on beside the calibration text."""
    mode: Literal["auto", "logits", "blocks"] = "auto"
    """`logits`: the whole model at once, against the source's predictions; `blocks`: block after block, each against the source's hidden
    states, in the memory of one; `auto`: `logits` where that fits into memory."""
    seed: int = 0
    """Chooses the order of sequences, and what is generated."""

    @model_validator(mode="after")
    def _text(self) -> Recover:
        if self.mode == "blocks" and self.generated:
            raise ValueError(
                "blocks are trained on calibration text alone, behind which the source's hidden states are known; leave generated out"
            )
        return self


class Step(_Section):
    """One algorithm and its options."""

    rtn: Rounding | None = None
    gptq: Gptq | None = None
    smoothquant: Smoothquant | None = None
    awq: Awq | None = None
    bias_correction: BiasCorrection | None = None
    recover: Recover | None = None

    @property
    def name(self) -> str:
        return next(iter(self.model_fields_set))

    @model_validator(mode="after")
    def _one(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"one algorithm each, here are {', '.join(sorted(self.model_fields_set)) or 'none'}; write a list")
        return self


def _parse_steps(value: object) -> object:
    """`gptq`, `{gptq: {...}}` or a list of these."""
    items = value if isinstance(value, list | tuple) else [value]
    known = (*ALGORITHMS, *TRANSFORMS, *CORRECTIONS)
    for item in items:
        if isinstance(item, str) and item not in known:
            raise ValueError(f"no algorithm is called {item!r}{_nearest(item, known)}; known are {', '.join(known)}")
    # A name with nothing behind its colon means what the name alone does.
    return tuple({item: {}} if isinstance(item, str) else _without_nulls(item) for item in items)


def _without_nulls(step: object) -> object:
    return {name: {} if options is None else options for name, options in step.items()} if isinstance(step, dict) else step


def _plain_step(step: Step) -> dict[str, Any]:
    return {step.name: getattr(step, step.name).model_dump(mode="json")}


Steps = Annotated[tuple[Annotated[Step, PlainSerializer(_plain_step)], ...], BeforeValidator(_parse_steps), Field(min_length=1)]


_ROUNDED = (Step(rtn=Rounding()),)


class Rule(_Section):
    """What becomes of the tensors that `match` names; the first rule that matches a tensor wins."""

    match: Annotated[str, Field(min_length=1)]
    """`linear` (every linear layer but the output head), the name of a module or its last parts (`lm_head`,
    `mlp.down_proj`), a glob over whole names (`model.layers.0.*`), or `re:` and a regular expression over whole names."""
    scheme: SchemeName | None = None
    """How to quantize, for instance `int8-dynamic` or `fp8-dynamic`."""
    algorithm: Steps = _ROUNDED
    """How the codes are chosen: `rtn`, `gptq`, or a list of algorithms in order, each a name or with its options, for instance
    `[{smoothquant: {alpha: 0.6}}, gptq]`."""
    observer: Literal["absmax", "percentile", "mse"] | None = None
    """Of a static scheme: what of an input its scale holds: its largest magnitude (`absmax`, unless said otherwise), all but a share of
    its values (`percentile`), or what leaves the smallest squared error (`mse`)."""
    percentile: Annotated[float, Field(gt=50, le=100)] | None = None
    """Of `observer: percentile`: the share of values in % that the scale holds, 99.999 unless given."""
    keep: bool = False
    """Leave these tensors as they are; `why` then says why."""
    why: str | None = None
    """The reason, for the ledger, the report and the model card; `keep` must have one."""

    @model_validator(mode="after")
    def _one_fate(self) -> Rule:
        if self.keep == (self.scheme is not None):
            raise ValueError("a rule needs either a scheme or keep: true")
        if self.keep and not self.why:
            raise ValueError("keep: true needs a why")
        if self.keep and self.algorithm != _ROUNDED:
            raise ValueError("what is kept has no codes that an algorithm could choose; leave algorithm out")
        names = [step.name for step in self.algorithm]
        while len(names) > 1 and names[-1] in CORRECTIONS:
            names.pop()
        if "recover" in [step.name for step in self.algorithm[:-1]]:
            raise ValueError("recover trains what the other algorithms made; write it last, and once")
        *before, last = names
        if last not in ALGORITHMS:
            raise ValueError(f"{last} chooses no codes; end the list with {' or '.join(ALGORITHMS)}")
        if sum(name in TRANSFORMS for name in before) > 1:
            raise ValueError(f"{' and '.join(before)} scale the same channels; choose one")
        if any(name in ALGORITHMS for name in before):
            raise ValueError(f"{next(name for name in before if name in ALGORITHMS)} chooses the codes, so nothing can come after it")
        moving = any(step.gptq and not step.gptq.static_groups and step.gptq.activation_order for step in self.algorithm)
        if moving and self.scheme and SCHEMES[self.scheme].weight.tile.columns is not None:
            raise ValueError("gptq: groups whose scales are taken on the way need columns in their places; add activation_order: false")
        if self.observer and not (self.scheme and SCHEMES[self.scheme].static):
            raise ValueError(f"observer chooses the scale of a static input, and {self.scheme or 'what is kept'} has none; leave it out")
        if self.percentile is not None and self.observer != "percentile":
            raise ValueError("percentile is for observer: percentile")
        return self


class Limits(_Section):
    """Bounds that the reloaded artifact must meet on held-out text. What is left out follows from the scheme."""

    kl_nats: Annotated[float, Field(gt=0)] | None = None
    """Mean KL divergence from the source, nats a token, at most."""
    top1: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of tokens with the same most likely successor, at least."""
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    """Perplexity over the source's, at most."""
    relative_error: Annotated[float, Field(gt=0)] | None = None
    """Of a model that predicts no tokens: mean error of its last hidden states, as a share of their length, at most."""
    answers: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of `validation.prompts`: the share answered right may be so much smaller than the source's, for instance 0.02."""
    recovery: Annotated[float, Field(gt=0)] | None = None
    """Of each of `validation.tasks`: the score as a share of the source's, at least, for instance 0.98."""


def applicable(*, predicts: bool) -> tuple[str, ...]:
    """The limits that a model can meet or miss: what is compared follows from what it gives, next tokens or hidden states."""
    return ("kl_nats", "top1", "perplexity_ratio", "answers", "recovery") if predicts else ("relative_error",)


class Options(_Section):
    """What only one format can say."""

    llm_int8_threshold: Annotated[float, Field(ge=0)] | None = None
    """bitsandbytes: activations of at least this magnitude are multiplied in 16 bit; 0 for none. 6.0 unless given."""
    floats: Literal["float32", "float16"] | None = None
    """onnx: what is not quantized, keys and values too; float32 unless given."""
    tied_embedding: Literal["float", "shared"] | None = None
    """onnx-matmulnbits: a tied head that is quantized leaves the embedding as floats beside it, unless both share the codes."""
    attention: Literal["standard", "gqa"] | None = None
    """onnx: the standard's Attention unless given, or ONNX Runtime's GroupQueryAttention, whose cache can be one buffer."""
    inputs: Literal["float", "int8x2"] | None = None
    """onnx: inputs of products of INT8 weights alone are floats unless given, which ONNX Runtime rounds to INT8 in blocks of 32; or two
    INT8 codes each, 14 bits under a scale a token, multiplied as integers: the same numbers in every runtime, and faster on a CPU."""


#: The rungs that are climbed unless told otherwise; each is a list of algorithms in order, ``mixed``, or ``recover``.
LADDER = ("rtn", "smoothquant", "smoothquant+gptq", "mixed", "recover")
#: What a rung asks of algorithms beyond their defaults: the user wants what is cheapest, not to be asked which layers cannot be smoothed.
_RUNG_OPTIONS: dict[str, dict[str, Any]] = {"smoothquant": {"alpha": "search", "uncovered": "leave"}, "recover": {"minutes": 10.0}}


def _check_choices(choices: tuple[str, ...]) -> tuple[str, ...]:
    for choice in choices:
        if choice != "keep" and choice not in SCHEMES:
            raise ValueError(f"no scheme is called {choice!r}{_nearest(choice, SCHEMES)}; known are keep, {', '.join(SCHEMES)}")
        if choice != "keep" and SCHEMES[choice].static:
            raise ValueError(f"{choice} has static inputs, which mixed does not calibrate for a group; choose a dynamic scheme")
    if not choices:
        raise ValueError("mixed needs a choice; write [keep]")
    return _once(choices)


class Budget(_Section):
    """The loss that is acceptable, measured as the limits are: on held-out text, reloaded in every runtime that the target names."""

    kl_nats: Annotated[float, Field(gt=0)] | None = None
    """Mean KL divergence from the source, nats a token, at most."""
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    """Perplexity over the source's, at most."""
    tokens: Annotated[int, Field(ge=16)] = 1024
    """Tokens of calibration text on which `mixed` measures what each group of layers loses alone."""
    tries: Positive = 3
    """How many choices `mixed` makes, converts and measures at most."""
    choices: Annotated[tuple[str, ...], AfterValidator(_check_choices), Field(strict=False)] = ("keep",)
    """What `mixed` may make of a group of layers that loses too much: `keep` it in 16 bit, or quantize it in another scheme, for instance
    `[fp8-dynamic, keep]`, which takes no more bytes than INT8."""

    @model_validator(mode="after")
    def _some(self) -> Budget:
        if self.kl_nats is None and self.perplexity_ratio is None:
            raise ValueError("a budget needs kl_nats, perplexity_ratio or both")
        return self


def _check_instead(instead: str) -> str:
    if instead != "keep" and instead not in SCHEMES:
        raise ValueError(f"no scheme is called {instead!r}{_nearest(instead, SCHEMES)}; known are keep, {', '.join(SCHEMES)}")
    if instead != "keep" and SCHEMES[instead].static:
        raise ValueError(f"{instead} has static inputs too; choose keep, or a dynamic scheme")
    return instead


class Ruined(_Section):
    """What to do about layers whose output a scale of a static input, told in advance, leaves off by 60 % or more, as calibration sees
    them: the target is then made again without them. Otherwise they are only named."""

    at_most: Positive
    """So many layers; more are an error that names them. Layers that a runtime makes one (q, k and v) go together, and each counts."""
    instead: Annotated[str, AfterValidator(_check_instead)] = "keep"
    """`keep` them in 16 bit, or quantize them in another scheme, for instance `int8-dynamic`, by the same algorithms."""


def _check_rungs(rungs: tuple[str, ...]) -> tuple[str, ...]:
    for i, rung in enumerate(rungs):
        if rung == "recover" and i != len(rungs) - 1:
            raise ValueError("recover trains for minutes what the cheaper rungs could not reach, so it comes last")
        if rung == "mixed" and rungs[i + 1 :] not in ((), ("recover",)):
            raise ValueError("mixed keeps groups of the best rung before it in 16 bit, so it comes last, or before recover")
        if rung == "mixed" and i == 0:
            raise ValueError("mixed keeps groups of the best rung before it in 16 bit; name one before it")
        for name in rung.split("+") if rung not in ("mixed", "recover") else ():
            known = (*ALGORITHMS, *TRANSFORMS)
            if name not in known:
                near = _nearest(name, (*known, "mixed", "recover"))
                raise ValueError(f"no rung is called {rung!r}{near}; write algorithms with + between them, or mixed or recover")
        if rung != "mixed":
            try:
                Rule(match="linear", scheme="int8-dynamic", algorithm=rung_steps(rung))
            except ValidationError as error:
                raise ValueError(f"rung {rung}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return _once(rungs)


def rung_steps(rung: str) -> tuple[Step, ...]:
    """The algorithms of a rung, with the options that a ladder gives them; a transformation alone is followed by rounding, and training
    begins at what smoothing and GPTQ give."""
    names = ["smoothquant", "gptq", "recover"] if rung == "recover" else rung.split("+")
    names += ["rtn"] if names[-1] in TRANSFORMS else []
    return tuple(Step.model_validate({name: _RUNG_OPTIONS.get(name, {})}) for name in names)


HEAD_WHY = "the output head: its error goes straight into the ranking of the next token"


class Target(_Section):
    """One artifact to make."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=96)]
    """Names the artifact's folder."""
    format: Annotated[str, _one_of(FORMATS, "format")]
    """How the numbers are spelled on disk."""
    rules: Annotated[tuple[Rule, ...], Field(strict=False, min_length=1)] = (Rule(match="linear", scheme="int8-dynamic"),)
    """What becomes of which tensor; the first match wins. The output head is kept unless a rule names it."""
    kv_cache: Annotated[str, _one_of(CACHES, "kv_cache")] | None = None
    """Scales for keys and values in eight bits, found by calibration: `fp8` (one a layer) or `fp8-per-head`."""
    runtimes: Annotated[
        tuple[Annotated[str, _one_of(RUNTIMES, "runtime")], ...], Field(strict=False, min_length=1), AfterValidator(_once)
    ] = ("transformers",)
    """The programs that must load the artifact; it is proven in each."""
    hardware: Annotated[tuple[Annotated[str, AfterValidator(_check_hardware)], ...], Field(strict=False)] = ()
    """Where it will be served, for instance `[sm_90, cpu-vnni]`: the plan refuses what loads on none of these in a runtime named above."""
    limits: Limits = Limits()
    """What the reloaded artifact must meet."""
    ruined: Ruined | None = None
    """Layers that static scales would ruin are taken out, up to a bound; the ledger has the reason of each."""
    budget: Budget | None = None
    """Instead of an algorithm: climb the ladder until this is met."""
    ladder: Annotated[tuple[str, ...], AfterValidator(_check_rungs), Field(strict=False, min_length=1)] | None = None
    """With a budget: what to try, the first that meets it wins. `[rtn, smoothquant, smoothquant+gptq, mixed, recover]` unless given; each
    is algorithms with `+` between them, `mixed` keeps in 16 bit what it must of the best before it, and `recover` trains, for ten minutes
    at most, what smoothing and GPTQ made with every layer quantized."""
    alone: dict[str, float] | None = None
    """What the group of a module loses alone, nats a token, by module, as `mixed` measured it; the ledger notes it."""
    options: Options = Options()
    """What only this format can say."""
    max_shard_size: Bytes = 2_000_000_000
    """The largest weight file, for instance `5GB`. Files are hashed beside each other, one core each."""

    @model_validator(mode="after")
    def _one_training(self) -> Target:
        asked = [step.recover for rule in self.rules if rule.scheme for step in rule.algorithm if step.recover]
        if any(options != asked[0] for options in asked):
            raise ValueError("a target is trained once, so every recover in its rules has the same options")
        return self

    @model_validator(mode="after")
    def _static_to_ruin(self) -> Target:
        if self.ruined is None:
            return self
        static = [rule for rule in self.rules if rule.scheme and SCHEMES[rule.scheme].static]
        if not static:
            raise ValueError("ruined is about static inputs, and no rule has a static scheme; leave it out")
        if self.budget is not None:
            raise ValueError("with a budget, mixed chooses what is taken out; leave ruined out")
        if any(step.recover for rule in static for step in rule.algorithm):
            raise ValueError("recover trains what static inputs lose, so none of them is ruined for good; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _budget_or_algorithm(self) -> Target:
        if self.budget is None:
            if self.ladder is not None:
                raise ValueError("a ladder is climbed to a budget; add budget: {kl_nats: ...}")
            return self
        for name in ("kl_nats", "perplexity_ratio"):
            if getattr(self.budget, name) is not None and getattr(self.limits, name) is not None:
                raise ValueError(f"{name} is both in budget and in limits; leave it out of limits")
        if any("algorithm" in rule.model_fields_set for rule in self.rules):
            raise ValueError("with a budget the ladder chooses the algorithm; leave algorithm out of the rules")
        if not any(rule.scheme for rule in self.rules):
            raise ValueError("a budget needs a rule with a scheme: nothing here is quantized")
        return self

    def bounds(self) -> Quality:
        """``limits`` and ``budget``, with what is left out taken from the loosest scheme that the rules use."""
        defaults = [SCHEMES[rule.scheme].default_limits for rule in self.rules if rule.scheme]
        if not defaults:
            defaults = [Quality(kl_nats=0.001, top1=0.99, perplexity_ratio=1.001, relative_error=0.01)]
        limits = self.merged_limits()
        return Quality(
            kl_nats=_or(limits, "kl_nats", max(d.kl_nats for d in defaults)),
            top1=_or(limits, "top1", min(d.top1 for d in defaults)),
            perplexity_ratio=_or(limits, "perplexity_ratio", max(d.perplexity_ratio for d in defaults)),
            relative_error=_or(limits, "relative_error", max(d.relative_error for d in defaults)),
            answers=limits.answers,
            recovery=limits.recovery,
        )

    def merged_limits(self) -> Limits:
        """``limits`` with what the budget says."""
        asked = {} if self.budget is None else self.budget.model_dump(include={"kl_nats", "perplexity_ratio"}, exclude_none=True)
        return self.limits.model_copy(update=asked)


class Calibration(_Section):
    """The text on which calibrated algorithms, static activations and scales of keys and values see the model at work."""

    text: Annotated[str, Field(min_length=1)] = "sample"
    """`sample` (a public-domain dictionary that comes with the tool), a .txt, .jsonl or .parquet file, or a dataset on the Hub
    (`org/name` or `org/name@revision`)."""
    config: str | None = None
    """Of a dataset on the Hub: which configuration; needed where there are several and none is the default."""
    split: str | None = None
    """Of a dataset on the Hub: which split, `train` unless given."""
    column: str | None = None
    """Of rows: where the text is; `text` unless given, `messages` with `chat`."""
    sequences: Positive = 32
    """How many sequences are read."""
    length: Positive = 512
    """Tokens in each."""
    seed: int = 0
    """Chooses which part of the text is read."""
    documents: bool = False
    """Read each row as it is, cut to `length`, instead of packing the text into sequences of one length."""
    chat: bool = False
    """Documents have `messages`, to which the model's chat template is applied."""
    propagate: Literal["quantized", "float"] = "quantized"
    """Whether statistics of a block are taken behind the quantized blocks before it, or behind those of the source."""
    unseen_experts: Literal["error", "all_tokens", "round"] = "error"
    """What to do about an expert to which too few tokens come: end there, take statistics of all tokens of its layer, or round its weights
    (a static scale is then that of the expert beside it with the largest inputs)."""
    expert_tokens: Positive = 1
    """How many tokens are enough for an expert."""
    expert_hessians: Annotated[int, BeforeValidator(_parse_size), Field(gt=0)] = 8_000_000_000
    """Memory for what `gptq` keeps of the experts of a block at once, for instance `4GB`; where they need more, the block is run again for
    every further group of experts, to the same bytes."""
    dtype: Literal["source", "float32"] = "source"
    """The arithmetic of the model while it is watched; a CPU without bfloat16 instructions takes float32. Codes are chosen in float32."""

    @property
    def tokens(self) -> int:
        """How many walk through the model together, at most."""
        return self.sequences * self.length


class Task(_Section):
    """A task of lm-evaluation-harness, or of your own in its YAML, run on source and artifact in transformers."""

    name: Annotated[str, Field(min_length=1)]
    """As the harness calls it (`hellaswag`, `gsm8k`, a group, a tag), or what `task:` says in a YAML of yours."""
    limit: Positive | None = None
    """Of each task no more than its first so many documents; all unless given."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; the task's own number unless given."""
    chat: bool = False
    """Apply the model's chat template."""
    metric: str | None = None
    """Which of its metrics counts, for instance `acc` or `exact_match,strict-match`; `acc_norm`, `acc`, `exact_match` or its first, unless
    given."""
    include_path: str | None = None
    """A folder with task YAMLs of your own. They may name Python functions, which then run on this machine."""


class Validation(_Section):
    """The held-out text on which artifact and source are compared."""

    text: Annotated[str, Field(min_length=1)] = "sample"
    """`sample` (public-domain prose that comes with the tool), a .txt, .jsonl or .parquet file, or a dataset on the Hub
    (`org/name` or `org/name@revision`)."""
    config: str | None = None
    """Of a dataset on the Hub: which configuration; needed where there are several and none is the default."""
    split: str | None = None
    """Of a dataset on the Hub: which split, `validation` unless given."""
    column: str | None = None
    """Of rows: where the text is, `text` unless given, or the picture, `image` unless given."""
    images: str | None = None
    """What a model that reads pictures is compared on: a folder, a .parquet file or a dataset on the Hub. Its own processor prepares
    them."""
    pictures: Positive = 64
    """How many pictures are compared."""
    tokens: Annotated[int, Field(ge=16)] = 4096
    """How many tokens are compared."""
    length: Annotated[int, Field(ge=8)] = 512
    """Tokens in one sequence."""
    reference: Literal["float32", "source"] = "float32"
    """The arithmetic of the source it is compared with: `float32`, or its own dtype where float32 does not fit in memory."""
    prompts: str | None = None
    """A test set of your own, a .jsonl file: each line has a `prompt` (or `messages`, for the chat template) and an `answer` (text or a
    list of texts; the continuation's first line must be one of them) or a `pattern` (a regular expression to be found in it)."""
    answer_tokens: Positive = 32
    """How many tokens are written for each prompt, greedily."""
    tasks: Annotated[tuple[Task, ...], Field(strict=False)] = ()
    """Tasks of lm-evaluation-harness (package `lm_eval`), for instance `[{name: hellaswag, limit: 200}]`."""

    @model_validator(mode="after")
    def _whole_sequences(self) -> Validation:
        if self.tokens < self.length:
            raise ValueError(f"tokens ({self.tokens}) must be at least length ({self.length})")
        names = [task.name for task in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"task {twice} is there twice; a report has one score for each")
        return self


class Rotation(_Section):
    """Turns hidden states so that outliers spread over all channels (QuaRot), folded into the weights: no runtime needs to know. A tied
    head becomes a tensor of its own."""

    residual: bool = True
    """R1: the residual stream; norms move into what reads it."""
    values: bool = True
    """R2: the values of each head."""
    seed: int = 0
    """Chooses the signs of the Hadamard matrices."""

    @model_validator(mode="after")
    def _turns(self) -> Rotation:
        if not (self.residual or self.values):
            raise ValueError("neither residual nor values are turned; leave rotation out")
        return self


class Push(_Section):
    """Where on the Hub the artifacts belong."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/(?:[\w.-]|\{target\}|\{model\})+$")]
    """`organisation/name`; `{target}` in the name stands for the target's, `{model}` for the last part of the model's."""
    layout: Literal["repos", "branches", "folders"] = "repos"
    """Where several targets go: each to a repo of its own (`{target}` tells them apart), or all to one repo, each on a branch of its
    name (the first on `main`), or each in a folder of its name."""
    private: bool | None = None
    """Whether a repo that is created is private, which it is unless this says `false`."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """The branch to commit to, created where it is not there; `main` unless given."""
    create_pr: bool = False
    """Open a pull request instead of committing to the branch."""
    tag: Annotated[str, Field(min_length=1)] | None = None
    """A tag to put on the commit."""
    accept: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = ()
    """What would stop the push, and shall not: the source's licence by its name (`other`, `unknown`, ...), `gated` for a gated source,
    `private` for a public repo made of a private source. Say it when you know that you may publish."""

    @model_validator(mode="after")
    def _one_place(self) -> Push:
        if self.layout == "branches" and (self.revision or self.create_pr or self.tag):
            raise ValueError("with layout: branches every target has a branch of its own; leave out revision, create_pr and tag")
        if self.layout != "repos" and "{target}" in self.repo:
            raise ValueError(f"layout: {self.layout} is one repo for all targets; leave out {{target}}, or the layout")
        if self.create_pr and self.tag:
            raise ValueError("a pull request is not merged yet; leave out tag or create_pr")
        return self


class Recipe(_Section):
    """One job: a model, and the artifacts to make of it."""

    model: Annotated[str, Field(min_length=1)]
    """A Hub id (`org/name` or `org/name@revision`), a folder, a .gguf file, or `sample:smollm2-135m-instruct`."""
    dtype: Literal["source", "bfloat16", "float16", "float32"] = "source"
    """What is not quantized is stored in this; `source` leaves it as it is (a GGUF becomes bfloat16)."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run on this machine."""
    calibration: Calibration | None = None
    """The text on which ranges are seen; the sample text where something needs them and nothing is said here."""
    validation: Validation = Validation()
    """The held-out text on which artifact and source are compared."""
    rotation: Rotation | None = None
    """Turn the source's hidden states before anything else, for all targets; `{}` turns all that can be."""
    targets: Annotated[tuple[Target, ...], Field(strict=False, min_length=1)]
    """The artifacts to make; one reading of the weights serves all."""
    push: Push | None = None
    """Where on the Hub the artifacts belong."""

    _where: dict[Path_, str] = PrivateAttr(default_factory=dict)
    _name: str = PrivateAttr(default="recipe")

    @property
    def name(self) -> str:
        """The recipe file's stem; artifacts lie in ``artifacts/<name>/``."""
        return self._name

    def where(self, *path: str | int) -> str:
        """``file:line:column`` of a value, or of the nearest one around it that the file spells out."""
        return _position(self._where, path)

    def target(self, name: str) -> Target:
        """The target of that name. Raises :class:`RecipeError` where a manifest names one that its recipe does not have."""
        found = next((target for target in self.targets if target.name == name), None)
        if found is None:
            raise RecipeError(f"{self.where('targets')}: no target is called {name!r}; there is {', '.join(t.name for t in self.targets)}")
        return found

    def only(self, targets: Sequence[Target]) -> Recipe:
        """The recipe of some of its targets, without calibration text that none of them would read."""
        places = [self.targets.index(target) for target in targets]
        read = any(reads_calibration(target) for target in targets)
        made = self.model_copy(update={"targets": tuple(targets), **({} if read else {"calibration": None})})
        made._where = {path: where for path, where in self._where.items() if path[:1] != ("targets",) or len(path) == 1}
        for i, place in enumerate(places):
            made._where |= {("targets", i, *path[2:]): where for path, where in self._where.items() if path[:2] == ("targets", place)}
        return made

    def remade(self, target: Target, rules: Sequence[Rule], *, first: int, by: str, changed: Mapping[str, Any]) -> Recipe:
        """The recipe of one of its targets alone, with other ``rules`` and what else is ``changed``. The ``first`` of the rules, so many,
        come from the target's key ``by``, whose line is theirs; the others are its own, in their order."""
        index = self.targets.index(target)
        made = self.only([target])
        made = made.model_copy(update={"targets": (target.model_copy(update={**changed, "rules": tuple(rules)}),)})
        if not reads_calibration(made.targets[0]):
            made = made.model_copy(update={"calibration": None})
        of_rules = {path: where for path, where in made._where.items() if path[:3] == ("targets", 0, "rules") and len(path) > 3}
        for path in of_rules:
            del made._where[path]
        made._where |= {(*path[:3], int(path[3]) + first, *path[4:]): where for path, where in of_rules.items()}
        made._where |= {("targets", 0, "rules", i): self.where("targets", index, by) for i in range(first)}
        if "rules" not in target.model_fields_set:
            made._where |= {("targets", 0, "rules", first + i): self.where("targets", index) for i in range(len(target.rules))}
        return made

    def resolved(self, *, predicts: bool = True) -> dict[str, Any]:
        """The recipe as plain data with every default spelled out; parsing it again gives the same job. ``predicts``: the model predicts
        tokens, which decides what limits it has."""
        data = self.model_dump(mode="json")
        for target, record in zip(self.targets, data["targets"], strict=True):
            limits = {name: getattr(target.bounds(), name) for name in applicable(predicts=predicts)}
            record["limits"] = {name: limit for name, limit in limits.items() if limit is not None}
            if target.budget is not None:
                record["ladder"] = list(target.ladder or LADDER)
                record["limits"] |= {
                    name: None for name, value in record["budget"].items() if value is not None and name in record["limits"]
                }
                for rule in record["rules"]:
                    del rule["algorithm"]
        return data


def find_recipe(name: str) -> Path:
    """A path as given, or ``recipes/<name>.yaml`` here, or the recipe of that name that comes with the tool.

    Raises :class:`RecipeError` naming the nearest recipe there is.
    """
    direct = Path(name)
    if os.path.isfile(direct):  # which a name too long for a file does not raise in
        return direct
    package = Path(__file__).parent
    folders = [Path("recipes"), package / "recipes", package.parent / "recipes"]
    for folder in folders:
        if os.path.isfile(path := folder / f"{name}.yaml"):
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise RecipeError(f"no recipe {name!r}: neither a file nor one of {', '.join(known) or 'none'}{_nearest(name, known)}")


def read_recipe(path: Path, overrides: Sequence[str] = (), model: str | None = None) -> Recipe:
    """Reads, overrides (``key.path=value``, the value as YAML) and validates. Raises :class:`RecipeError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if model == "":
        raise RecipeError("--model is empty; name a model, or leave it out for the recipe's")
    extra = [*overrides, *([f"model={model}"] if model else [])]
    return parse_recipe(text, str(path), name=path.stem, overrides=extra)


def parse_recipe(text: str, file: str, *, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """:func:`read_recipe` on text; ``file`` is the name to report."""
    where: dict[Path_, str] = {}
    data = _load(text, file, where)
    for override in overrides:
        _override(data, override, where)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain_all(error.errors(), where))) from None
    recipe._where.update(where)
    recipe._name = name
    _cross_check(recipe)
    return recipe


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Octavo recipe"
    definitions = schema["$defs"]
    names = {"type": "string", "enum": [*ALGORITHMS, *TRANSFORMS, *CORRECTIONS]}
    steps = {"anyOf": [names, {"$ref": "#/$defs/Step"}]}
    algorithm = definitions["Rule"]["properties"]["algorithm"]
    definitions["Rule"]["properties"]["algorithm"] = {
        "anyOf": [*steps["anyOf"], {"type": "array", "items": steps, "minItems": 1}],
        **{key: algorithm[key] for key in ("description", "title") if key in algorithm},
        "default": "rtn",
    }
    definitions["Target"]["properties"]["format"]["enum"] = list(FORMATS)
    definitions["Target"]["properties"]["kv_cache"]["anyOf"][0]["enum"] = list(CACHES)
    definitions["Rule"]["properties"]["scheme"]["anyOf"][0]["enum"] = list(SCHEMES)
    definitions["Target"]["properties"]["runtimes"]["items"]["enum"] = list(RUNTIMES)
    definitions["Target"]["properties"]["hardware"]["items"]["enum"] = list(HARDWARE)
    definitions["Target"]["properties"]["max_shard_size"] = {
        **definitions["Target"]["properties"]["max_shard_size"],
        "type": ["integer", "string"],
    }
    return schema


#: Which formats have an option, where it is not all graphs.
_OWNERS = {"llm_int8_threshold": ("bitsandbytes",), "tied_embedding": ("onnx-matmulnbits",), "inputs": ("onnx",)}


def _cross_check(recipe: Recipe) -> None:
    seen: dict[str, int] = {}
    for i, target in enumerate(recipe.targets):
        if target.name.casefold() in seen:
            first = recipe.where("targets", seen[target.name.casefold()], "name")
            raise RecipeError(
                f"{recipe.where('targets', i, 'name')}: a second target called {target.name!r} (the first: {first}); rename one"
            )
        seen[target.name.casefold()] = i
        for option in target.options.model_dump(exclude_none=True):
            owners = _OWNERS.get(option, GRAPHS)
            if target.format not in owners:
                where = recipe.where("targets", i, "options", option)
                raise RecipeError(
                    f"{where}: {target.format} has no such option; {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"
                )
        if target.limits.answers is not None and recipe.validation.prompts is None:
            where = recipe.where("targets", i, "limits", "answers")
            raise RecipeError(f"{where}: validation has no prompts to answer; give validation.prompts a .jsonl file")
        if target.limits.recovery is not None and not recipe.validation.tasks:
            where = recipe.where("targets", i, "limits", "recovery")
            raise RecipeError(f"{where}: validation has no tasks whose score could be recovered; give validation.tasks a list")
        if recipe.validation.tasks and not any(name in HARNESSED for name in target.runtimes):
            where = recipe.where("targets", i, "runtimes")
            raise RecipeError(
                f"{where}: lm-evaluation-harness runs {target.name} in {' or '.join(HARNESSED)}, and it names neither; add one, or leave "
                "validation.tasks out"
            )
        for j, rule in enumerate(target.rules):
            for recover in (step.recover for step in rule.algorithm if step.recover):
                there = (recipe.calibration or Calibration()).sequences + recover.generated
                if recover.batch > max(there, Recover().batch):
                    raise RecipeError(
                        f"{recipe.where('targets', i, 'rules', j, 'algorithm')}: recover.batch: {recover.batch:,} sequences in a step, and "
                        f"there are {there:,} (calibration.sequences and recover.generated); ask for fewer"
                    )
    if recipe.push and recipe.push.layout == "repos" and len(recipe.targets) > 1 and "{target}" not in recipe.push.repo:
        raise RecipeError(
            f"{recipe.where('push', 'repo')}: {len(recipe.targets)} targets cannot share one repo so; write {{target}} into its name, "
            "or choose layout: branches or folders"
        )
    for key, section in (("calibration", recipe.calibration), ("validation", recipe.validation)):
        if section is not None:
            _check_text(recipe, key, section)
    if recipe.calibration and not any(reads_calibration(target) for target in recipe.targets):
        raise RecipeError(
            f"{recipe.where('calibration')}: no target has a calibrated algorithm, a static scheme or a kv_cache, "
            "so this text would not be read; remove it"
        )


def _check_text(recipe: Recipe, key: str, section: Calibration | Validation) -> None:
    """What only some texts have: a configuration and a split datasets on the Hub, columns all but plain text."""
    hub = section.text != "sample" and is_hub_id(section.text)
    for name in ("config", "split"):
        if getattr(section, name) is not None and not hub:
            raise RecipeError(f"{recipe.where(key, name)}: {section.text} has no {name}; a dataset on the Hub (org/name) may have one")
    if section.column is not None and not hub and not section.text.endswith((".jsonl", ".parquet")):
        raise RecipeError(f"{recipe.where(key, 'column')}: {section.text} has no columns; leave column out")


def calibrated(steps: Sequence[Step]) -> bool:
    """Whether any of the algorithms needs to see the model at work."""
    return any(step.name not in ALGORITHMS or ALGORITHMS[step.name].calibrated for step in steps)


def reads_calibration(target: Target) -> bool:
    """Whether making a target needs calibration text."""
    used = [rule for rule in target.rules if rule.scheme]
    rungs = (target.ladder or LADDER) if target.budget else ()
    if any(rung == "mixed" or calibrated(rung_steps(rung)) for rung in rungs):
        return True
    return target.kv_cache is not None or any(calibrated(rule.algorithm) or SCHEMES[str(rule.scheme)].static for rule in used)


def _load(text: str, file: str, where: dict[Path_, str]) -> Any:
    try:
        root = YAML(typ="rt", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{file}{position}: not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, RecursionError) as error:
        raise RecipeError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(root, MappingNode):
        raise RecipeError(f"{file}:1:1: a recipe is a mapping that begins with model: and targets:")
    budget = iter(range(MAX_NODES))
    return _construct(root, file, (), where, budget, frozenset())


def _construct(node: Node, file: str, path: Path_, where: dict[Path_, str], budget: Iterator[int], above: frozenset[int]) -> Any:
    here = f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if next(budget, None) is None:
        raise RecipeError(f"{here}: the recipe unfolds to more than {MAX_NODES:,} values: repeated anchors, or too many rules")
    if id(node) in above:
        raise RecipeError(f"{here}: this anchor contains itself")
    above = above | {id(node)}
    where.setdefault(path, here)
    if isinstance(node, SequenceNode):
        return [_construct(item, file, (*path, i), where, budget, above) for i, item in enumerate(node.value)]
    if isinstance(node, MappingNode):
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            position = f"{file}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
            key = key_node.value
            if not isinstance(key, str) or key == "<<":
                raise RecipeError(f"{position}: a key must be a plain word")
            if key in data:
                raise RecipeError(f"{position}: {key} is given a second time")
            where[(*path, key)] = position
            data[key] = _construct(value_node, file, (*path, key), where, budget, above)
        return data
    return _scalar(node, here)


def _scalar(node: Node, here: str) -> Any:
    kind = str(node.tag).rpartition(":")[2]
    text: str = node.value
    try:
        match kind:
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text.replace("_", ""), 0)
            case "float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        pass
    raise RecipeError(f"{here}: {text!r} with tag {node.tag} is not something a recipe can hold")


def _override(data: Any, override: str, where: dict[Path_, str]) -> None:
    key, equals, text = override.partition("=")
    origin = f"--set {override}"
    if not equals or not key:
        raise RecipeError(f"{origin}: write it as key.path=value, for instance targets.0.limits.kl_nats=0.05")
    path: Path_ = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    value = text if key == "model" else _load_value(text, origin)
    here = data
    for depth, part in enumerate(path[:-1]):
        if isinstance(here, dict):
            here = here.setdefault(str(part), {})
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            raise RecipeError(f"{origin}: there is no {'.'.join(map(str, path[: depth + 1]))} in the recipe")
    last = path[-1]
    if isinstance(here, list) and isinstance(last, int) and last < len(here):
        here[last] = value
    elif isinstance(here, dict):
        here[str(last)] = value
    else:
        raise RecipeError(f"{origin}: there is no {key} in the recipe")
    for known in [known for known in where if known[: len(path)] == path]:
        del where[known]
    where[path] = origin


def _load_value(text: str, origin: str) -> Any:
    try:
        node = YAML(typ="rt", pure=True).compose(text)
    except (YAMLError, RecursionError):
        raise RecipeError(f"{origin}: {text!r} is not a YAML value") from None
    return None if node is None else _construct(node, origin, (), {}, iter(range(MAX_NODES)), frozenset())


def _explain_all(items: Sequence[Any], where: Mapping[Path_, str]) -> list[str]:
    """One line an error; what pydantic says of a section because of an error inside it is left out."""
    paths = [item["loc"] for item in items]
    causes = [item for item in items if not any(len(path) > len(item["loc"]) and path[: len(item["loc"])] == item["loc"] for path in paths)]
    return [_explain(item, where) for item in causes]


#: In words, the patterns that keys have.
_SPELLED = {
    "name": "a name has letters, digits, '.', '_' and '-', and begins with a letter or a digit",
    "repo": "write organisation/name; the name may have {target} and {model} in it",
}


def _explain(item: Any, where: Mapping[Path_, str]) -> str:
    path: Path_ = item["loc"]
    dotted = ".".join(map(str, path))
    position = _position(where, path)
    match item["type"]:
        case "extra_forbidden":
            known = _fields_at(path[:-1])
            return f"{position}: no key {str(path[-1])!r} here{_nearest(str(path[-1]), known)}; known are {', '.join(known)}"
        case "missing":
            return f"{position}: {dotted} is missing; add it"
        case "value_error":
            return f"{position}: {item['msg'].removeprefix('Value error, ')}"
        case "tuple_type" | "list_type":
            return f"{position}: {dotted} must be a list, got {item['input']!r}; write [...]"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{position}: {dotted} must be a mapping of keys, got {item['input']!r}"
        case "too_short":
            return f"{position}: {dotted} must not be empty"
        case "string_pattern_mismatch":
            return f"{position}: {dotted}: {item['input']!r} is none; {_SPELLED[str(path[-1])]}"
        case _:
            message = item["msg"][0].lower() + item["msg"][1:]
            return f"{position}: {dotted}: {message}, got {item['input']!r}"


def _fields_at(path: Path_) -> list[str]:
    """The keys that the section at ``path`` may have."""
    sections: dict[str, type[BaseModel]] = {
        "targets": Target,
        "rules": Rule,
        "limits": Limits,
        "budget": Budget,
        "ruined": Ruined,
        "options": Options,
        "validation": Validation,
        "tasks": Task,
        "calibration": Calibration,
        "rotation": Rotation,
        "push": Push,
        "algorithm": Step,
        "rtn": Rounding,
        "gptq": Gptq,
        "smoothquant": Smoothquant,
        "awq": Awq,
        "bias_correction": BiasCorrection,
        "recover": Recover,
    }
    names = [part for part in path if isinstance(part, str)]
    return list((sections[names[-1]] if names else Recipe).model_fields)


def _position(where: Mapping[Path_, str], path: Sequence[str | int]) -> str:
    for end in range(len(path), -1, -1):
        if (found := where.get(tuple(path[:end]))) is not None:
            return found
    return "recipe"


def _nearest(word: str, known: Mapping[str, object] | Sequence[str]) -> str:
    # Who writes `int8` means one that begins so, not `llm-int8`.
    close = [name for name in known if word and name.startswith(word)] or difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _or(limits: Limits, name: str, default: float) -> float:
    value = getattr(limits, name)
    return default if value is None else float(value)
