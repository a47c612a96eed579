"""A source seen through rotations of its hidden states (:mod:`convert.algorithms.rotation`): the same function, other weights.

Whatever reads tensors of a rotated :class:`~convert.source.Checkpoint` is given turned ones, so that rounding, smoothing, GPTQ,
every format and the check of numbers work on them as they are. Which linears read the residual stream, behind which norm, and which
write to it, is seen while the model runs on the meta device; that the function is unchanged is proved with the real weights, block by
block, before anything is written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from convert.algorithms.rotation import Rotation, make_rotation
from convert.architecture import asks_no_values
from convert.groups import first_tensor
from convert.lanes import walk
from convert.loading import Skeleton
from formats.errors import RecipeError, SourceError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from convert.recipe import Recipe
    from convert.source import Checkpoint, Reader

#: Elements that are turned at once, in float64.
_CHUNK = 1 << 22
#: Turned tensors that need all of their rows are kept for the slabs to come: as many as workers are likely to be at.
_HELD = 2
#: Weights that a core turns in a second; for widths of 576 to 4,096 a Zen 4 core turned 48 to 141 million.
TURNED_PER_SECOND = 70_000_000
#: How far the function may move in float32, as a share: sums come out in another order. On the sample 3e-6 were seen behind the last block.
TOLERANCE = 1e-4
#: Tokens that prove it.
_TOKENS = 8


@dataclass(frozen=True)
class Turn:
    """What becomes of a tensor, in this order: ``norm``, the tensor of a norm whose weight moves into the columns, with the ``offset`` that
    the model adds to it (1 in Gemma); ``reads`` the residual stream, or is made of its rows (R1 on the right); ``writes`` to it (R1^T
    on the left, of each expert where several lie in it); makes ``values`` of heads, or ``mixes`` them (R2). ``ones``: it is the weight of
    such a norm, and becomes what multiplies by one. ``copy``: it is the tensor of that name, untied."""

    norm: str = ""
    offset: float = 0.0
    reads: bool = False
    writes: bool = False
    values: bool = False
    mixes: bool = False
    ones: bool = False
    copy: str = ""

    def __str__(self) -> str:
        """For the ledger."""
        does = [
            ("untied from " + self.copy) if self.copy else "",
            "its weight moved into what reads it" if self.ones else "",
            f"{self.norm} moved in" if self.norm else "",
            "R1" if self.reads or self.writes else "",
            "R2" if self.values or self.mixes else "",
        ]
        return f"rotated ({', '.join(word for word in does if word)})"


class RotatedReader:
    """Reads tensors as ``turns`` says, in float32; everything else as ``inner`` does."""

    def __init__(self, inner: Reader, source: Checkpoint, turns: Mapping[str, Turn], r1: Rotation | None, r2: Rotation | None) -> None:
        self.source = source
        self.r1 = r1
        self._inner = inner
        self._turns = turns
        self._r2 = r2
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = Lock()

    def path(self, file: str) -> Path:
        return self._inner.path(file)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        turn = self._turns.get(name)
        if turn is None:
            return self._inner.read(name, start, stop)
        if turn.ones:
            return torch.full((stop - start, 1), 1 - turn.offset)
        if not turn.writes and not turn.values:
            return self._by_rows(name, turn, start, stop)
        with self._lock:
            if name not in self._held:
                self._held[name] = self._whole(name, turn)
            self._held.move_to_end(name)
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
            return self._held[name][start:stop].clone()

    def _by_rows(self, name: str, turn: Turn, start: int, stop: int) -> torch.Tensor:
        """Rows do not see each other: in runs of so many that float64 stays small."""
        import torch

        norm = self._inner.read(turn.norm, 0, self.source.tensors[turn.norm].elements).double().reshape(-1) if turn.norm else None
        stored = self._inner.read(turn.copy or name, start, stop)
        turned = torch.empty(stored.shape)
        step = max(1, _CHUNK // max(stored.shape[1], 1))
        for first in range(0, len(stored), step):
            rows = stored[first : first + step].double()
            if norm is not None:
                rows = rows * (norm + turn.offset)
            if turn.reads and self.r1 is not None:
                rows = self.r1.turn(rows)
            if turn.mixes and self._r2 is not None:
                rows = self._r2.turn(rows)
            turned[first : first + step] = rows
        return turned

    def _whole(self, name: str, turn: Turn) -> torch.Tensor:
        """All rows, in runs of columns."""
        spec = self.source.tensors[name]
        turned = self._by_rows(name, replace(turn, writes=False, values=False), 0, spec.matrix_shape[0])
        step = max(1, _CHUNK // max(len(turned), 1))
        for first in range(0, turned.shape[1], step):
            columns = turned[:, first : first + step].double().T
            if turn.values and self._r2 is not None:
                columns = self._r2.turn(columns)
            if turn.writes and self.r1 is not None:
                columns = self.r1.turn(columns)
            turned[:, first : first + step] = columns.T
        return turned

    def held_bytes(self, workers: int) -> int:
        """Memory beside what is read: turned tensors that are kept and one more that is made, runs of float64 of each worker, a matrix."""
        whole = [4 * self.source.tensors[name].elements for name, turn in self._turns.items() if turn.writes or turn.values]
        matrices = [8 * factor.numel() for rotation in (self.r1, self._r2) if rotation for factor in rotation.factors]
        return (_HELD + 1) * max(whole, default=0) + workers * 3 * 8 * _CHUNK + sum(matrices)

    @property
    def turned_elements(self) -> int:
        """Of all tensors that are multiplied by a rotation."""
        turned = [turn.copy or name for name, turn in self._turns.items() if turn.reads or turn.writes or turn.values or turn.mixes]
        return sum(self.source.tensors[name].elements for name in turned)


@dataclass
class Stream:
    """What was seen of a model at work, by names of modules: the norm ``behind`` which a linear reads the residual stream; the linears that
    make ``values`` of heads, with the size of a head; and all linears in the order of call. ``others``: modules that are no linears and
    read the stream behind a norm, routers and experts among them.
    ``norms``: all that were run, known by a 1-D weight as long as their input."""

    behind: dict[str, str] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    linears: dict[str, Any] = field(default_factory=dict)
    attentions: dict[str, str] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)


def rotation_bytes(checkpoint: Checkpoint, workers: int) -> int:
    """Memory that turning takes while tensors are read; nothing where there is no rotation."""
    return checkpoint.reader.held_bytes(workers) if isinstance(checkpoint.reader, RotatedReader) else 0


def rotate(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint as the recipe's ``rotation`` turns it; itself where there is none. A tied head becomes a tensor of its own.

    Raises :class:`RecipeError`, naming the recipe's line and what stands in the way, for a model whose residual stream is not one that
    norms without a mean read and linears write.
    """
    options = recipe.rotation
    if options is None:
        return checkpoint
    where = recipe.where("rotation")
    if any(coded.quantization is not None for coded in checkpoint.coded.values()) or checkpoint.cache_scales:
        raise RecipeError(
            f"{where}: {checkpoint.origin} is quantized already, and its codes cannot be turned; make floats of it first "
            "(recipe dequantize-bf16), or convert the model it was made from"
        )
    skeleton = Skeleton(checkpoint, trust_remote_code=recipe.trust_remote_code)
    stream = _observe(skeleton.model, where)
    turns: dict[str, Turn] = {}
    hidden = head_size = 0
    if options.residual:
        hidden = _turn_stream(turns, skeleton, stream, where)
    if options.values:
        head_size = _turn_values(turns, skeleton, stream, where)
    r1 = make_rotation(hidden, seed=options.seed) if hidden else None
    r2 = make_rotation(head_size, seed=options.seed + 1) if head_size else None
    tensors, config, file_of, coded = dict(checkpoint.tensors), dict(checkpoint.config), dict(checkpoint.file_of), dict(checkpoint.coded)
    for name, turn in turns.items():
        if turn.copy:
            tensors[name] = replace(checkpoint.tensors[turn.copy], name=name)
            file_of[name] = file_of[turn.copy]
            coded |= {name: coded[turn.copy]} if turn.copy in coded else {}
            config |= {"tie_word_embeddings": False}
            config |= {"text_config": {**config["text_config"], "tie_word_embeddings": False}} if "text_config" in config else {}
    return replace(
        checkpoint,
        tensors=tensors,
        config=config,
        file_of=file_of,
        coded=coded,
        reader=RotatedReader(checkpoint.reader, checkpoint, turns, r1, r2),
        turned={name: str(turn) for name, turn in turns.items()},
    )


def prove(checkpoint: Checkpoint, *, scratch: Path | None = None, trust_remote_code: bool = False) -> None:
    """Runs a few tokens through the source and the rotated one beside each other, one block of each in memory.

    Raises :class:`SourceError` naming the first block before which the rotated stream is not the source's stream, rotated, or saying that
    what comes out is another.
    """

    reader = checkpoint.reader
    if not isinstance(reader, RotatedReader):
        return
    results: list[list[torch.Tensor]] = [[], []]
    walks = [_walked(source, results[i], scratch, trust_remote_code) for i, source in enumerate((reader.source, checkpoint))]
    for plain, turned in zip(*walks, strict=True):
        was, now = (first_tensor(stand.arguments[0]) for stand in (plain, turned))
        _compare(checkpoint, f"before {plain.name}", was if reader.r1 is None else reader.r1.turn(was.double()), now)
    _compare(checkpoint, "at the end", results[0][0], results[1][0])


def _walked(source: Checkpoint, results: list[torch.Tensor], scratch: Path | None, code: bool) -> Iterator[Any]:
    import torch

    skeleton = Skeleton(source, dtype="float32", trust_remote_code=code)
    count = skeleton.model.get_input_embeddings().num_embeddings
    ids = (torch.arange(_TOKENS) * 7919 + 11) % count
    batch = {"input_ids": ids[None], "use_cache": False}
    return walk(skeleton, [batch], scratch=scratch, finish=lambda _, output: results.append(output.logits))


def _compare(checkpoint: Checkpoint, place: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    expected, found = expected.double(), found.double()
    error = float((found - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise SourceError(
            f"{checkpoint.origin}: rotated, it differs by {error:.2g} {place} (allowed: {TOLERANCE:g}): what was seen of its residual "
            "stream is not all there is; leave rotation out of the recipe"
        )


def _observe(model: Any, where: str) -> Stream:
    """Runs a few tokens of nothing through the empty model."""
    import torch
    from transformers import DynamicCache

    stream = Stream()
    held: list[torch.Tensor] = []  # so that no identity is reused
    made: dict[int, str] = {}
    at_work: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}

    def root(x: torch.Tensor) -> torch.Tensor:
        return x if x._base is None else x._base

    def enter(module: Any, args: Any) -> None:
        at_work.append(names[id(module)])
        if isinstance(module, torch.nn.Linear) and args:
            maker = made.get(id(root(args[0])))
            norm = model.get_submodule(maker) if maker is not None else None
            weight = getattr(norm, "weight", None)
            stream.linears[at_work[-1]] = module
            if weight is not None and weight.dim() == 1 and len(weight) == module.in_features:
                stream.behind[at_work[-1]] = str(maker)
        elif args and _is_norm(module, args[0]):
            stream.norms.append(at_work[-1])
        elif args and isinstance(args[0], torch.Tensor) and any(p.dim() > 1 for p in module.parameters(recurse=False)):
            maker = made.get(id(root(args[0])))
            weight = getattr(model.get_submodule(maker), "weight", None) if maker is not None else None
            if weight is not None and weight.dim() == 1 and len(weight) == args[0].shape[-1]:
                stream.others[at_work[-1]] = str(maker)

    def leave(module: Any, _: Any, output: Any) -> None:
        at_work.pop()
        if isinstance(output, torch.Tensor) and not any(True for _ in module.children()):
            held.append(output)
            made[id(root(output))] = names[id(module)]

    class Watcher(DynamicCache):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            maker = made.get(id(root(value_states)))
            if maker is not None:
                stream.values[maker] = value_states.shape[-1]
                stream.attentions[at_work[-1]] = maker
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    hooks = [hook for m in model.modules() for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        if not model.can_generate():
            raise RecipeError(
                f"{where}: {type(model).__name__} predicts no tokens; its hidden states are what it gives, so nothing can turn"
            )
        if model.config.is_encoder_decoder:
            raise RecipeError(
                f"{where}: {type(model).__name__} writes beside what it reads, and only the one stream of a decoder is turned"
            )
        with torch.no_grad(), asks_no_values(model):
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="meta"), past_key_values=Watcher(), use_cache=True)
    except RecipeError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a model does that has no meta kernel
        raise RecipeError(f"{where}: {type(model).__name__} cannot be observed ({type(error).__name__}); leave rotation out") from None
    finally:
        for hook in hooks:
            hook.remove()
    return stream


def _is_norm(module: Any, x: Any) -> bool:
    weight = getattr(module, "weight", None)
    return hasattr(x, "shape") and weight is not None and tuple(weight.shape) == tuple(x.shape[-1:]) and x.is_floating_point()


def _tensor(skeleton: Skeleton, parameter: str, where: str) -> str:
    found = skeleton.own_tensor(parameter)
    if found is None:
        raise RecipeError(f"{where}: {parameter} is no tensor of its own in the source, so it cannot be turned; leave rotation out")
    return found


def _turn_stream(turns: dict[str, Turn], skeleton: Skeleton, stream: Stream, where: str) -> int:
    """Everything that reads or writes the residual stream; returns its size."""
    import torch

    from convert.architecture import blocks_of

    model = skeleton.model
    embedding = model.get_input_embeddings()
    hidden = int(embedding.embedding_dim)
    names = {id(module): name for name, module in model.named_modules()}
    blocks = blocks_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    touched: set[str] = set()

    def add(module: str, **how: Any) -> None:
        tensor = _tensor(skeleton, f"{module}.weight", where)
        turns[tensor] = replace(turns.get(tensor, Turn()), **how)
        touched.add(f"{module}.weight")

    head = names.get(id(model.get_output_embeddings()), "")
    embeds = names[id(embedding)]
    behind = {linear: norm for linear, norm in stream.behind.items() if stream.linears[linear].in_features == hidden}
    add(embeds, reads=True)
    offsets: dict[str, float] = {}
    others = {name: norm for name, norm in stream.others.items() if len(model.get_submodule(norm).weight) == hidden}
    for name in dict.fromkeys((*behind.values(), *others.values())):
        norm = model.get_submodule(name)
        if isinstance(norm, torch.nn.LayerNorm) or getattr(norm, "bias", None) is not None:
            raise RecipeError(f"{where}: {name} takes the mean of the residual stream or adds to it, which does not commute with R1; "
                              "set rotation: {residual: false}, or leave it out")  # fmt: skip
        offsets[name] = _offset_of(norm)
        add(name, ones=True, offset=offsets[name])
    scaling = next((n for n in stream.norms if n not in offsets and len(model.get_submodule(n).weight) == hidden), None)
    if scaling is not None:
        raise RecipeError(f"{where}: {scaling} scales what is written to the residual stream, which does not commute with R1; "
                          "set rotation: {residual: false}, or leave it out")  # fmt: skip

    def behind_norm(norm: str) -> dict[str, Any]:
        return {"norm": _tensor(skeleton, f"{norm}.weight", where), "offset": offsets[norm], "reads": True}

    for name, norm in others.items():
        weight = getattr(model.get_submodule(name), "weight", None)
        if weight is not None and weight.dim() == 2 and weight.shape[1] == hidden:
            add(name, **behind_norm(norm))
    touched |= _turn_experts(turns, skeleton, {name: behind_norm(norm) for name, norm in others.items()}, hidden, where)
    for name in stream.linears:
        module = stream.linears[name]
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if name in behind:
            how = behind_norm(behind[name])
            if name == head and skeleton.own_tensor(f"{name}.weight") == skeleton.own_tensor(f"{embeds}.weight"):
                turns[f"{name}.weight"] = Turn(**how, copy=_tensor(skeleton, f"{embeds}.weight", where))
                touched.add(f"{name}.weight")
            else:
                add(name, **how)
        elif inside and module.out_features == hidden:
            add(name, writes=True)
            if module.bias is not None:
                bias = _tensor(skeleton, f"{name}.bias", where)
                turns[bias] = replace(turns.get(bias, Turn()), writes=True)
    if head not in behind:
        raise RecipeError(f"{where}: {head or 'the output head'} was not seen behind a norm; set rotation: {{residual: false}}")
    for name, parameter in parameters.items():
        linear = name.removesuffix(".weight") in stream.linears
        if name not in touched and parameter.dim() > 1 and not linear and hidden in parameter.shape:
            raise RecipeError(
                f"{where}: {name} may read or write the residual stream, and how is not known (only linears, norms, routers and "
                "experts behind a norm are); "
                "set rotation: {residual: false}, or leave it out"
            )
    return hidden


def _turn_experts(turns: dict[str, Turn], skeleton: Skeleton, behind: Mapping[str, dict[str, Any]], hidden: int, where: str) -> set[str]:
    """Experts that read the stream behind a norm, by the module that owns them, and write to it; returns the parameters that hold them."""
    from convert.architecture import describe

    checkpoint = skeleton.checkpoint
    if not any(p.dim() == 3 for name in behind for p in skeleton.model.get_submodule(name).parameters(recurse=False)):
        return set()
    described = describe(checkpoint.config, checkpoint.tensors, folder=checkpoint.folder, trust_remote_code=skeleton.trust_remote_code)
    parts = {name: p.parts for name, p in described.parameters.items() if p.kind == "expert" and p.parts} if described else {}
    skeleton.find_experts(parts)
    touched: set[str] = set()
    for tensor, each in parts.items():
        places = [skeleton.experts[part.module] for part in each]
        owner = places[0].parameter.rpartition(".")[0]
        # (out, in) of every layer in it: which side is the stream's?
        sides = {tuple(size == hidden for size in place.of(skeleton.model).shape) for place in places}
        if owner in behind and len(sides) == 1 and all(part.columns is None for part in each):
            (side,) = sides
            if side == (True, True):
                raise RecipeError(f"{where}: {tensor} is square, so whether it reads or writes the residual stream is not seen; "
                                  "set rotation: {residual: false}")  # fmt: skip
            turns[tensor] = Turn(writes=True) if side[0] else Turn(**behind[owner])
            touched.add(places[0].parameter)
    return touched


def _offset_of(norm: Any) -> float:
    """What a norm adds to its weight before it multiplies (1 in Gemma, else 0): what it makes with zeros for a weight, as a share of what
    ones add to that."""
    import torch

    x = torch.linspace(-2, 3, norm.weight.numel())[None]
    nothing, one = (torch.func.functional_call(norm, {"weight": make(norm.weight.shape)}, (x,)) for make in (torch.zeros, torch.ones))
    return round(float((nothing.norm() / (one - nothing).norm()).nan_to_num()), 3)


def _turn_values(turns: dict[str, Turn], skeleton: Skeleton, stream: Stream, where: str) -> int:
    """What makes values and what mixes them, of every attention; returns the size of a head."""
    sizes = set(stream.values.values())
    if len(sizes) != 1:
        seen = "of several sizes" if sizes else "not seen to come from linears"
        raise RecipeError(f"{where}: values of heads were {seen}; set rotation: {{values: false}}")
    (size,) = sizes
    for attention, maker in stream.attentions.items():
        inside = [name for name in stream.linears if name.startswith(f"{attention}.")]
        mixers = [name for name in inside if name not in stream.behind and stream.linears[name].in_features % size == 0]
        if len(mixers) != 1 or maker not in stream.linears:
            raise RecipeError(f"{where}: {attention} was not seen to have one linear that mixes heads; set rotation: {{values: false}}")
        for module, how in ((maker, "values"), (mixers[0], "mixes")):
            for last in ("weight", "bias") if how == "values" else ("weight",):
                if last == "weight" or stream.linears[module].bias is not None:
                    tensor = _tensor(skeleton, f"{module}.{last}", where)
                    was = turns.get(tensor, Turn())
                    turns[tensor] = replace(was, values=was.values or how == "values", mixes=was.mixes or how == "mixes")
    return size
