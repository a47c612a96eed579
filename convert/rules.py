"""The rules of a target: which of them decides which tensor, and why one may not."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from convert.architecture import Architecture, Parameter
from convert.ledger import KEEP_WHY, is_tied
from convert.recipe import Recipe, Rule, Target, calibrated
from convert.runtimes import RUNTIMES
from convert.source import Checkpoint
from formats import FORMATS
from formats.dtypes import FLOATS
from formats.errors import RecipeError
from formats.safetensors import TensorSpec
from formats.scheme import SCHEMES, Scheme
from formats.tensors import GRAPHS


@dataclass(frozen=True)
class Asked:
    """One target of a recipe, asked of one model: what every step of its plan goes by. ``architecture``: None where transformers does not
    know it."""

    recipe: Recipe
    index: int
    checkpoint: Checkpoint
    architecture: Architecture | None

    @property
    def target(self) -> Target:
        return self.recipe.targets[self.index]

    @property
    def predicts(self) -> bool:
        """Whether the model predicts tokens; of one that transformers does not know it is taken for granted."""
        return self.architecture is None or self.architecture.predicts

    def where(self, *path: str | int) -> str:
        """``file:line:column`` of a value of the target."""
        return self.recipe.where("targets", self.index, *path)


@dataclass(frozen=True)
class Claim:
    """A tensor is a rule's. ``where``: the rule's place in the recipe; ``label``: what the ledger says of it."""

    rule: Rule
    where: str
    label: str


def claim(asked: Asked, parameters: Mapping[str, Parameter]) -> dict[str, Claim]:
    """By tensor, the first rule that matches it. Raises :class:`RecipeError` for a rule that decides none."""
    claims: dict[str, Claim] = {}
    for i, rule in enumerate(asked.target.rules):
        written = asked.where("rules", i)
        where = written if "rules" in asked.target.model_fields_set else "default rule:"
        matched = [name for name, parameter in parameters.items() if _matches(rule.match, name, parameter, where)]
        fresh = [name for name in matched if name not in claims]
        if not matched:
            near = _suggest(rule.match, parameters, known=asked.architecture is not None)
            raise RecipeError(f"{where}: {rule.match!r} matches nothing in {asked.checkpoint.origin}{near}")
        if not fresh:
            first = claims[matched[0]].label
            raise RecipeError(
                f"{where}: {rule.match!r} matches {len(matched)} tensor(s), all taken by earlier rules (the first: {first}); move it up"
            )
        claims |= dict.fromkeys(fresh, Claim(rule, written, f"{PurePosixPath(where).name} {rule.match}"))
    return claims


def _matches(pattern: str, name: str, parameter: Parameter, where: str) -> bool:
    if pattern == "linear":
        return parameter.kind in ("linear", "expert")
    if not name.endswith(".weight") and parameter.kind != "expert":
        return False
    if any(_names(pattern, module, where) for module in (*parameter.modules, name.removesuffix(".weight"))):
        return True
    named = [part.module for part in parameter.parts if _names(pattern, part.module, where)]
    if named and len(named) < len(parameter.parts):
        raise RecipeError(
            f"{where}: {pattern!r} names {named[0]} and not all {len(parameter.parts)} layers that the source has in one tensor, {name}; "
            f"they share their fate, so name {name}"
        )
    return bool(named)


def _names(pattern: str, module: str, where: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], module) is not None
        except re.error as error:
            raise RecipeError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(module, pattern)
    return module == pattern or module.endswith(f".{pattern}")


def _suggest(pattern: str, parameters: Mapping[str, Parameter], *, known: bool) -> str:
    """``known``: transformers knows the architecture."""
    if pattern == "linear" and known:
        return "; none of its tensors is the weight of a linear layer of the model that config.json describes"
    if pattern == "linear":
        return "; transformers does not know this architecture, so rules must name tensors, for instance *.mlp.*"
    modules = {module for parameter in parameters.values() for module in parameter.modules}
    last = {".".join(module.split(".")[-depth:]) for module in modules for depth in (1, 2)}
    close = difflib.get_close_matches(pattern, sorted(modules | last), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def refusal(asked: Asked, spec: TensorSpec, parameter: Parameter, rule: Rule) -> str | None:
    """Why a tensor cannot be what a rule wants of it; None if it can."""
    scheme = SCHEMES[str(rule.scheme)]
    return _unholdable(spec, parameter, scheme, asked.target) or _unsolvable(parameter, rule, asked.architecture)


def _unholdable(spec: TensorSpec, parameter: Parameter, scheme: Scheme, target: Target) -> str | None:
    """Why the format or a runtime of the target has no place for its codes."""
    if is_tied(parameter) and target.format not in GRAPHS:
        return f"it is also {parameter.modules[0]}, and an embedding cannot hold codes; keep it, or untie the head first"
    if scheme.lookup and parameter.kind != "embedding":
        return "it is no table of embeddings of its own"
    allowed = ("linear", "head", "expert", "unknown", *(["embedding"] if scheme.lookup else []))
    if parameter.kind not in allowed and not (parameter.kind == "router" and parameter.parts):
        hint = "; int8-lookup is for tables in graphs" if parameter.kind == "embedding" else ""
        return f"it is not the weight of a linear layer ({KEEP_WHY[parameter.kind]}{hint})"
    if parameter.kind == "expert" and (refused := _refused_expert(parameter, scheme, target)):
        return refused
    if not parameter.parts or spec.elements == 0:
        return f"no linear layer was found in it, of shape {list(spec.shape)}"
    if spec.dtype not in FLOATS:
        return f"it is stored as {spec.dtype}, and only {', '.join(FLOATS)} can be quantized"
    for part in parameter.parts:
        refused = FORMATS[target.format].refusal(
            scheme, part.shape(spec), transposed=part.columns is not None and parameter.kind != "expert"
        )
        if refused:
            return refused
    return None


def _refused_expert(parameter: Parameter, scheme: Scheme, target: Target) -> str | None:
    if not parameter.parts:
        return "no reader of 8-bit experts is known that takes them in the layout of this model; keep them with a rule"
    for name in target.runtimes:
        merges = RUNTIMES[name].merges
        if merges is None or parameter.reading == "linear":
            continue
        if parameter.reading == "unread" or not merges:
            return f"{name} holds the experts of this model as floats only; keep them with a rule, or name another runtime"
        if scheme.name not in merges:
            return (
                f"{name} holds experts as floats, and reads them from {', '.join(sorted(merges))} only; "
                "use one of these, keep them, or name another runtime"
            )
    return None


def _unsolvable(parameter: Parameter, rule: Rule, architecture: Architecture | None) -> str | None:
    """Why no calibrated algorithm can choose its codes."""
    if parameter.kind == "expert" and rule.observer not in (None, "absmax"):
        return f"observer {rule.observer} does not see what goes into one expert; use absmax for experts"
    if parameter.kind == "expert" and any(step.bias_correction for step in rule.algorithm):
        return "an expert has no bias of its own to correct; leave bias_correction out"
    if any(step.recover for step in rule.algorithm) and (refused := _untrainable(parameter, SCHEMES[str(rule.scheme)])):
        return refused
    if architecture is not None and architecture.encoder_decoder and (calibrated(rule.algorithm) or SCHEMES[str(rule.scheme)].static):
        return (
            "calibration gives a model text to read, and this one writes beside it; take weights alone or dynamic inputs, and rtn, for "
            "encoder-decoders"
        )
    if not calibrated(rule.algorithm):
        return None
    name = next(step.name for step in rule.algorithm if calibrated([step]))
    if SCHEMES[str(rule.scheme)].weight.scale == "absmax":
        return f"LLM.int8() rounds to nearest, by its definition; leave {name} out"
    if architecture is None or not architecture.blocks:
        return f"{name} runs the model block by block, and no blocks were found in it"
    if not any(module.startswith(f"{block}.") for block in architecture.blocks for module in parameter.modules):
        own = f"{{match: {parameter.modules[0]}, scheme: {rule.scheme}}}"
        return f"{name} works block by block, and it lies in none; use rtn, with a rule of its own before this one: {own}"
    return None


def _untrainable(parameter: Parameter, scheme: Scheme) -> str | None:
    if parameter.kind == "expert":
        return "recover does not train experts; give them a rule without it"
    if scheme.weight.scale == "F8_E8M0":
        return f"recover learns scales, and those of {scheme.name} are powers of two; leave it out"
    return None
