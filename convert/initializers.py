"""The ledger as a graph has it: initializers under the names, and in the order of axes, that its products and tables ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from convert.architecture import Architecture, Parameter, Part, whole
from convert.ledger import Entry, is_tied
from convert.onnx.stored import ENCODER, Placed, Stored, Traced
from formats.dtypes import FLOATS
from formats.layer import LayerNames
from formats.onnx_matmulnbits import block_size
from formats.safetensors import TensorSpec


def untied(parameter: Parameter, spec: TensorSpec, architecture: Architecture | None) -> Parameter:
    """A tied head first and under its own name, because its codes and the embedding's rows are two tensors in a graph."""
    if not is_tied(parameter) or architecture is None or architecture.head is None:
        return parameter
    others = [module for module in parameter.modules if module != architecture.head]
    return replace(parameter, modules=(architecture.head, *others), parts=whole(spec, architecture.head))


def as_initializer(kept: Entry, dtype: str) -> Entry:
    """A tensor that is kept, as a graph has it: in its float dtype, a linear layer's weight (in, out), and nothing that no layer reads."""
    if kept.kind in ("unused", "unread"):
        return replace(kept, outputs=())
    transposed = kept.kind in ("linear", "head", "router") and len(kept.modules) == 1 and bool(kept.parts) and not kept.parts[0].columns
    shape = kept.tensor.shape[::-1] if transposed else kept.tensor.shape
    plain = TensorSpec(kept.tensor.name, dtype if kept.tensor.dtype in FLOATS else kept.tensor.dtype, shape)
    return replace(kept, plain=plain, outputs=(plain,), transposed=transposed)


def copied(entry: Entry) -> Entry:
    """A tensor that both graphs of an encoder-decoder read, each from files of its own. Of a tied head the encoder reads the embedding."""
    copied = [entry.beside] if entry.beside else entry.outputs
    copies = {spec.name: f"{ENCODER}.{spec.name}" for spec in copied}
    return replace(entry, copies=copies, outputs=(*entry.outputs, *(replace(spec, name=copies[spec.name]) for spec in copied)))


def stored(entries: Iterable[Entry], *, blocks: bool) -> dict[str, Stored]:
    """By every name that the model has for a parameter, what is stored of it; ``blocks``: codes lie as MatMulNBits reads them."""
    found: dict[str, Stored] = {}
    for entry in entries:
        last = entry.tensor.name.rpartition(".")[2]
        if entry.scheme is None:
            found |= {f"{module}.{last}": _stored_plain(entry) for module in entry.modules if entry.outputs}
            continue
        for module, part in zip(entry.modules, entry.parts, strict=False):
            found[f"{module}.weight"] = _stored_codes(entry, part, blocks=blocks)
        if is_tied(entry):
            own = Stored(entry.beside.name) if entry.beside else found[f"{entry.modules[0]}.weight"]
            found |= {f"{module}.weight": own for module in entry.modules[1:]}
    return found


def placed(entries: Iterable[Entry], traced: Traced, *, blocks: bool) -> dict[str, Placed]:
    """By tensor of the checkpoint, what a traced graph finds of it."""
    found: dict[str, Placed] = {}
    for entry in entries:
        columns = any(part.columns for part in entry.parts)
        beside = Stored(entry.beside.name) if entry.beside else None
        if entry.scheme is None:
            there = Placed(_stored_plain(entry), _stored_plain(entry), columns)
        else:
            there = Placed(_stored_codes(entry, entry.parts[0], blocks=blocks), beside, columns)
        if entry.copies and traced.name == ENCODER:
            there = Placed(beside, beside, columns) if beside else there
            plain = replace(there.plain, name=entry.copies[there.plain.name]) if there.plain else None
            there = Placed(_copy_of(there.product, entry.copies), plain, columns)
        found[entry.tensor.name] = there
    return found


def read_by(traced: Traced, entries: Iterable[Entry]) -> list[TensorSpec]:
    """What of the outputs lies in the files of a graph."""
    found: list[TensorSpec] = []
    for entry in entries:
        if entry.tensor.name in traced.tensors:
            own = set(entry.copies.values())
            found += [spec for spec in entry.outputs if not own or (spec.name in own) == (traced.name == ENCODER)]
    return found


def _copy_of(stored: Stored, copies: Mapping[str, str]) -> Stored:
    return replace(stored, name=copies[stored.name], scale=copies.get(stored.scale, stored.scale))


def _stored_plain(entry: Entry) -> Stored:
    return Stored(entry.plain.name, transposed=entry.transposed)


def _stored_codes(entry: Entry, part: Part, *, blocks: bool) -> Stored:
    assert entry.scheme is not None
    return Stored(
        f"{part.module}.weight",
        entry.scheme,
        LayerNames.of(f"{part.module}.weight").scale,
        f"{part.module}.input_scale",
        block_size(entry.scheme) if blocks else 0,
        part.shape(entry.tensor)[1],
    )
