"""Fills modules of an empty model with weights of a checkpoint, one module at a time, and empties them again.

The model is transformers' own class on the meta device; names are matched, renamed, fused and stacked by transformers' own mapping
(``conversion_mapping.py``, ``core_model_loading.py`` of transformers 5.23), as ``from_pretrained`` would.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from convert.architecture import build
from formats.errors import NumericsError, SourceError

if TYPE_CHECKING:
    import torch

    from convert.architecture import Part
    from convert.source import Checkpoint

#: Rows of an embedding that are read at once, in elements.
_ROWS_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Place:
    """Where the weight of one expert lies: of ``parameter``, 3-D and the model's, the matrix ``expert`` and its output features
    ``[start, stop)``; ``turned``: it is (in, out)."""

    parameter: str
    expert: int
    start: int
    stop: int
    turned: bool

    def of(self, module: Any) -> torch.Tensor:
        """The matrix (out, in), a view, in a module that the parameter's name begins at."""
        matrix: torch.Tensor = module.get_parameter(self.parameter).detach()[self.expert]
        return (matrix.T if self.turned else matrix)[self.start : self.stop]


class Skeleton:
    """``model`` on the meta device, in ``dtype`` (a torch name; ``auto``: the source's own), and what fills its parameters.

    Raises :class:`SourceError` when transformers does not know the architecture.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: str = "auto", trust_remote_code: bool = False) -> None:
        import torch

        self.checkpoint = checkpoint
        self.trust_remote_code = trust_remote_code
        config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
        wanted = own_dtype(checkpoint) if dtype == "auto" else dtype
        model = build({**config, "dtype": wanted}, folder=checkpoint.folder, trust_remote_code=trust_remote_code)
        if model is None:
            raise SourceError(f"{checkpoint.origin}: transformers does not know the architecture {config.get('model_type')!r}")
        self.model: Any = model.eval()
        self.dtype: torch.dtype = getattr(torch, wanted)
        self._fills = _match(self.model, checkpoint)
        self._keep_in_float32 = self.model._get_dtype_plan(self.dtype)
        #: By what an expert's layer is called on disk, those of tensors given to :meth:`find_experts`.
        self.experts: dict[str, Place] = {}

    def tensors(self, module: str) -> tuple[str, ...]:
        """The checkpoint's tensors that a module, or what lies inside it, is made of."""
        return tuple(dict.fromkeys(name for target, (names, _) in self._fills.items() if _inside(target, module) for name, _ in names))

    def load(self, module: str, device: str, *, read: Callable[[str], torch.Tensor] | None = None, skip: Iterable[str] = ()) -> None:
        """Fills every parameter and saved buffer inside ``module`` ("" for all), but those inside ``skip``.

        ``read``: checkpoint tensor -> values in its own shape; what the checkpoint holds unless given.
        """
        read = read or self.read
        skip = tuple(skip)
        for target in self._fills:
            if not _inside(target, module) or any(_inside(target, other) for other in skip):
                continue
            dtype = self._dtype_of(target)
            for name, value in self._made(target, lambda name, dtype=dtype: read(name).to(device=device, dtype=dtype)).items():  # type: ignore[misc]
                self.put(name, value)

    def _made(self, target: str, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a parameter becomes of the checkpoint's tensors, by transformers' own converter; it may fill others beside it."""
        names, converter = self._fills[target]
        if converter is None:
            return {target: read(names[0][0])}
        converter = deepcopy(converter)
        for name, pattern in names:
            converter.add_tensor(target, name, pattern, read(name))
        made = converter.convert(target, self.model, self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def find_experts(self, parts: Mapping[str, Sequence[Part]]) -> None:
        """Finds where the model holds the experts that tensors of the checkpoint hold, ``parts`` by tensor; :meth:`weight` then knows them.

        Of separate matrices it is seen: the converter is handed columns of numbered rows, and where the numbers end up is where the
        rows do. Raises :class:`SourceError` where they do not stay together.
        """
        import torch

        for target, (names, _) in self._fills.items():
            wanted = [name for name, _ in names if name in parts and parts[name][0].module not in self.experts]
            if not wanted:
                continue
            shape = self.model.get_parameter(target).shape
            whole = self.checkpoint.tensors[wanted[0]]
            if len(whole.shape) == 3:
                turned = (parts[wanted[0]][0].columns is not None) != (tuple(shape) != whole.shape)
                for part in parts[wanted[0]]:
                    expert, start = divmod(part.start, whole.shape[1])
                    low, high = part.columns or (start, start + part.stop - part.start)
                    self.experts[part.module] = Place(target, expert, low, high, turned)
                continue
            rows = {name: self.checkpoint.tensors[name].shape[0] for name, _ in names}
            first = dict(zip(rows, itertools.accumulate(rows.values(), initial=0), strict=False))
            numbers = self._made(target, lambda name, first=first, rows=rows: torch.arange(first[name], first[name] + rows[name])[:, None])[  # type: ignore[misc]
                target
            ]
            where = torch.argsort(numbers.flatten())
            count = len(where) // shape[0]
            for name in wanted:
                found = where[first[name] : first[name] + rows[name]]
                expert, start = divmod(int(found[0]), count)
                if not torch.equal(found, torch.arange(int(found[0]), int(found[0]) + rows[name])) or numbers.dim() != 3:
                    raise SourceError(f"{name}: {type(self.model).__name__} does not hold its rows as they are, so it cannot be calibrated")
                self.experts[parts[name][0].module] = Place(target, expert, start, start + rows[name], numbers.shape[2] != 1)

    def experts_in(self, block: str) -> dict[str, Place]:
        """Those of a block, by their names and with their parameters' as the block calls them; none where the checkpoint has another name
        for it."""
        inside = f"{block}."
        return {
            name.removeprefix(inside): replace(place, parameter=place.parameter.removeprefix(inside))
            for name, place in self.experts.items()
            if name.startswith(inside) and place.parameter.startswith(inside)
        }

    def weight(self, module: str) -> torch.Tensor:
        """The weight of a linear layer, or of an expert, as it is now: (out, in), a view to read and to write."""
        from transformers.pytorch_utils import Conv1D

        place = self.experts.get(module)
        if place is None:
            layer = self.model.get_submodule(module)
            weight: torch.Tensor = layer.weight.detach()
            return weight.T if isinstance(layer, Conv1D) else weight
        return place.of(self.model)

    def put(self, name: str, value: torch.Tensor) -> None:
        """Makes a tensor the parameter or buffer of that name. Raises :class:`SourceError` when its shape is another."""
        import torch

        path, _, last = name.rpartition(".")
        owner = self.model.get_submodule(path)
        there = getattr(owner, last)
        if there.shape != value.shape:
            raise SourceError(f"{name}: {list(value.shape)} in the checkpoint, {list(there.shape)} in {type(self.model).__name__}")
        setattr(owner, last, value if last in owner._buffers else torch.nn.Parameter(value, requires_grad=False))

    def require_finite(self, module: str) -> None:
        """Raises :class:`NumericsError` naming a tensor inside ``module`` with a value that is not finite: what comes of it is NaN, in
        layers that are not to blame."""
        import torch

        for name, parameter in self.model.get_submodule(module).named_parameters(prefix=module):
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if not torch.isfinite(torch.stack(torch.aminmax(parameter.detach()))).all():
                where, dtype = self.own_tensor(name) or name, str(parameter.dtype).removeprefix("torch.")
                raise NumericsError(f"{where}: NaN or Inf among its values in {dtype}; the checkpoint is damaged, fetch or train it again")

    def free(self, module: str) -> None:
        """Empties every parameter inside ``module``."""
        import torch

        for part in self.model.get_submodule(module).modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    setattr(part, name, torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

    def compute_buffers(self, device: str) -> None:
        """Computes what no checkpoint holds (rotary frequencies, position ids, sines that are parameters), by the model's own
        ``_init_weights``.

        Raises :class:`SourceError` for one that the model's class does not compute.
        """
        import torch
        from transformers import PreTrainedModel

        filled = set(self._fills)
        owners: dict[str, Any] = {}
        for path, module in self.model.named_modules():
            owner = module if isinstance(module, PreTrainedModel) else next(o for p, o in reversed(owners.items()) if _inside(path, p))
            if isinstance(module, PreTrainedModel):
                owners[path] = module
            there = {**module._buffers, **module._parameters}
            missing = [name for name, value in there.items() if value is not None and f"{path}.{name}".lstrip(".") not in filled]
            if not missing:
                continue
            for name in missing:
                empty = _unset(there[name], device)
                setattr(module, name, empty if name in module._buffers else torch.nn.Parameter(empty, requires_grad=False))
            with torch.no_grad():
                owner._init_weights(module)
            unset = [name for name in missing if _is_unset(getattr(module, name))]
            if unset:
                raise SourceError(f"{path}.{unset[0]}: no tensor fills it and {type(self.model).__name__} does not compute it")

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint in its own shape."""
        spec = self.checkpoint.tensors[name]
        return self.checkpoint.reader.read(name, 0, spec.matrix_shape[0]).reshape(spec.shape)

    def own_tensor(self, parameter: str) -> str | None:
        """The one checkpoint tensor that a parameter is, unchanged; None where several are fused or it is changed."""
        names, converter = self._fills.get(parameter, ((), None))
        return names[0][0] if names and converter is None else None

    def parameters(self, tensor: str) -> list[str]:
        """The parameters that a tensor of the checkpoint is, unchanged."""
        return [target for target in self._fills if self.own_tensor(target) == tensor]

    def has(self, parameter: str) -> bool:
        """Whether there is a parameter of that name."""
        path, _, last = parameter.rpartition(".")
        return self.model.get_submodule(path)._parameters.get(last) is not None

    def load_rows(self, parameter: str, rows: torch.Tensor, device: str) -> None:
        """Fills an embedding with some rows only (int64, rising); it then has as many rows as that."""
        import torch

        name = self.own_tensor(parameter)
        assert name is not None
        count, columns = self.checkpoint.tensors[name].matrix_shape
        found = torch.empty(len(rows), columns, dtype=self._dtype_of(parameter))
        step = max(1, _ROWS_ELEMENTS // columns)
        for start in range(0, count, step):
            low, high = torch.searchsorted(rows, torch.tensor([start, start + step])).tolist()
            if high > low:
                found[low:high] = self.checkpoint.reader.read(name, start, min(start + step, count))[rows[low:high] - start]
        path, _, last = parameter.rpartition(".")
        setattr(self.model.get_submodule(path), last, torch.nn.Parameter(found.to(device), requires_grad=False))

    def _dtype_of(self, target: str) -> torch.dtype:
        import torch

        parts = target.split(".")
        return torch.float32 if any(part in parts or part in target for part in self._keep_in_float32) else self.dtype


def own_dtype(checkpoint: Checkpoint) -> str:
    """What ``dtype="auto"`` means: what the config says; float32 for a source whose values are decoded."""
    from formats.dtypes import DTYPES, FLOATS

    if checkpoint.folder is None or checkpoint.coded:
        return "float32"
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if said:
        return str(said).removeprefix("torch.")
    first = next((spec.dtype for spec in checkpoint.tensors.values() if spec.dtype in FLOATS), "F32")
    return DTYPES[first].torch_name


def _match(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[list[tuple[str, str]], Any]]:
    """By parameter or saved buffer: the checkpoint tensors it is made of, each with the pattern that it matched, and the converter that
    makes it of them (None: it is the tensor). A tied parameter is there under each of its names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, tuple[list[tuple[str, str]], Any]] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if renamed not in state:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if renamed in state:
            found.setdefault(renamed, ([], by_pattern[pattern] if pattern else None))[0].append((name, pattern or name))
    aliases: dict[int, list[str]] = {}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in by_name.items():
        aliases.setdefault(id(parameter), []).append(name)
    for target in list(found):
        for alias in aliases[id(by_name[target])] if target in by_name else ():
            found.setdefault(alias, found[target])
    return found


def _inside(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _unset(buffer: torch.Tensor, device: str) -> torch.Tensor:
    """A buffer of values that no model computes."""
    import torch

    if buffer.is_floating_point():
        return torch.full_like(buffer, float("nan"), device=device)
    return torch.full_like(buffer, torch.iinfo(buffer.dtype).min, device=device) if buffer.dtype != torch.bool else buffer.to(device)


def _is_unset(buffer: torch.Tensor) -> bool:
    import torch

    if buffer.is_floating_point():
        return bool(torch.isnan(buffer).any())
    return buffer.dtype != torch.bool and bool((buffer == torch.iinfo(buffer.dtype).min).any())
