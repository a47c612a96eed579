"""What a model is made of, asked of transformers itself on the meta device: no weight, no name table, no tracing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.imports import uncollected
from formats.errors import SourceError
from formats.layer import Attention
from formats.safetensors import TensorSpec
from formats.skips import skips

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part:
    """The weight of one linear layer inside a tensor of the checkpoint; ``module`` is what the layer is called on disk.

    Of the tensor as rows of its last axis it is rows ``[start, stop)``, (out, in). With ``columns`` it is stored the other way round,
    (in, out): those rows are input features, and output features are the columns ``[columns[0], columns[1])``.
    """

    module: str
    start: int
    stop: int
    columns: tuple[int, int] | None = None

    def shape(self, tensor: TensorSpec) -> tuple[int, int]:
        """(out, in)."""
        if self.columns is None:
            return self.stop - self.start, tensor.matrix_shape[1]
        return self.columns[1] - self.columns[0], self.stop - self.start


@dataclass(frozen=True)
class Parameter:
    """One tensor of the checkpoint as the architecture sees it.

    ``modules``: every module that uses it (two for a tied head), as the model calls them, which may not be what the checkpoint does.
    ``kind``: ``linear``, ``head`` (the output head, also where it is tied to the embedding), ``embedding``, ``expert`` (one of several,
    or all of them in one 3-D tensor), ``router`` (what chooses experts, or weighs a shared one), ``bias``, ``norm`` for what is left
    that is a vector, ``other``. ``parts``: the linear layers whose weights it holds, none for what cannot be quantized.
    ``experts``: of an expert, what the name of every expert of its layer begins with, on disk. ``reading``: of an expert, what
    transformers makes of the parts when each is a quantized tensor of its own: ``merged`` into one float tensor, ``linear`` modules, or
    ``unread``.
    """

    modules: tuple[str, ...]
    kind: str
    parts: tuple[Part, ...] = ()
    experts: str = ""
    reading: str = ""


@dataclass(frozen=True)
class Architecture:
    """``parameters`` by checkpoint tensor name. ``missing``: parameters of the model that no tensor of the checkpoint fills; ``misshapen``:
    tensors that do not fit their parameter, and its shape.

    ``groups``: modules that were seen to read the same input (q, k, v; gate, up), None where the model could not be run on
    the meta device. ``linears``: every linear module, whether or not the checkpoint has a tensor of its own for it.
    ``head``: the module of the output head, None for a model that predicts no tokens; ``tied``: it shares the embedding's tensor.
    ``context_length`` in tokens and ``cache_bytes_per_token`` (keys and values in 16 bit) where the config says them.
    ``attentions``: who was seen to write keys and values to the cache, None where that could not be observed.
    ``replaceable``: the linear modules that transformers' bitsandbytes may replace: of torch's class itself or Conv1D, no subclass.
    ``skipped``: the patterns it leaves alone unless told which. ``begun_outside``: the linear modules whose weight transformers reaches for
    through the module around them when it loads. ``predicts``: it predicts next tokens; ``reads``: what it is given,
    ``input_ids`` or ``pixel_values``; ``encoder_decoder``: it writes about what it has read. ``blocks``: the modules it is a stack of, in
    order; what flows between them has ``hidden_size`` features. ``token_rows``: of the embedding of tokens, None where that is no table.
    """

    name: str
    parameters: Mapping[str, Parameter]
    missing: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] | None
    linears: tuple[str, ...]
    head: str | None
    tied: bool
    context_length: int | None
    cache_bytes_per_token: int | None
    attentions: tuple[Attention, ...] | None
    replaceable: frozenset[str]
    skipped: tuple[str, ...]
    begun_outside: frozenset[str] = frozenset()
    predicts: bool = True
    reads: str = "input_ids"
    encoder_decoder: bool = False
    blocks: tuple[str, ...] = ()
    hidden_size: int | None = None
    token_rows: int | None = None
    misshapen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def describe(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], *, folder: Path | None = None, trust_remote_code: bool = False
) -> Architecture | None:
    """Builds the model on the meta device and matches its parameters with the checkpoint's tensors, by transformers' own renaming.

    Returns None when transformers does not know the architecture. Raises :class:`SourceError` when the config cannot be
    built from, or asks for code of its own that the recipe does not allow.
    """
    with uncollected():
        import transformers.modeling_utils  # noqa: F401  which brings most of what a model is built of
        from transformers.quantizers.base import get_keys_to_not_convert

    model = build(config, folder=folder, trust_remote_code=trust_remote_code)
    if model is None:
        return None
    rename = _renamer(model)
    found = {name: rename(name) for name in tensors}
    names = {name: (renamed[0],) if renamed else () for name, renamed in found.items()}
    owners: dict[int, list[str]] = {}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in by_name.items():
        owners.setdefault(id(parameter), []).append(name)
    kinds = _module_kinds(model)
    linears = tuple(name for name, module in model.named_modules() if _is_linear(module))
    parameters = {}
    for tensor, targets in names.items():
        aliases = [alias for target in targets if target in by_name for alias in owners[id(by_name[target])]] or list(targets)
        modules = tuple(dict.fromkeys(alias.rpartition(".")[0] for alias in aliases))
        parameters[tensor] = _classify(
            tensors[tensor],
            modules,
            aliases,
            kinds,
            by_name.get(aliases[0]) if aliases else None,
            linear=bool(modules) and modules[0] in linears,
        )
        if parameters[tensor].kind == "expert":
            parameters[tensor] = _split_experts(tensors[tensor], parameters[tensor], model.get_submodule(modules[0]), rename)
    shapes = {name: tuple(by_name[renamed[0]].shape) for name, renamed in found.items() if renamed and renamed[0] in by_name}
    filled = {alias for targets in names.values() for target in targets if target in by_name for alias in owners[id(by_name[target])]}
    text_config = model.config.get_text_config()
    groups, attentions = _observe(model)
    tied = any(parameter.kind == "head" and len(parameter.modules) > 1 for parameter in parameters.values())
    return Architecture(
        name=type(model).__name__,
        parameters=parameters,
        missing=tuple(name for name in by_name if name not in filled and not _is_computed(model, name)),
        groups=groups,
        linears=linears,
        head=_head_name(model),
        tied=tied,
        context_length=getattr(text_config, "max_position_embeddings", None),
        cache_bytes_per_token=_cache_bytes(text_config),
        attentions=attentions,
        replaceable=_replaceable(model),
        skipped=tuple(sorted(get_keys_to_not_convert(model))),
        begun_outside=_begun_outside(model),
        blocks=blocks_of(model),
        hidden_size=getattr(text_config, "hidden_size", None),
        token_rows=_token_rows(model),
        predicts=bool(model.can_generate()),
        reads=str(model.main_input_name),
        encoder_decoder=bool(model.config.is_encoder_decoder and model.can_generate()),
        misshapen={
            name: shape
            for name, shape in shapes.items()
            if shape != tensors[name].shape
            and (renamed := found[name])
            and not renamed[1]
            # Experts in one tensor may lie (in, out) where the model has (out, in); what they are cut into knows that.
            and not (parameters[name].parts and parameters[name].kind == "expert" and sorted(shape) == sorted(tensors[name].shape))
        },
    )


def _token_rows(model: Any) -> int | None:
    try:
        found = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # of what reads no tokens
        return None
    return found if isinstance(found, int) else None


def build(config: Mapping[str, Any], *, folder: Path | None, trust_remote_code: bool) -> Any:
    """transformers' own model on the meta device, None when it does not know the architecture. Raises :class:`SourceError`."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if "auto_map" in config and model_type not in CONFIG_MAPPING:
        if not trust_remote_code:
            raise SourceError(
                f"the model needs code of its own ({config['auto_map']}); set trust_remote_code: true in the recipe if you trust it"
            )
        try:
            parsed = AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(parsed, trust_remote_code=True)  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001  the model's own code may do anything
            raise SourceError(f"{folder}: its own code does not build the model ({type(error).__name__}: {_one_line(error)})") from None
    if model_type not in CONFIG_MAPPING:
        return None
    named = [getattr(transformers, name, None) for name in config.get("architectures") or []]
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(_with_floats(dict(config)))
        with torch.device("meta"):
            if named and named[0] is not None:
                return named[0]._from_config(parsed)
            causal = type(parsed) in AutoModelForCausalLM._model_mapping
            return (AutoModelForCausalLM if causal else AutoModel).from_config(parsed)  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001  a config may be wrong in any way its class can trip over
        where = folder / "config.json" if folder else "config.json"
        raise SourceError(
            f"{where}: transformers cannot build a {model_type} from it ({type(error).__name__}: {_one_line(error)})"
        ) from None


def _with_floats(value: Any) -> Any:
    """``{"__float__": "Infinity"}``, as transformers spells what JSON cannot, becomes what it says (Mamba's ``time_step_limit``)."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def blocks_of(model: Any) -> tuple[str, ...]:
    """The modules a model is a stack of, in their order: the items of its outermost ModuleLists that have parameters."""
    import torch

    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(name.startswith(f"{block}.") for block in found):
            found += [f"{name}.{i}" for i, item in enumerate(module) if any(True for _ in item.parameters())]
    return tuple(found)


def _renamer(model: Any) -> Callable[[str], tuple[str, bool] | None]:
    """Name of a checkpoint's tensor -> the model's parameter, as ``from_pretrained`` matches them, and whether it is split, joined or
    turned on the way, so that its shape need not be the parameter's; None for what the model does not use."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(name: str) -> tuple[str, bool] | None:
        for how in ((renamings, converters), ([], [])):
            renamed, converter = rename_source_key(name, *how, model.base_model_prefix, state)
            if renamed in state:
                return renamed, converter is not None
        return None

    return rename


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def _module_kinds(model: Any) -> dict[str, str]:
    import torch
    from transformers.pytorch_utils import Conv1D

    head = _head_name(model)
    kinds = {}
    for name, module in model.named_modules():
        if name and name == head:
            kinds[name] = "head"
        elif isinstance(module, Conv1D):
            kinds[name] = "conv1d"
        elif isinstance(module, torch.nn.Linear):
            kinds[name] = "linear"
        elif isinstance(module, torch.nn.Embedding):
            kinds[name] = "embedding"
    return kinds | dict.fromkeys(_routers(model), "router")


def _routers(model: Any) -> list[str]:
    """What stands beside the experts of a layer and has a row for each of them, or one row, for a shared expert: it chooses or weighs."""
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        sizes = {1, *(parameter.shape[0] for parameter in experts.parameters() if parameter.dim() == 3)} if experts is not None else set()
        for child, beside in module.named_children() if experts is not None else ():
            weight = getattr(beside, "weight", None)
            if child != "experts" and weight is not None and weight.dim() == 2 and weight.shape[0] in sizes:
                found.append(f"{name}.{child}")
    return found


def _replaceable(model: Any) -> frozenset[str]:
    """Follows ``integrations/bitsandbytes.py`` of transformers 5.23: classes by identity, and never what must stay in float32."""
    import torch
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear or isinstance(module, Conv1D)}
    return frozenset(name for name in linear if not skips(name, model._keep_in_fp32_modules or ()))


def _begun_outside(model: Any) -> frozenset[str]:
    """Asks the model, by taking the weights of linear children away for a moment. ``from_pretrained`` (transformers 5.23) calls
    ``_init_weights`` for every module that holds no tensor of the file itself, an attention of T5 for instance, and in some models that
    writes ``self.q.weight``: what is there already is left alone, but a layer of packed codes has no such name."""
    import torch

    found: set[str] = set()
    owners = {name: owner for name, owner in model.named_modules() if hasattr(owner, "_init_weights")}
    for name, module in model.named_modules():
        children = {child: layer for child, layer in module.named_children() if _is_linear(layer)}
        weights = {child: layer._parameters.pop("weight") for child, layer in children.items()}
        owner = owners[max((outer for outer in owners if not outer or f"{name}.".startswith(f"{outer}.")), key=len)]
        try:
            with torch.no_grad():
                if children:
                    owner._init_weights(module)
        except AttributeError:
            found |= {f"{name}.{child}".removeprefix(".") for child in children}
        except Exception:  # noqa: BLE001  whatever else it does that has no meta kernel: its weights were there
            pass
        finally:
            for child, layer in children.items():
                layer._parameters["weight"] = weights[child]
    return frozenset(found)


def _is_computed(model: Any, parameter: str) -> bool:
    """Whether transformers computes a parameter where no file has it, as Marian's sines of positions."""
    return any(re.search(pattern, parameter) for pattern in model._keys_to_ignore_on_load_missing or ())


def _head_name(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _classify(
    spec: TensorSpec, modules: tuple[str, ...], aliases: list[str], kinds: Mapping[str, str], parameter: Any, *, linear: bool
) -> Parameter:
    of_modules = {kinds.get(module) for module in modules}
    stem = spec.name.removesuffix(".weight")
    # What transformers splits, joins or turns while it reads is no weight of one module.
    same = parameter is not None and tuple(parameter.shape) == spec.shape
    if not modules:
        return Parameter((spec.name.rpartition(".")[0],), "unused")
    if spec.name.endswith("bias") or all(alias.endswith("bias") for alias in aliases):
        return Parameter(modules, "bias")
    if len(spec.shape) < 2:
        return Parameter(modules, "norm")
    if "head" in of_modules:
        return Parameter(modules, "head", whole(spec, stem) if same else ())
    if kinds.get(modules[0]) == "router":
        return Parameter(modules, "router", whole(spec, stem) if same and linear else ())
    if "conv1d" in of_modules:
        return Parameter(modules, "linear", (Part(stem, 0, spec.shape[0], columns=(0, spec.shape[1])),) if same else ())
    if "linear" in of_modules:
        return Parameter(modules, "linear", whole(spec, stem) if same else ())
    if "embedding" in of_modules:
        return Parameter(modules, "embedding")
    if any(part == "experts" for module in modules for part in module.split(".")):
        return Parameter(modules, "expert")
    return Parameter(modules, "other")


#: Parameter of all experts -> the linear layers of each that it holds, one after the other.
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def _split_experts(spec: TensorSpec, parameter: Parameter, module: Any, rename: Callable[[str], object]) -> Parameter:
    """The layers in a tensor of experts. transformers 5 keeps all experts of a layer in 3-D parameters of ``module``; the checkpoint has
    those, or a matrix for each expert and projection, called ``<experts>.<number>.<projection>.weight``.

    No parts where readers of 8-bit experts are not known to take them apart: gates between the rows of ups, biases, other names.
    """
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    stem = spec.name.removesuffix(".weight")
    before, separator, after = stem.rpartition("experts.")
    experts = f"{before}{separator}".removesuffix(".")
    replaced = type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION
    parts: tuple[Part, ...] = ()
    if getattr(module, "has_bias", False):
        pass
    elif len(spec.shape) == 2 and after.partition(".")[0].isdecimal():
        parts = whole(spec, stem)
    elif len(spec.shape) == 3 and after in _PROJECTIONS and getattr(module, "is_concatenated", replaced):
        parts = _slices(spec, experts, _PROJECTIONS[after], _is_turned(spec, after, module))
    reading = "linear" if replaced else "merged" if parts and rename(f"{parts[0].module}.weight") else "unread"
    return replace(parameter, parts=parts, experts=experts, reading=reading)


def _slices(spec: TensorSpec, experts: str, names: tuple[str, ...], turned: bool) -> tuple[Part, ...]:
    """The layers of a tensor (experts, out, in), or (experts, in, out) where it is ``turned``, in which ``names`` share the out axis."""
    count, rows, columns = spec.shape
    size = (columns if turned else rows) // len(names)
    parts = []
    for expert in range(count):
        start = expert * rows
        for i, name in enumerate(names):
            module = f"{experts}.{expert}.{name}"
            if turned:
                parts.append(Part(module, start, start + rows, (i * size, (i + 1) * size)))
            else:
                parts.append(Part(module, start + i * size, start + (i + 1) * size))
    return tuple(parts)


def _is_turned(spec: TensorSpec, name: str, module: Any) -> bool:
    """Whether the checkpoint has (experts, in, out). How the model has it, its class says, or else the size of its input; and what is not
    of the model's shape, transformers turns while it reads."""
    shape = tuple(getattr(module, name).shape)
    transposed = getattr(module, "is_transposed", shape[1 if name == "gate_up_proj" else 2] == getattr(module, "hidden_size", None))
    return bool(transposed) != (shape != spec.shape)


def whole(spec: TensorSpec, module: str) -> tuple[Part, ...]:
    """The part that is all of a matrix (out, in); none when the tensor is no matrix."""
    return (Part(module, 0, spec.shape[0]),) if len(spec.shape) == 2 else ()


@contextmanager
def asks_no_values(model: Any, *, padding: bool = False) -> Iterator[None]:
    """While it lasts, the model does not look for what a mask leaves out (BART), nor, unless ``padding`` is to stay, for padding among its
    tokens (GPT-2 and DeBERTa with a padding token): on the meta device there are no values."""
    asking = {"_attn_implementation_internal": "eager", **({} if padding else {"pad_token_id": None})}
    # Past what a configuration checks when it is set: some are to have a padding token.
    settings = list({id(module.config): vars(module.config) for module in model.modules() if hasattr(module, "config")}.values())
    was = [{name: setting[name] for name in asking if name in setting} for setting in settings]
    try:
        for setting, kept in zip(settings, was, strict=True):
            setting.update({name: asking[name] for name in kept})
        yield
    finally:
        for setting, kept in zip(settings, was, strict=True):
            setting.update(kept)


def _observe(model: Any) -> tuple[tuple[tuple[str, ...], ...] | None, tuple[Attention, ...] | None]:
    """What :func:`_watch` sees; of a model that cannot be run on the meta device nothing, which the plan says."""
    for way in (nullcontext(), asks_no_values(model, padding=True), asks_no_values(model)):
        with suppress(Exception), way:  # whatever a model does that has no meta kernel
            return _watch(model)
    return None, None


def _watch(model: Any) -> tuple[tuple[tuple[str, ...], ...], tuple[Attention, ...] | None]:
    """Runs eight tokens of nothing through the model, and notes which linear modules were handed the very same tensor, and which
    module was at work when keys and values went into the cache."""
    import torch
    from transformers import DynamicCache
    from transformers.pytorch_utils import Conv1D

    inputs: list[torch.Tensor] = []  # held, so that no identity is reused
    seen: dict[int, list[str]] = {}
    at_work: list[str] = []
    attentions: list[Attention] = []

    def enter(name: str, module: Any, args: Any) -> None:
        at_work.append(name)
        if args and isinstance(module, (torch.nn.Linear, Conv1D)):
            inputs.append(args[0])
            seen.setdefault(id(args[0]), []).append(name)

    def leave(*_: Any) -> None:
        at_work.pop()

    class Watcher(DynamicCache):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            attentions.append(Attention(at_work[-1], layer_idx, key_states.shape[1]))
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda module, args, name=name: enter(name, module, args)))
        hooks.append(module.register_forward_hook(leave))
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            if model.can_generate():
                model.eval()(input_ids=ids, past_key_values=Watcher(), use_cache=True)
            else:
                model.eval()(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(tuple(dict.fromkeys(names)) for names in seen.values()), tuple(attentions) or None


def _cache_bytes(config: Any) -> int | None:
    """Bytes of keys and values a token adds, in 16 bit: 2 x kv heads x head size x 2 of each layer with a cache of its own. Layers need not
    be alike (Gemma 4)."""
    layers = getattr(config, "num_hidden_layers", None)
    if not (layers and getattr(config, "hidden_size", None)):
        return None
    each = list(getattr(config, "per_layer_config", None) or [config] * layers)[: layers - getattr(config, "num_kv_shared_layers", 0)]
    heads = [getattr(layer, "num_attention_heads", None) or 0 for layer in each]
    if not all(heads):
        return None
    sizes = [getattr(layer, "head_dim", None) or config.hidden_size // count for layer, count in zip(each, heads, strict=True)]
    of_kv = [getattr(layer, "num_key_value_heads", None) or count for layer, count in zip(each, heads, strict=True)]
    return int(sum(2 * count * size * 2 for count, size in zip(of_kv, sizes, strict=True)))
