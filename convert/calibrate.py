"""Runs calibration text through the source and keeps what static scales need: how large inputs, keys and values become.

Run as ``python -m convert.calibrate REQUEST ANSWER``, both JSON files, so that the model's memory goes with the process. Request: what
:mod:`convert.runtimes.source` takes, and ``modules`` (linear layers) and ``cache`` (whether keys and values are wanted); answer:
``inputs``, ``keys`` and ``values`` as in :class:`Stats`, keys and values by the layer they belong to.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.plan import cache_sources, takes_input_scale
from formats.errors import InputError, MachineError, NumericsError

if TYPE_CHECKING:
    import torch

    from convert.plan import Plan
    from convert.progress import Progress
    from formats.layer import Contents


@dataclass(frozen=True)
class Stats:
    """Largest magnitudes: of the input of each linear module, and of each head's keys (after the rotary embedding) and values, by
    attention module. ``record`` says on which text they were seen."""

    inputs: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


NO_STATS = Stats()


def calibrate(plan: Plan, progress: Progress) -> Stats:
    """What the plan's targets need to know of the model at work; :data:`NO_STATS` where they need nothing.

    Raises :class:`InputError` when the text is too short or the source has no tokenizer, :class:`MachineError` when the model cannot be
    run, :class:`NumericsError` naming the module whose input was not finite, or always zero.
    """
    known = _source_scales(plan)
    modules = sorted({module for target in plan.targets for module in target.static} - known.keys())
    unknown = [target.contents for target in plan.targets if target.contents.cache and not _has_cache(plan, target.contents)]
    if not modules and not unknown:
        taken = any(target.calibrated for target in plan.targets)
        return Stats(inputs=known, record={"text": "the source's own scales"}) if taken else NO_STATS
    import numpy as np

    from convert.child import request, run
    from convert.recipe import Calibration
    from convert.text import load_tokenizer, take_tokens

    settings = plan.recipe.calibration or Calibration()
    with tempfile.TemporaryDirectory(prefix="octavo-") as scratch_name:
        scratch = Path(scratch_name)
        for name, content in {**plan.checkpoint.sidecars(), **plan.targets[0].texts()}.items():
            (scratch / name).write_bytes(content)
        tokenizer = load_tokenizer(scratch, trust_remote_code=plan.recipe.trust_remote_code)
        tokens, record = take_tokens(
            settings.text, tokenizer, sequences=settings.sequences, length=settings.length, purpose="calibration", seed=settings.seed
        )
        np.save(scratch / "tokens.npy", tokens)
        progress.say(f"calibrating on {tokens.size:,} tokens")
        asked = {
            **request(plan.recipe, scratch),
            "model": plan.checkpoint.pinned,
            "dtype": "float32" if plan.recipe.validation.reference == "float32" else "auto",
            "modules": modules,
            "cache": bool(unknown),
        }
        answer, failure = run("convert.calibrate", asked, scratch)
    if answer is None:
        raise MachineError(f"{plan.checkpoint.origin}: the source could not be run for calibration: {failure}")
    for module, absmax in answer["inputs"].items():
        if not 0 < absmax < float("inf"):
            raise NumericsError(f"{module}: the largest input that calibration saw is {absmax:g}; give it other text, or a dynamic scheme")
    unseen = [module for module in modules if module not in answer["inputs"]]
    if unseen:
        raise InputError(f"{unseen[0]} (and {len(unseen) - 1} more) was never run by calibration, so it can have no static scale")
    attentions = unknown[0].attentions if unknown else ()
    return Stats(
        inputs={**known, **answer["inputs"]},
        keys={attention.module: tuple(answer["keys"][str(attention.layer)]) for attention in attentions},
        values={attention.module: tuple(answer["values"][str(attention.layer)]) for attention in attentions},
        record=record,
    )


def _has_cache(plan: Plan, contents: Contents) -> bool:
    return bool(cache_sources(plan.checkpoint, contents.attentions, contents.cache))


def _source_scales(plan: Plan) -> dict[str, float]:
    """What the source's own static scales say of its inputs, for layers that are only spelled anew."""
    known: dict[str, float] = {}
    for target in plan.targets:
        for entry in target.quantized:
            coded = plan.checkpoint.coded.get(entry.tensor.name)
            if coded is not None and takes_input_scale(coded, entry) and entry.scheme and entry.scheme.activation:
                scales = plan.checkpoint.scales(str(coded.input_scale))
                if len(scales) != 1 or not 0 < scales[0] < float("inf"):
                    raise NumericsError(f"{coded.input_scale}: {scales[0]:g} is no scale; the checkpoint is damaged")
                known |= {entry.module(part): scales[0] * entry.scheme.activation.grid.high for part in entry.parts}
    return known


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    import numpy as np
    import torch
    from transformers import DynamicCache

    from convert.runtimes.source import load

    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(request["threads"])
    model = load(request).to(request["device"]).eval()
    keys: dict[int, torch.Tensor] = {}
    values: dict[int, torch.Tensor] = {}

    class Watcher(DynamicCache):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            for seen, states in ((keys, key_states), (values, value_states)):
                absmax = states.detach().abs().amax(dim=(0, 2, 3))
                seen[layer_idx] = torch.maximum(seen[layer_idx], absmax) if layer_idx in seen else absmax
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    with torch.inference_mode(), _watched(model, request["modules"]) as inputs:
        for sequence in torch.from_numpy(np.load(request["tokens"])).to(request["device"]):
            arguments = {"past_key_values": Watcher(), "use_cache": True} if request["cache"] else {}
            model(input_ids=sequence[None], **arguments)
    answer = {
        "inputs": {name: float(absmax) for name, absmax in inputs.items()},
        "keys": {layer: absmax.float().tolist() for layer, absmax in keys.items()},
        "values": {layer: absmax.float().tolist() for layer, absmax in values.items()},
    }
    Path(answer_path).write_text(json.dumps(answer))


@contextmanager
def _watched(model: Any, modules: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    """The largest magnitude that comes into each module while the context lasts."""
    import torch

    seen: dict[str, torch.Tensor] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        absmax = tensor.detach().abs().amax()
        seen[name] = torch.maximum(seen[name], absmax) if name in seen else absmax

    named = dict(model.named_modules())
    hooks = [named[name].register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])) for name in modules if name in named]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    main(*sys.argv[1:])
