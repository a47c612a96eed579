"""The ``octavo`` command. Heavy imports stay inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import atexit
import errno
import json
import logging
import math
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.imports import uncollected

if TYPE_CHECKING:
    from convert.comparison import Comparison
    from convert.ledger import Plan
    from convert.pipeline import Needs
    from convert.recipe import Push, Recipe
    from convert.remote import Remote
    from convert.report import Interval

app = typer.Typer(
    help="Press a model checkpoint into eight bits, prove that it still works, and publish it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 passed; 1 made, but a limit was not met, or not published; 2 the input is wrong, nothing written; "
    "3 this machine lacks something; 130 interrupted, run the same command again to resume.",
)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of one in recipes/.", metavar="RECIPE", show_default=False)]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Instead of the recipe's model: a Hub id (org/name[@revision]), a folder or a .gguf.", show_default=False),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override one value: targets.0.limits.kl_nats=0.05", metavar="KEY=VALUE")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Where artifacts go.", show_default="artifacts/<recipe>")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, or auto: cuda where there is one. Bytes are the same but for what is calibrated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.command()
def plan(
    recipe: RecipeArgument,
    model: ModelOption = None,
    overrides: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    ledger: Annotated[bool, typer.Option("--ledger", help="Also print the fate of every tensor.")] = False,
) -> None:
    """Say what a recipe would do: every tensor's fate, sizes, memory and disk. Reads headers only."""
    with uncollected():
        from convert import pipeline

    job = pipeline.plan(_recipe(recipe, model, overrides))
    pipeline.require_files(job, check=True)
    pipeline.require_places(job, check=True)
    pipeline.require_rungs(job)
    folder = out or Path("artifacts") / job.recipe.name
    found = pipeline.needs(job, folder, check=True)
    if as_json:
        _print_json(_plan_record(job, found))
    else:
        _show_plan(job, found, ledger=ledger)


@app.command()
def convert(
    recipe: RecipeArgument,
    model: ModelOption = None,
    overrides: SetOption = None,
    out: OutOption = None,
    device: DeviceOption = "auto",
    check: Annotated[bool, typer.Option(help="Prove the artifacts after making them.")] = True,
    push: Annotated[bool, typer.Option("--push", help="Publish them where the recipe says, if all passed.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Make a recipe's artifacts and prove them. Run it again after an interruption: it resumes."""
    with uncollected():
        from convert import pipeline
    from convert.progress import choose

    parsed = _recipe(recipe, model, overrides)
    if push and not check:
        raise typer.BadParameter("what is not proven is not published; leave out --no-check", param_hint="--push")
    if push and parsed.push is None:
        raise typer.BadParameter("the recipe has no push section that says where", param_hint="--push")
    outcome = pipeline.convert(parsed, out, device=_device(device), check=check, progress=choose(quiet=quiet))
    if not quiet:
        for i, artifact in enumerate(outcome.artifacts):
            target = outcome.plan.targets[i]
            _show_artifact(
                artifact.path, pipeline.plain_bytes(target), outcome.reports[i] if outcome.reports else None, reused=artifact.reused
            )
    if push and outcome.passed and parsed.push:
        _publish([artifact.path for artifact in outcome.artifacts], parsed.push, quiet=quiet)
    elif push:
        print("not published: a limit was not met", file=sys.stderr)
    raise typer.Exit(0 if outcome.passed else 1)


@app.command()
def sensitivity(
    recipe: RecipeArgument,
    model: ModelOption = None,
    overrides: SetOption = None,
    scheme: Annotated[
        list[str] | None, typer.Option("--scheme", help="A scheme to try; may be given again.", show_default="int8-dynamic, fp8-dynamic")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="Tokens of calibration text.")] = 1024,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, help="Measure no longer, the worst first; the others are estimated.")
    ] = None,
    out: OutOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers go.", show_default="<out>/sensitivity.json")] = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Measure how much each group of layers loses alone: KL of the model's output, with a drawing."""
    with uncollected():
        from convert import pipeline
    from convert.curves import draw_losses
    from convert.hardware import keep_freed_memory
    from convert.progress import choose
    from convert.sensitivity import in_words, records, sensitivity_of
    from formats.safetensors import json_bytes

    job = pipeline.plan(_recipe(recipe, model, overrides))
    folder = out or Path("artifacts") / job.recipe.name
    numbers, drawing = json_file or folder / "sensitivity.json", folder / "sensitivity.svg"
    for file in (numbers, drawing):  # minutes before they are written
        _require_writable(file)
    keep_freed_memory()
    losses, how = sensitivity_of(job, choose(quiet=quiet), schemes=scheme, tokens=tokens, seconds=seconds, device=_device(device))
    for file in (numbers, drawing):
        file.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_bytes(json_bytes({"model": job.checkpoint.pinned, **how, "groups": records(losses)}))
    drawing.write_text(draw_losses(losses, in_words(how)), encoding="utf-8")
    if not quiet:
        _show_losses(losses)
        print(in_words(how))
        print(f"numbers {numbers}, drawing {drawing}")


@app.command()
def push(
    artifacts: Annotated[list[Path], typer.Argument(help="Folders made by one recipe, each with its report beside it.")],
    repo: Annotated[
        str | None,
        typer.Option("--repo", help="organisation/name; {target} and {model} in the name stand for theirs.", show_default="the recipe's"),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="The recipe whose push section says where and on what terms.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="The branch to commit to.", show_default="main")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    tag: Annotated[str | None, typer.Option("--tag", help="A tag to put on the commit.", show_default=False)] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="What a repo that is created will be.", show_default="private")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent; create nothing.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Publish proven artifacts on the Hub. Run it again after an interruption: what is there is not sent again."""
    given = {"repo": repo, "revision": revision, "create_pr": create_pr or None, "tag": tag, "private": private}
    _publish(artifacts, _where(recipe, {key: value for key, value in given.items() if value is not None}), quiet=quiet, dry_run=dry_run)


@app.command()
def reproduce(
    artifact: Annotated[str, typer.Argument(help="The folder of an artifact, or its name on the Hub: org/name[@revision].")],
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Make an artifact again from the recipe and the source that its manifest names, and compare every byte."""
    from convert.progress import choose
    from convert.reproduce import reproduce as make_again

    found = make_again(artifact, device=_device(device), progress=choose(quiet=quiet))
    for difference in found.differences:
        print(f"differs: {difference}")
    for version in found.versions if found.differences or not quiet else ():
        print(f"version: {version}")
    if not found.differences and not quiet:
        print(f"{artifact}: the same to the byte ({found.files} files, {_size(found.size_bytes)})")
    raise typer.Exit(1 if found.differences else 0)


@app.command()
def check(
    artifacts: Annotated[list[Path], typer.Argument(help="Folders made by one recipe.")],
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Prove artifacts again, against the limits recorded in them, and write report and model card."""
    with uncollected():
        from convert import pipeline
    from convert.progress import choose

    reports = pipeline.prove(artifacts, progress=choose(quiet=quiet), device=_device(device))
    if not quiet:
        for path, report in zip(artifacts, reports, strict=True):
            _show_artifact(path, None, report, reused=False)
    raise typer.Exit(0 if all(report.passed for report in reports) else 1)


@app.command()
def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipes for one model.", metavar="RECIPE", show_default=False)],
    model: ModelOption = None,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where artifacts and the page go.", show_default="artifacts")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make the artifacts of several recipes, prove them on the same text and show them side by side; what is made already stays."""
    with uncollected():
        from convert import pipeline
    from convert.progress import choose
    from convert.report import plain_json

    parsed = [_recipe(name, model, overrides) for name in recipes]
    found = pipeline.compare(parsed, out, device=_device(device), progress=choose(quiet=quiet))
    if as_json:
        print(plain_json(found.record()).decode())
    elif not quiet:
        _show_comparison(found, out or Path("artifacts"))
    raise typer.Exit(0 if all(row.passed for row in found.rows) else 1)


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(help="The folder of an artifact, or of a checkpoint that anybody made; or org/name[@revision] on the Hub.")
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Everything but what needs every byte: under a second.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with a checkpoint, offline: headers, config, scales; of an artifact also its manifest's promises. Of an artifact on
    the Hub only headers and small files are fetched."""
    from dataclasses import asdict

    from formats.manifest import MANIFEST
    from formats.verify import verify as verify_folder

    fetched = ""
    if not folder.exists() and (remote := _remote(str(folder))):
        from convert.remote import verify_remote

        verdict, commit, fetched_bytes = verify_remote(remote)
        fetched = f"{_size(fetched_bytes)} fetched, commit {commit[:12]}"
    else:
        verdict = verify_folder(folder, quick=quick)
    if as_json:
        _print_json({"passed": verdict.passed, **asdict(verdict)})
        raise typer.Exit(0 if verdict.passed else 1)
    for finding in verdict.findings:
        trips = f" [{finding.runtime}]" if finding.runtime else ""
        print(f"{finding.severity}: {finding.where}: {finding.what}{trips}; {finding.remedy}")
    if verdict.passed:
        looked = f"{verdict.hashed_bytes / 1e9:.2f} GB hashed" if not quick else "hashes not looked at; leave out --quick for them"
        if fetched:
            looked = f"{_size(verdict.hashed_bytes)} by their hashes, {fetched}"
        elif not (folder / MANIFEST).exists():
            looked = "no manifest, so nothing vouches for its bytes" + (
                "; codes not looked at, leave out --quick for them" if quick else ""
            )
        warnings = f", {len(verdict.findings)} warning(s)" if verdict.findings else ""
        print(f"{folder}: good ({verdict.files} files, {verdict.tensors} tensors, {looked}{warnings})")
    raise typer.Exit(0 if verdict.passed else 1)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A model folder, a .safetensors or a .gguf file.")],
    as_matrix: Annotated[bool, typer.Option("--matrix", help="Instead: which runtime loads the folder, where, by what kernel.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a folder or file holds and how it is quantized. Reads headers only."""
    from formats.inspect import inspect as inspect_path

    if as_matrix:
        _show_matrix(path, as_json=as_json)
        return
    found = inspect_path(path)
    if as_json:
        _print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for key in ("path", "model", "made_by", "quantization", "metadata"):
        if found.get(key):
            console.print(f"[bold]{key.replace('_', ' ')}[/]  ", end="")
            console.print(found[key] if isinstance(found[key], str) else json.dumps(found[key]), markup=False, soft_wrap=True)
    table = Table("dtype", "kind", _right("tensors"), _right("elements"), _right("bytes"), box=None, header_style="bold")
    for row in found["tensors"]:
        table.add_row(row["dtype"], row["kind"], f"{row['tensors']:,}", f"{row['elements']:,}", f"{row['bytes']:,}")
    console.print(table)


def _show_matrix(path: Path, *, as_json: bool) -> None:
    from formats.compatibility import HARDWARE, KERNELS
    from formats.inspect import compatibility

    found = compatibility(path)
    if as_json:
        _print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    console.print(f"{path}: {found['format']}, {', '.join(found['schemes'])}", markup=False)
    table = Table("runtime", "version", *HARDWARE, box=None, header_style="bold", padding=(0, 1, 0, 0))
    for line in found["matrix"]:
        table.add_row(line["runtime"], " ".join(line["versions"]), *(line["kernels"][name].replace("not known", "?") for name in HARDWARE))
    console.print(table)
    used = {kernel for line in found["matrix"] for kernel in line["kernels"].values()}
    for name, what in {**KERNELS, "?": "not known"}.items():
        if name in used or (name == "?" and "not known" in used):
            console.print(f"{name:<10} {what}", markup=False)
    for line in found["matrix"]:
        for row in line["rows"]:
            places = " ".join(row["hardware"])
            console.print(f"\n{line['runtime']} {' '.join(line['versions'])}, {places}: {row['kernel']}; {row['evidence']}", markup=False)
            if row["note"]:
                console.print(f"  {row['note']}", markup=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from convert.recipe import json_schema

    _print_json(json_schema())


@app.command()
def doctor(
    folder: Annotated[Path | None, typer.Argument(help="A model folder.", metavar="DIR", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Of a folder, look at the headers only; do not run it.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has and can run; or what ails a folder in bitsandbytes, and what cures it."""
    from convert.doctor import examine

    if folder is not None:
        _diagnose(folder, _device(device), quick=quick, as_json=as_json)
    found = examine()
    if as_json:
        _print_json(found)
        return
    for section, facts in found.items():
        print(section)
        for name, value in facts.items():
            print(f"  {name:<22} {value}")


@app.command()
def runtimes(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Those to build; all that are for this machine unless given.", show_default=False),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Build the runtimes that need an environment of their own, under .runtimes/ or OCTAVO_RUNTIMES; those that are whole stay."""
    from convert import environments
    from convert.progress import choose
    from formats.errors import InputError

    unknown = next((name for name in names or () if name not in environments.PINS), None)
    if unknown is not None:
        raise InputError(f"no runtime {unknown} is built in an environment of its own; there are {', '.join(environments.PINS)}")
    for name in names or [name for name in environments.PINS if environments.kind_here(name)]:
        built = environments.build(name, choose(quiet=quiet))
        if not quiet:
            print(f"{name}: {environments.describe(name)} in {built.folder}")


def _diagnose(folder: Path, device: str, *, quick: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from convert.diagnosis import diagnose

    found = diagnose(folder, device=device, run=not quick)
    if as_json:
        _print_json([asdict(diagnosis) for diagnosis in found])
    for diagnosis in found if not as_json else ():
        print(f"{'FOUND' if diagnosis.found else 'ok   ' if diagnosis.found is False else '?    '}  {diagnosis.name:<20}  {diagnosis.what}")
        if diagnosis.remedy:
            print(f"       {'remedy':<20}  {diagnosis.remedy}")
    raise typer.Exit(1 if any(diagnosis.found for diagnosis in found) else 0)


def main() -> None:
    """The command as a process: runs it and ends with its exit code. What was imported is not taken apart piece by piece, a quarter of a
    second of Python's; all that was registered for the end is done."""
    code = 1  # of an error that is a defect, which Python shows

    def end() -> None:
        with suppress(OSError, ValueError):  # Python then finds it once more, and says that what was printed is lost
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            os._exit(code)

    atexit.register(end)  # the first that is registered is the last to be called
    code = run()
    sys.exit(code)


def run() -> int:
    """Runs the command and returns its exit code; every error a user can cause becomes one message, never a traceback."""
    from formats.errors import MachineError, OctavoError

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # transformers imports torchao wherever it is installed, which warns of kernels for other machines.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A polite kill is an interruption like any other: workers end their slab, the journal stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # typer carries click inside itself or depends on it, by version; either way this is its UsageError.
    usage_error: Any = typer.BadParameter.__bases__[0]
    try:
        code = int(app(prog_name="octavo", standalone_mode=False) or 0)
        # typer answers Ctrl-C itself, with this code and no word.
        return _interrupted() if code == 130 else code
    except usage_error as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except OctavoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has gone; flushing at exit would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _MACHINE:
            raise
        print(f"error: {error.filename or 'this machine'}: {error.strerror}", file=sys.stderr)
        return MachineError.exit_code


#: What a file system, and no defect of ours, answers with.
_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENOTDIR, errno.ENAMETOOLONG)


def _require_writable(file: Path) -> None:
    """Raises an error, before any work, where ``file`` could not be written at its end."""
    from formats.errors import InputError, MachineError

    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir() or file.is_dir():
        raise InputError(f"{file if file.is_dir() else folder} is in the way of {file}; name another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MachineError(f"{file}: cannot be written ({error.strerror}); name another place") from None


def _interrupted() -> int:
    print("interrupted; run the same command again to go on where it stopped", file=sys.stderr)
    return 130


def _remote(name: str) -> Remote | None:
    if name.startswith((".", "/", "~")):
        return None
    from convert.remote import parse_remote

    return parse_remote(name)


def _where(recipe: str | None, given: dict[str, Any]) -> Push:
    """The push section of a recipe, if there is one, with what the command line says instead."""
    from pydantic import ValidationError

    from convert.recipe import Push

    said = _recipe(recipe, None, None).push if recipe else None
    if said is None and "repo" not in given:
        raise typer.BadParameter("say where: --repo organisation/name, or --recipe with a push section", param_hint="--repo")
    try:
        return Push.model_validate({**(said.model_dump(exclude_unset=True) if said else {}), **given})
    except ValidationError as error:
        wrong = error.errors()[0]
        option = "--" + str(wrong["loc"][0]).replace("_", "-") if wrong["loc"] else "--repo"
        what = "write organisation/name" if option == "--repo" else wrong["msg"].removeprefix("Value error, ")
        raise typer.BadParameter(f"{wrong['input']!r}: {what}" if wrong["loc"] else what, param_hint=option) from None


def _publish(artifacts: list[Path], where: Push, *, quiet: bool, dry_run: bool = False) -> None:
    from convert.progress import choose
    from convert.push import push

    for done in push(artifacts, where, progress=choose(quiet=quiet), dry_run=dry_run):
        if quiet:
            continue
        size = _size(sum(size_bytes for _, size_bytes in done.sent))
        if dry_run:
            print(
                f"{done.repo}{' (would be created)' if done.created else ''}, {done.revision}: {len(done.sent)} files, {size} would be sent"
            )
            for path, size_bytes in done.sent:
                print(f"  {path}  {_size(size_bytes)}")
            for path in done.deleted:
                print(f"  {path}  would be deleted: it is of the artifact that lies there now")
        elif done.changed:
            print(f"{done.url}: {len(done.sent)} files, {size}, in commit {str(done.commit)[:12]}; {done.unchanged} were there")
        else:
            print(f"{done.url}: nothing to send, all {done.unchanged} files are there in commit {str(done.commit)[:12]}")


def _recipe(name: str, model: str | None, overrides: list[str] | None) -> Recipe:
    from convert.recipe import find_recipe, read_recipe

    return read_recipe(find_recipe(name), overrides or (), model)


def _device(name: str) -> str:
    import torch

    from formats.errors import MachineError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r} is no device; use cpu, cuda or auto", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("no CUDA device is here; use --device cpu (the bytes are the same but for what is calibrated)")
    return name


def _plan_record(job: Plan, found: Needs) -> dict[str, Any]:
    from dataclasses import asdict

    from convert.compatibility import loads_in, parts_of

    return {
        "digest": job.digest,
        "model": job.checkpoint.origin,
        "commit": job.checkpoint.commit,
        "architecture": job.architecture.name if job.architecture else None,
        "head": job.architecture.head if job.architecture else None,
        "tied": job.architecture.tied if job.architecture else None,
        "groups": job.architecture.groups if job.architecture else None,
        "source_bytes": job.checkpoint.size_bytes,
        "needs": asdict(found),
        "warnings": job.warnings(),
        "recipe": job.resolved(),
        "targets": [
            {
                "name": target.name,
                "format": target.format,
                "loads_in": loads_in(target.format, parts_of(target.contents.layers)),
                "weight_bytes": target.weight_bytes,
                "deployment_bytes": job.deployment_bytes(target),
                "files": {shard.file: shard.size_bytes for shard in target.shards},
                "quantization_config": target.config.get("quantization_config"),
                "ledger": target.ledger(),
            }
            for target in job.targets
        ],
    }


def _show_plan(job: Plan, found: Needs, *, ledger: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from convert.compatibility import loads_in, parts_of
    from convert.lanes import walk_sizes
    from convert.ledger import summarize
    from convert.rotate import TURNED_PER_SECOND, RotatedReader

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    at = f" at {job.checkpoint.commit[:12]}" if job.checkpoint.commit else ""
    name = job.architecture.name if job.architecture else "an architecture transformers does not know"
    console.print(
        f"{job.checkpoint.origin}{at}: {name}, {len(job.checkpoint.tensors):,} tensors, "
        f"{_size(job.checkpoint.size_bytes)} in {len(job.checkpoint.files)} file(s)",
        markup=False,
    )
    for target in job.targets:
        console.print(f"\n[bold]{target.name}[/] {target.format} for {', '.join(target.runtimes)}")
        table = Table("", _right("tensors"), _right("before"), _right("after"), "why", box=None, header_style="bold", padding=(0, 2, 0, 0))
        for what, count, before, after, reason in summarize(target.entries):
            table.add_row(what, f"{count:,}", _size(before), _size(after), escape(reason))  # a pattern may have [qkv] in it
        before = sum(entry.plain.size_bytes for entry in target.entries)
        table.add_row(
            "total",
            f"{len(target.entries):,}",
            _size(before),
            _size(target.weight_bytes),
            f"{len(target.shards)} file(s), headers included",
            style="bold",
        )
        console.print(table)
        deployment = job.deployment_bytes(target)
        if deployment:
            console.print(
                "deployed   "
                + ", ".join(f"{_size(size)} at {length:,} tokens" for length, size in deployment.items())
                + " (weights, keys and values)"
            )
        parts = parts_of(target.contents.layers)
        console.print("loads in   " + "\n           ".join(loads_in(target.format, parts) or ["nothing that is known"]), markup=False)
        if ledger:
            for entry in target.entries:
                fate = f"{entry.scheme.name} {entry.algorithm}" if entry.scheme else "keep"
                fate += f": {entry.why}" if entry.why else ""
                fate += f", {entry.note}" if entry.note else ""
                console.print(
                    f"  {entry.tensor.name} {list(entry.tensor.shape)} {entry.tensor.dtype} -> {fate} ({entry.rule})", markup=False
                )
    console.print(
        f"\nmemory     {_size(found.memory_bytes)} at the peak of the conversion, {_size(found.check_memory_bytes)} of the check, "
        f"{_size(found.memory_free_bytes)} free"
    )
    if job.architecture is not None and any(target.calibrated for target in job.targets):
        tokens, count = job.calibration.tokens, len(job.architecture.blocks)
        sizes = walk_sizes(job.checkpoint, job.architecture, tokens=tokens, wide=job.recipe.validation.reference == "float32")
        console.print(
            f"calibrates {tokens:,} tokens through {count} blocks; the lane takes {_size(sizes.lane_bytes)}, "
            f"the largest block {_size(sizes.block_bytes)}"
        )
    if isinstance(reader := job.checkpoint.reader, RotatedReader):
        console.print(
            f"rotates    {reader.turned_elements / 1e9:.3g} billion weights whenever they are read, about "
            f"{reader.turned_elements / TURNED_PER_SECOND:,.0f} s of one core each time, {_size(reader.held_bytes(1))} of the memory"
        )
    download = f" (of which {_size(job.checkpoint.download_bytes)} to fetch)" if job.checkpoint.download_bytes else ""
    console.print(f"disk       {_size(found.disk_bytes)} needed{download}, {_size(found.disk_free_bytes)} free")
    for warning in job.warnings():
        console.print(f"warning    {warning}", markup=False)


def _show_comparison(found: Comparison, out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from convert.comparison import explain

    # Thirteen columns: a narrower terminal wraps them, which loses no figure as cutting them short would.
    console = Console(highlight=False, width=None if sys.stdout.isatty() and Console().width >= 160 else 160)
    loss = "relative error" if any(row.run.drift for row in found.rows) else "KL nats"
    table = Table("", "artifact", "runtime", _right("weights"), _right(loss), "at 95 %", _right("perplexity"), "at 95 %", box=None)
    for header in ("writes tok/s", "reads tok/s", "loads s", "peak"):
        table.add_column(header, justify="right")
    table.add_column("")

    def within(interval: Interval | None) -> str:
        return escape(f"[{interval.low:.4g}, {interval.high:.4g}]") if interval else ""

    for row in found.rows:
        divergence, run = row.run.divergence, row.run
        table.add_row(
            "*" if row.frontier else "",
            escape(row.name),
            escape(run.name),
            _size(row.size_bytes),
            f"{row.loss:.4g}",
            within(row.interval),
            f"{divergence.perplexity_ratio:.4g}" if divergence else "",
            within(divergence.ratio_interval) if divergence else "",
            f"{run.decode_tokens_per_second:.1f}",
            f"{run.prefill_tokens_per_second:,.0f}",
            f"{run.load_seconds:.2f}",
            _size(run.peak_bytes),
            "passed" if row.passed else "failed",
        )
    console.print(table)
    console.print("*  nothing here is as small and loses less, or loses as little and is smaller")
    for row in found.rows:
        if row.in_noise:
            console.print(f"{row.name} in {row.run.name}: its loss and the least are not told apart by this text", markup=False)
    for sentence in explain(found.layers, found.ranges):
        console.print(sentence, markup=False)
    console.print(f"page       {out / 'compare.html'}, {out / 'compare.json'}", markup=False)


def _show_losses(losses: Any) -> None:
    """A line a group, the worst first, a column a scheme."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from convert.sensitivity import spelled

    schemes = list(dict.fromkeys(loss.scheme for loss in losses))
    by_group: dict[tuple[str, ...], dict[str, Any]] = {}
    for loss in losses:
        by_group.setdefault(loss.modules, {})[loss.scheme] = loss
    table = Table(
        "group", _right("parameters"), *(_right(f"{name}, nats") for name in schemes), box=None, header_style="bold", padding=(0, 2, 0, 0)
    )
    for modules, of in sorted(by_group.items(), key=lambda item: -max(loss.kl_nats for loss in item[1].values())):
        shown = [
            "" if name not in of else f"{of[name].kl_nats:.3g} ± {of[name].standard_error:.1g}" if of[name].measured
            else f"about {of[name].kl_nats:.1g}"
            for name in schemes
        ]  # fmt: skip
        table.add_row(escape(spelled(modules)), f"{next(iter(of.values())).parameters:,}", *shown)
    sums = [sum(loss.kl_nats for loss in losses if loss.scheme == name) for name in schemes]
    table.add_row("sum", "", *(f"{value:.3g}" for value in sums), style="bold")
    # Where there is no terminal a name stays on one line, for whoever searches the lines.
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _show_artifact(path: Path, before: int | None, report: Any, *, reused: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    from convert.health import remark, summary
    from formats.manifest import read_manifest

    console = Console(highlight=False, soft_wrap=True)
    manifest = read_manifest(path)
    weights = manifest.weight_bytes
    quantized = sum(entry["decision"] == "quantize" for entry in manifest.ledger)
    verdict = "" if report is None else "  [bold green]passed[/]" if report.passed else "  [bold red]failed[/]"
    console.print(f"\n[bold]{escape(str(path))}[/]{verdict}" + ("  (was already made)" if reused else ""))
    of = f" of {_size(before)} unquantized ({weights / before:.0%})" if before else ""
    console.print(f"  size       {_size(weights)}{of}; {quantized} of {len(manifest.ledger)} tensors quantized")
    health = (manifest.calibration or {}).get("health", {})
    for what, said in [*summary(health), *([("static", text)] if (text := remark(health)) else [])]:
        console.print(f"  {what:<10} {said}", markup=False)
    if report is None:
        console.print(f"  unproven   prove it with: octavo check {path}", markup=False)
        return
    for rung in report.ladder.get("rungs", []):
        taken = " (taken)" if rung["name"] == report.ladder["taken"] else ""
        kl = math.nan if rung["kl_nats"] is None else rung["kl_nats"]
        few = f" on {rung['tokens']:,} tokens" if 0 < rung.get("tokens", 0) < report.validation["tokens"] else ""
        few += f" of a pilot calibrated on {rung['pilot']:,}" if rung.get("pilot") else ""
        missed = "passed" if rung["passed"] else f"missed {', '.join(rung['failed'])}"
        missed += ", by no more than the noise of the text" if rung["passed"] and not rung.get("certain", True) else ""
        console.print(
            f"  rung       {rung['name']}{taken}: KL {kl:.4g} nats{few}, {_size(rung['weight_bytes'])}, "
            f"{rung['kept_share']:.1%} of the linear bytes in 16 bit; {missed}",
            markup=False,
        )
    for item in report.checks:
        interval = f" [{item.interval.low:.4g}, {item.interval.high:.4g}] at 95 %" if item.interval else ""
        value = (
            ("yes" if item.value else "no")
            if item.bound == "holds"
            else f"{item.value:.4g}{interval} ({item.bound} {item.limit:g} {item.unit})"
        )
        mark = "[green]ok  [/]" if item.passed else "[red]FAIL[/]"
        console.print(f"  {mark}  {item.name:<40} ", end="")
        console.print(value, end="", markup=False)
        console.print(f"  {item.detail}" if item.detail else "", markup=False, style="dim")
    for run in (report.source, *report.runtimes):
        console.print(
            f"  {run.name:<12} {_size(run.weight_bytes)} of weights, {_size(run.peak_bytes)} at the peak, "
            f"{run.prefill_tokens_per_second:,.0f} tokens/s reading, {run.decode_tokens_per_second:,.1f} writing: ",
            end="",
        )
        console.print(repr(run.continuation[:80]), markup=False)
        if run.answers:
            within = f"[{run.answers.interval.low:.3f}, {run.answers.interval.high:.3f}] at 95 %"
            console.print(f"  {'':<12} {sum(run.answers.right)} of {len(run.answers.right)} prompts answered, {within}", markup=False)
    console.print(f"  report     {path}.report.html, {path}.report.json", markup=False)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def _right(header: str) -> Any:
    from rich.table import Column

    return Column(header, justify="right")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
