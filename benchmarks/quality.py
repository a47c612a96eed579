"""How far 8-bit artifacts are from their source, measured alike for all of them and by none of the tools that made them.

    python benchmarks/quality.py SOURCE ARTIFACT [ARTIFACT ...] --text TEXT

Each model is loaded by transformers in a process of its own. The reference is the source in float32; its row in the dtype of the
artifacts says how much of a distance is that dtype's and not the quantization's. The first ``--tokens`` tokens of the text are run in
sequences of ``--length``; logits of the source take 4 bytes x tokens x vocabulary of disk while the script runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Positions compared at a time: 64 x 128,256 float64 logits are 66 MB.
CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder the artifacts were made from")
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT")
    parser.add_argument("--text", type=Path, required=True, help="held-out text, UTF-8")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="in which the artifacts compute: auto (as stored) or a torch dtype")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch_name:
        scratch = Path(scratch_name)
        request = {
            "tokenizer": str(args.source),
            "text": str(args.text),
            "sequences": args.tokens // args.length,
            "length": args.length,
            "reference": str(scratch / "reference.f32"),
            "device": args.device,
            "threads": args.threads,
        }
        rows = [_run({**request, "model": str(args.source), "dtype": "float32", "is_reference": True}, scratch)]
        compared = {**request, "dtype": args.dtype, "is_reference": False}
        rows += [_run({**compared, "model": str(model)}, scratch) for model in (args.source, *args.artifacts)]
    print(f"{rows[0]['tokens']:,} tokens of {args.text.name} in sequences of {args.length}; artifacts compute in {args.dtype}\n")
    print(_table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def _run(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One model in a process of its own. Raises :class:`SystemExit` with what it said when it fails."""
    path, answer = scratch / "request.json", scratch / "answer.json"
    path.write_text(json.dumps(request))
    done = subprocess.run([sys.executable, __file__, "--child", str(path), str(answer)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{request['model']}: {done.stderr[-4000:]}")
    return dict(json.loads(answer.read_text()))


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | dtype | perplexity | change | KL nats | ± | KL p99 | top-1 | tensors MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row["model"], row["dtype"], f"{row['perplexity']:.3f}"]
        if row["kl_nats"] is None:
            cells += [""] * 5
        else:
            change = row["perplexity"] / rows[0]["perplexity"] - 1
            cells += [f"{change:+.2%}", f"{row['kl_nats']:.5f}", f"{row['kl_nats_stderr']:.5f}"]
            cells += [f"{row['kl_nats_p99']:.4f}", f"{row['top1']:.2%}"]
        lines.append("| " + " | ".join([*cells, f"{row['bytes'] / 1e6:,.1f}"]) + " |")
    return "\n".join(lines)


def _child(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one model. The reference leaves its logits (sequences x length, vocabulary) float32; the others are compared with them.

    KL(source || artifact) and top-1 are over every position, the perplexity over those with a successor in their sequence; ``±`` is
    the standard error of the mean KL over sequences. Raises :class:`RuntimeError` when the file lacks a weight that the model has.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request["threads"])
    tokens = _tokens(request)
    model, loading = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=request["dtype"], local_files_only=True, output_loading_info=True
    )
    # A weight that is missing is filled with random numbers and a warning.
    wrong = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading[kind]}
    if wrong:
        raise RuntimeError(f"{request['model']} did not load whole: {json.dumps(wrong)[:1000]}")
    model.to(request["device"]).eval()
    reference = Path(request["reference"])
    losses: list[float] = []
    distances: list[torch.Tensor] = []
    same = 0
    with torch.inference_mode(), reference.open("ab" if request["is_reference"] else "rb") as stream:
        for sequence in tokens:
            logits = model(input_ids=sequence[None].to(request["device"]), use_cache=False).logits[0].float().cpu()
            kl = []
            for start in range(0, len(sequence), CHUNK):
                q = torch.log_softmax(logits[start : start + CHUNK].double(), -1)
                successors = sequence[start + 1 : start + 1 + len(q)]
                losses += (-q[: len(successors)].gather(-1, successors[:, None])).squeeze(-1).tolist()
                if not request["is_reference"]:
                    source = np.fromfile(stream, np.float32, q.numel()).reshape(q.shape)
                    p = torch.log_softmax(torch.from_numpy(source).double(), -1)
                    kl.append((p.exp() * (p - q)).sum(-1))
                    same += int((p.argmax(-1) == q.argmax(-1)).sum())
            if request["is_reference"]:
                logits.numpy().tofile(stream)
            else:
                distances.append(torch.cat(kl))
    answer = {
        "model": Path(request["model"]).name,
        "dtype": "float32" if request["is_reference"] else str(model.dtype).removeprefix("torch."),
        "tokens": tokens.numel(),
        "perplexity": math.exp(math.fsum(losses) / len(losses)),
        "bytes": sum(path.stat().st_size for path in Path(request["model"]).glob("*.safetensors")),
        "kl_nats": None,
    }
    if distances:
        kl_by_sequence = torch.stack(distances)
        means = kl_by_sequence.mean(-1)
        answer |= {
            "kl_nats": float(kl_by_sequence.mean()),
            "kl_nats_stderr": float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan,
            "kl_nats_by_sequence": means.tolist(),
            "kl_nats_p99": float(kl_by_sequence.flatten().quantile(0.99)),
            "top1": same / tokens.numel(),
        }
    return answer


def _tokens(request: dict[str, Any]) -> Any:
    """Token ids (sequences, length) from the beginning of the text, by the source's tokenizer for every model."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"], local_files_only=True)
    ids = tokenizer(Path(request["text"]).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    wanted = request["sequences"] * request["length"]
    if wanted == 0 or len(ids) < wanted:
        raise RuntimeError(f"{request['text']} has {len(ids):,} tokens, {wanted:,} are wanted in {request['sequences']} sequences")
    return torch.tensor(ids[:wanted]).reshape(-1, request["length"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        Path(sys.argv[3]).write_text(json.dumps(_child(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        main()
