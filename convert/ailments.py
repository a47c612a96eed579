"""The five errors a bitsandbytes user meets: what each looks like in a program's output, in words, and what cures it.

transformers wraps an error of bitsandbytes in words that do not name it ("some issues during automatic conversion"), so the whole output
is searched, not its last line. :mod:`convert.diagnosis` finds the same five in a folder.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

#: A continuation in which one token makes up this share is degenerate.
REPEATED_SHARE = 0.8


@dataclass(frozen=True)
class Ailment:
    """``signs``: a regular expression over everything a program printed before it failed."""

    message: str
    remedy: str
    signs: str


FLAG = "load_in_8bit missing"
FLOAT = "loaded as float"
ATTENTION = "no attention kernel"
MEMORY = "out of memory"
REPEATED = "one repeated token"

#: The signs are those of torch 2.0 to 2.13, bitsandbytes 0.50 and transformers 4.30 to 5.23. The first that matches is the one.
AILMENTS = {
    FLAG: Ailment(
        "quantization_config does not say load_in_8bit, as old versions of BitsAndBytesConfig saved it",
        'write "quant_method": "bitsandbytes" and "load_in_8bit": true into quantization_config in config.json',
        r"has no attribute '_?load_in_8bit'|has no `quant_method` attribute|has no attribute 'get_loading_attributes'",
    ),
    ATTENTION: Ailment(
        "no scaled_dot_product_attention kernel runs on this device",
        'load it with attn_implementation="eager", or let torch use its plain kernel again: torch.backends.cuda.enable_math_sdp(True)',
        r"No available kernel|No viable backend for scaled_dot_product_attention|no kernel found to launch",
    ),
    MEMORY: Ailment(
        "memory ran out",
        "free memory; where bitsandbytes quantizes while it loads, write the 8-bit weights once instead, tensor by tensor: "
        "octavo convert llama-bnb-int8 --model MODEL",
        r"out of memory|[Cc]an(?:not|'t) allocate memory|MemoryError|bad_alloc|killed by signal 9\b",
    ),
    REPEATED: Ailment(
        "llm_int8_skip_modules does not say which layers are in 8 bit: codes are multiplied as weights",
        "name in llm_int8_skip_modules exactly the linear layers whose weights are not int8",
        r"'Parameter' object has no attribute 'S?CB'|same dtype, but got: [\w:]+ != signed char",
    ),
    FLOAT: Ailment(
        "the weights were saved in 8 bit and are loaded as floats: codes are taken for weights",
        "give config.json the quantization_config that the weights were saved with, and pass no other to from_pretrained",
        r"\.SCB\s+\| UNEXPECTED",
    ),
}


def recognise(output: str) -> str | None:
    """The name of the ailment that a program's whole output shows, None for an unknown one."""
    return next((name for name, ailment in AILMENTS.items() if re.search(ailment.signs, output)), None)


def explain(output: str) -> str:
    """Why a program failed, from its whole output: its last words and, where they are known, the ailment and its remedy."""
    name = recognise(output)
    if name is None:
        return last_lines(output)
    return f"{AILMENTS[name].message}; {AILMENTS[name].remedy} ({last_lines(output)})"


def last_lines(output: str) -> str:
    """The last two lines a program wrote, in one, without those that only point at the line above them."""
    lines = [line.strip() for line in output.strip().splitlines() if line.strip("~^ \t\r")]
    return " ".join(lines[-2:])[-600:] or "it said nothing"


def repeated_share(tokens: Sequence[int]) -> float:
    """The share of the most frequent token."""
    return max(Counter(tokens).values()) / len(tokens) if tokens else 0.0
