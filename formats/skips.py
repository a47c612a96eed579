"""The lists by which transformers' own quantizers (bitsandbytes, fp8, torchao) leave modules alone: one is read, and one is found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from formats.errors import FormatError


def skips(module: str, patterns: Iterable[str]) -> bool:
    """Whether readers leave a linear module alone: a pattern is a prefix that ends where a name does, as a regular expression, or a
    suffix that may begin anywhere (transformers 5.23 ``quantizers/quantizers_utils.py``: ``should_convert_module``, negated)."""
    for key in patterns:
        if module.endswith(key):
            return True
        try:
            if re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module):
                return True
        except re.error:
            continue
    return False


def skip_list(quantized: Iterable[str], kept: Sequence[str], automatic: Sequence[str] | None = None) -> list[str] | None:
    """The list that makes readers replace ``quantized`` and leave ``kept``.

    ``automatic``: what transformers leaves alone when nothing is said, which None then says; without it there is always a list. Raises
    :class:`FormatError` when no list says it: a kept module's name ends the name of a quantized one.
    """
    quantized = list(quantized)
    if (
        automatic is not None
        and not any(skips(module, automatic) for module in quantized)
        and all(skips(module, automatic) for module in kept)
    ):
        return None
    for module in quantized:
        if skips(module, kept):
            caught = next(name for name in kept if skips(module, [name]))
            raise FormatError(f"{module} cannot be quantized where {caught} is kept: readers of this format would leave both alone")
    return list(kept)
