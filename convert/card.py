"""The model card: what the Hub shows of an artifact. Every number in it comes from the report."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.compatibility import parts_of_ledger, places
from convert.ledger import CODED, REQUANTIZED
from convert.licence import licence_of
from convert.report import Report
from formats.errors import OctavoError
from formats.manifest import Manifest
from formats.tensors import GRAPHS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Published:
    """Where on the Hub an artifact lies: in a folder of the repo, or in its root (``""``)."""

    repo: str
    revision: str = "main"
    folder: str = ""

    @property
    def arguments(self) -> str:
        """What ``from_pretrained`` needs to find it."""
        revision = f', revision="{self.revision}"' if self.revision != "main" else ""
        folder = f', subfolder="{self.folder}"' if self.folder else ""
        return f'"{self.repo}"{revision}{folder}'

    @property
    def name(self) -> str:
        """What ``octavo verify`` needs."""
        revision = f"@{self.revision}" if self.revision != "main" or self.folder else ""
        return f"{self.repo}{revision}{f'/{self.folder}' if self.folder else ''}"


def render_card(
    report: Report, manifest: Manifest, place: Published | None = None, *, siblings: Sequence[Published] = (), accept: Sequence[str] = ()
) -> str:
    """The text of ``README.md``, with metadata that huggingface_hub accepts (model card specification, ``modelcard.md``).

    ``place``: where it is published, else a folder on this machine; ``siblings``: where this and its other forms are, for links;
    ``accept``: what the publisher took on.
    """
    source = manifest.source
    recipe = manifest.recipe
    schemes = _schemes(manifest)
    decisions = Counter(entry["decision"] for entry in manifest.ledger)
    target = next(item for item in recipe["targets"] if item["name"] == manifest.target)
    predicts = "relative_error" not in target["limits"]
    title = f"{_model(manifest)} {manifest.target}"
    notes = Counter(note for entry in manifest.ledger for note in entry.get("note", "").split("; ") if note).most_common()
    body = _template("card.md.jinja").render(
        title=title,
        report=report,
        manifest=manifest,
        base_model=source["base_model"],
        licence=licence_of(source),
        accept=accept,
        schemes=" and ".join(schemes) or "nothing quantized",
        counts={"quantize": decisions["quantize"], "keep": decisions["keep"], "total": len(manifest.ledger)},
        coded=[(note, count) for note, count in notes if note.startswith(CODED)],
        changed=[(note, count) for note, count in notes if not note.startswith(CODED)],
        requantized=any(entry.get("note", "").startswith(REQUANTIZED) for entry in manifest.ledger),
        dropped=source.get("dropped", []),
        reasons=Counter(entry["why"] for entry in manifest.ledger if entry["decision"] == "keep").most_common(),
        algorithms=sorted({entry["algorithm"] for entry in manifest.ledger if entry["decision"] == "quantize"}),
        bounds=target["limits"],
        predicts=predicts,
        task=_task(report, predicts=predicts),
        auto=_AUTO.get(_task(report, predicts=predicts), "AutoModel"),
        weight_bytes=manifest.weight_bytes,
        source_bytes=sum(file["size_bytes"] for file in source["files"]),
        places=places(
            manifest.format,
            parts_of_ledger(manifest.ledger),
            {run.program: f"{run.version} {run.device}" for run in report.runtimes},
        ),
        graph=next((file.name for file in manifest.files if file.name.endswith(".onnx")), ""),
        arguments=place.arguments if place else '"FOLDER"',
        repo=place.repo if place else "FOLDER",
        verify=place.name if place else "FOLDER",
        place=place,
        siblings=[sibling for sibling in siblings if sibling != place],
        recipe=_yaml(recipe),
    )
    return f"---\n{_metadata([(report, manifest)], predicts=predicts, name=title)}\n---\n\n{body}"


def render_index(made: Sequence[tuple[Report, Manifest]], where: Sequence[Published]) -> str:
    """The card of a repo whose folders hold several artifacts of one model."""
    rows = [
        {
            "place": place,
            "format": manifest.format,
            "schemes": " and ".join(_schemes(manifest)) or "nothing quantized",
            "bytes": sum(file.size_bytes for file in manifest.files),
            "runs": report.runtimes,
        }
        for (report, manifest), place in zip(made, where, strict=True)
    ]
    first = made[0][1]
    predicts = all(run.divergence is not None for report, _ in made for run in report.runtimes)
    body = _template("index.md.jinja").render(
        title=f"{_model(first)} in eight bits",
        manifest=first,
        base_model=first.source["base_model"],
        rows=rows,
        report=made[0][0],
        predicts=predicts,
    )
    return f"---\n{_metadata(made, predicts=predicts, name=_model(first))}\n---\n\n{body}"


def check_card(text: str) -> None:
    """Holds a card's metadata against huggingface_hub's own reading of it. Raises :class:`OctavoError` when it does not come back whole."""
    from huggingface_hub import ModelCard
    from ruamel.yaml import YAML

    try:
        read: Any = ModelCard(text).data
        whole = read.to_dict() == YAML(typ="safe", pure=True).load(text.split("\n---\n")[0])
    except (ValueError, KeyError, TypeError) as error:
        raise OctavoError(f"the model card's metadata is not valid ({error}); this is a defect of octavo, please report it") from None
    if not whole:
        raise OctavoError("huggingface_hub does not read the model card's metadata as it was written; this is a defect of octavo")


def _metadata(made: Sequence[tuple[Report, Manifest]], *, predicts: bool, name: str) -> str:
    from huggingface_hub import ModelCardData

    manifests = [manifest for _, manifest in made]
    source = manifests[0].source
    schemes = [scheme for manifest in manifests for scheme in _schemes(manifest)]
    results = [result for report, manifest in made for result in _results(report, manifest)]
    runtimes = [run.program for report, _ in made for run in report.runtimes]
    return ModelCardData(
        license=source["licence"],
        base_model=source["base_model"],
        base_model_relation="quantized" if source["base_model"] else None,
        library_name=_library(manifests[0], runtimes),
        pipeline_tag=_task(made[0][0], predicts=predicts),
        tags=list(dict.fromkeys(["octavo", *(manifest.format for manifest in manifests), *schemes])),
        eval_results=results or None,
        model_name=name if results else None,
    ).to_yaml()


#: By the Hub's word for what a model does, the class of transformers that loads it with its head.
_AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


def _task(report: Report, *, predicts: bool) -> str:
    """The Hub's word for what it does, and that of transformers.js for the pipeline that does it."""
    if predicts:
        return "text2text-generation" if "written" in report.validation else "text-generation"
    sees = report.validation.get("unit") == "pictures"
    if any(run.drift is not None and run.drift.top1 is not None for run in report.runtimes):
        return "image-classification" if sees else "text-classification"
    return "image-feature-extraction" if sees else "feature-extraction"


def _library(manifest: Manifest, runtimes: Sequence[str]) -> str:
    """The Hub's word for what loads an artifact first."""
    if manifest.format in GRAPHS:
        return "transformers.js"
    return "transformers" if "transformers" in runtimes or not runtimes else runtimes[0]


def _results(report: Report, manifest: Manifest) -> list[EvalResult]:
    """What the Hub's ``model-index`` can say: perplexity on the text that was read, in each runtime it was measured in."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=_task(report, predicts=True),
            dataset_type="held-out-text",
            dataset_name=f"{report.validation['text']} ({report.validation['tokens']:,} tokens)",
            metric_type="perplexity",
            metric_name=f"perplexity, {manifest.target} in {run.name} {run.version}".rstrip(),
            metric_value=round(run.divergence.perplexity, 4),
        )
        for run in report.runtimes
        if run.divergence is not None and run.divergence.perplexity == run.divergence.perplexity
    ]


def _schemes(manifest: Manifest) -> list[str]:
    return list(dict.fromkeys(entry["scheme"] for entry in manifest.ledger if entry["decision"] == "quantize"))


def _model(manifest: Manifest) -> str:
    source = manifest.source
    return str(source["base_model"] or source["origin"]).rstrip("/").rpartition("/")[2].rpartition(":")[2]


def _template(name: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True, autoescape=False)
    return environment.from_string((TEMPLATES / name).read_text(encoding="utf-8"))


def _yaml(recipe: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    stream = io.StringIO()
    writer = YAML(pure=True)
    writer.width = 120
    writer.dump(dict(recipe), stream)
    return stream.getvalue().rstrip()
