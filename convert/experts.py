"""What goes into each expert of a layer, seen where it is multiplied.

transformers holds a layer's experts in one 3-D parameter and multiplies them in its own code, so there is no linear module to hook. While
the module that owns the parameter runs, every product of matrices passes by here, and one whose matrix lies in the parameter's memory says
by its place which expert it is, and shows what goes into it. No class is known by name and none is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from formats.errors import SourceError

#: Called with the parameter, the expert's number and what goes into it, (tokens, in); what it returns, if anything, is multiplied instead.
Seen = Callable[[str, int, torch.Tensor], torch.Tensor | None]


class Watch:
    """Hooks on a module with 3-D parameters: ``seen`` is called for each expert multiplied in a run of it that begins while ``active()``.

    ``show``: experts that the module is run for once more, with all its tokens sent to each; ``seen`` is then called for these runs alone.
    Runs of several threads do not disturb each other.
    """

    def __init__(self, module: Any, names: Iterable[str], seen: Seen, *, active: Callable[[], bool]) -> None:
        self.show: tuple[int, ...] = ()
        self._module = module
        self._names = tuple(names)
        self._seen = seen
        self._active = active
        self._modes: dict[int, Products] = {}
        self._hooks = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True, with_kwargs=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _products(self, seen: Seen) -> Products:
        return Products({name: getattr(self._module, name.rpartition(".")[2]) for name in self._names}, seen)

    def _enter(self, *_: Any) -> None:
        if self._active() and not self.show:
            mode = self._products(self._seen)
            mode.__enter__()  # type: ignore[no-untyped-call]
            self._modes[get_ident()] = mode

    def _leave(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], _: Any) -> None:
        if mode := self._modes.pop(get_ident(), None):
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for expert in self.show:
            tokens: dict[str, int] = {}

            def seen(name: str, number: int, x: torch.Tensor, expert: int = expert, tokens: dict[str, int] = tokens) -> None:
                if number == expert:
                    tokens[name] = tokens.get(name, 0) + len(x)
                    self._seen(name, number, x)

            given, named = _sent_to(expert, args), _sent_to(expert, tuple(kwargs.values()))
            with self._products(seen):
                module.forward(*given, **dict(zip(kwargs, named, strict=True)))
            if set(tokens.values()) != {next(x.numel() // x.shape[-1] for x in (*args, *kwargs.values()) if torch.is_tensor(x))}:
                raise SourceError(
                    f"{self._names[0]}: {type(module).__name__} is not told by an index which expert a token goes to, so calibration "
                    "cannot send all tokens to one; give it more text, or set calibration.unseen_experts: round"
                )


def around(module: Any, mode: Callable[[], Products]) -> list[Any]:
    """Hooks by which every run of a module, in whatever thread, lies in a mode of its own."""
    entered: dict[int, Products] = {}

    def enter(*_: Any) -> None:
        entered[get_ident()] = mode()
        entered[get_ident()].__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: Any) -> None:
        entered.pop(get_ident()).__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _sent_to(expert: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with (tokens, k) indices of experts, and the weights of the same shape, made (tokens, 1) for one expert of weight 1."""
    indices = [value for value in values if torch.is_tensor(value) and value.dim() == 2 and not value.dtype.is_floating_point]
    shapes = {index.shape for index in indices}

    def sent(value: Any) -> Any:
        if not torch.is_tensor(value) or value.shape not in shapes:
            return value
        return torch.full_like(value[:, :1], 1 if value.dtype.is_floating_point else expert)

    return tuple(sent(value) for value in values)


class Products(TorchDispatchMode):
    """While it is entered, calls ``seen`` for every product with a matrix that begins where an expert of one of ``parameters``,
    (experts, ., .), does; with ``pieces`` for one with a part of such a matrix too. What ``seen`` returns is multiplied instead."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], seen: Seen, *, pieces: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {parameter.untyped_storage().data_ptr(): (name, parameter) for name, parameter in parameters.items()}
        self._seen = seen
        self._pieces = pieces

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            x, matrix = args[-2:]
            name, parameter = self._parameters.get(matrix.untyped_storage().data_ptr(), ("", matrix))
            if name:
                expert, inside = divmod(matrix.storage_offset() - parameter.storage_offset(), parameter[0].numel())
                # To who only looks, the first piece of a matrix is enough: all have the same input.
                if inside == 0 or self._pieces:
                    args = (*args[:-2], self._shown(name, expert, x), matrix)
        return func(*args, **(kwargs or {}))

    def _shown(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What is to be multiplied, for an input (tokens, in) of one expert or (experts, tokens, in) of several from ``expert`` on."""
        if x.dim() == 2:
            instead = self._seen(name, expert, x)
            return x if instead is None else instead
        for i, rows in enumerate(x):
            # What goes to other experts is zero here.
            some = rows.any(dim=1)
            instead = self._seen(name, expert + i, rows[some])
            if instead is not None:
                x = x.index_put((torch.tensor([i], device=x.device), some.nonzero()[:, 0]), instead)
        return x
