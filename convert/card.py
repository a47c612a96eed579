"""The model card: what the Hub shows of an artifact. Every number in it comes from the report."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

from convert.compatibility import parts_of_ledger, places
from convert.plan import REQUANTIZED
from convert.report import Report
from formats.manifest import Manifest
from formats.tensors import GRAPHS

TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"


def render_card(report: Report, manifest: Manifest) -> str:
    """The text of ``README.md``, with metadata that huggingface_hub accepts (model card specification, ``modelcard.md``)."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    source = manifest.source
    recipe = manifest.recipe
    schemes = list(dict.fromkeys(entry["scheme"] for entry in manifest.ledger if entry["decision"] == "quantize"))
    decisions = Counter(entry["decision"] for entry in manifest.ledger)
    title = f"{(source['base_model'] or source['origin']).rstrip('/').rpartition('/')[2].rpartition(':')[2]} {manifest.target}"
    target = next(item for item in recipe["targets"] if item["name"] == manifest.target)
    predicts = "relative_error" not in target["limits"]
    metadata = ModelCardData(
        license=source["licence"],
        base_model=source["base_model"],
        base_model_relation="quantized" if source["base_model"] else None,
        library_name="transformers.js" if manifest.format in GRAPHS else "transformers",
        pipeline_tag="text-generation" if predicts else "feature-extraction",
        tags=["octavo", manifest.format, *schemes],
    )
    body = (
        Environment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True, autoescape=False)
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            title=title,
            report=report,
            manifest=manifest,
            base_model=source["base_model"],
            schemes=" and ".join(schemes) or "nothing quantized",
            counts={"quantize": decisions["quantize"], "keep": decisions["keep"], "total": len(manifest.ledger)},
            notes=Counter(entry["note"] for entry in manifest.ledger if entry.get("note")).most_common(),
            requantized=any(entry.get("note", "").startswith(REQUANTIZED) for entry in manifest.ledger),
            dropped=source.get("dropped", []),
            reasons=Counter(entry["why"] for entry in manifest.ledger if entry["decision"] == "keep").most_common(),
            bounds=target["limits"],
            predicts=predicts,
            auto="AutoModelForCausalLM" if predicts else "AutoModel",
            weight_bytes=manifest.weight_bytes,
            places=places(
                manifest.format,
                parts_of_ledger(manifest.ledger),
                {run.program: f"{run.versions.get(run.program, '')} {run.device}" for run in report.runtimes},
            ),
            repo=(recipe["push"] or {}).get("repo", "FOLDER"),
            recipe=_yaml(recipe),
        )
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def _yaml(recipe: dict[str, Any]) -> str:
    from ruamel.yaml import YAML

    stream = io.StringIO()
    writer = YAML(pure=True)
    writer.width = 120
    writer.dump(recipe, stream)
    return stream.getvalue().rstrip()
