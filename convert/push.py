"""Admitted artifacts -> the Hub: where each goes, what goes with it, and under whose terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from convert.admission import Admitted, Sealed, admit, seal
from convert.card import Published, check_card, render_card, render_index
from convert.licence import accepted, require_permission
from convert.progress import QUIET, Progress
from convert.recipe import Push
from convert.upload import Parcel, Pushed, send
from formats.errors import InputError
from formats.manifest import CARD, REPORT
from formats.provenance import PROVENANCE, statement


def push(artifacts: Sequence[Path], where: Push, *, progress: Progress = QUIET, dry_run: bool = False) -> list[Pushed]:
    """Publishes artifacts of one recipe, in their order, or with ``dry_run`` says what would be sent.

    Nothing is created anywhere before all of them are admitted and all terms are accepted. Raises
    :class:`~formats.errors.RefusedError` for what is not proven, :class:`~formats.errors.InputError` for terms and places,
    :class:`~formats.errors.HubError` for what the Hub says.
    """
    admitted = [admit(path, progress) for path in artifacts]
    public = where.private is False
    for item in admitted:
        require_permission(item.manifest.source, where.accept, public=public, name=str(item.path))
    parcels = pack(admitted, where)
    return [send(parcel, progress, dry_run=dry_run) for parcel in parcels]


def pack(admitted: Sequence[Admitted], where: Push) -> list[Parcel]:
    """One parcel a commit. Raises :class:`InputError` when two artifacts would lie in the same place, or a card is not valid."""
    places = [_place(item, where, first=item is admitted[0]) for item in admitted]
    doubled = [place for i, place in enumerate(places) if place in places[:i]]
    if doubled:
        raise InputError(
            f"{len(admitted)} artifacts cannot all go to {doubled[0].repo}; write {{target}} into its name, or choose layout: branches "
            "or folders"
        )
    siblings = places if len(places) > 1 else []
    cards = [
        render_card(
            item.report,
            item.manifest,
            place,
            siblings=siblings,
            accept=accepted(item.manifest.source, where.accept, public=where.private is False),
        )
        for item, place in zip(admitted, places, strict=True)
    ]
    index = render_index([(item.report, item.manifest) for item in admitted], places) if where.layout == "folders" else None
    for text in [*cards, *([index] if index else [])]:
        check_card(text)
    if index is None:
        return [
            _parcel(item, place, where, _contents(item, card, ""), ("",)) for item, place, card in zip(admitted, places, cards, strict=True)
        ]
    files: dict[str, Sealed] = {CARD: seal(index.encode())}
    for item, place, card in zip(admitted, places, cards, strict=True):
        files |= _contents(item, card, f"{place.folder}/")
    return [_parcel(admitted[0], places[0], where, files, tuple(place.folder for place in places))]


def _place(item: Admitted, where: Push, *, first: bool) -> Published:
    source = item.manifest.source
    model = str(source["base_model"] or source["origin"]).rstrip("/").rpartition("/")[2].rpartition(":")[2].removesuffix(".gguf")
    repo = where.repo.replace("{target}", item.manifest.target).replace("{model}", model)
    revision = where.revision or "main"
    if where.layout == "branches" and not first:
        revision = item.manifest.target
    return Published(repo, revision, item.manifest.target if where.layout == "folders" else "")


def _parcel(item: Admitted, place: Published, where: Push, files: Mapping[str, Sealed], folders: tuple[str, ...]) -> Parcel:
    source = item.manifest.source
    return Parcel(
        repo=place.repo,
        revision=place.revision,
        files=files,
        folders=folders,
        title=f"octavo {item.manifest.versions['octavo']}: {', '.join(folder or item.manifest.target for folder in folders)}",
        private=where.private,
        public_allowed=not source.get("private") or "private" in where.accept,
        create_pr=where.create_pr,
        tag=where.tag,
    )


def _contents(item: Admitted, card: str, folder: str) -> dict[str, Sealed]:
    """The artifact, and beside it what was measured, where it comes from, and its card."""
    beside = {REPORT: item.report.to_bytes(), PROVENANCE: statement(item.manifest), CARD: card.encode()}
    return {f"{folder}{name}": file for name, file in {**item.files, **{name: seal(content) for name, content in beside.items()}}.items()}
