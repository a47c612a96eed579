"""A process that has imported what the check's programs share, and forks one for each: they start in milliseconds, not in seconds.

Run as ``python -m convert.forkserver``, for programs that use a GPU with the argument ``gpu``: nothing of a GPU survives a fork, so then it
imports only what begins none, and ends where that cannot be had. It reads a line of JSON for each program: ``program`` (a module with a
``main``), ``arguments`` of that, ``folder`` in which to run, and ``output``, a file that takes what the program prints. It answers with a
line when the program runs, its process id, and one when it has ended, its exit code (negative: the signal that killed it). It ends where
its standard input does, and its program with it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import sys
import traceback
from typing import Any

from convert.imports import uncollected
from convert.leash import end_with

#: What every program here imports anyway, so that none holds more than in a process that it began itself.
SHARED = ("transformers", "transformers.modeling_utils", "transformers.generation", "transformers.models.auto", "convert.source")


#: Of these, and of what they import, what does not import torchao, which begins CUDA: six of every seven seconds.
WITHOUT_TORCHAO = (
    *("torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "accelerate", "transformers.models.auto.configuration_auto"),
    *("transformers.tokenization_utils_tokenizers", "transformers.loss.loss_utils", "transformers.masking_utils", "convert.source"),
)
#: With it torch asks NVML whether there is a GPU, and begins nothing.
_ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def main(*arguments: str) -> None:
    """Serves until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    gpu = arguments == ("gpu",)
    nvml = os.environ.get(_ASK_NVML)
    if gpu:
        os.environ[_ASK_NVML] = "1"
    with uncollected():
        import torch

        torch.set_num_threads(1)  # OpenMP's threads would not be there any more behind a fork
        for name in WITHOUT_TORCHAO if gpu and importlib.util.find_spec("torchao") else SHARED:
            importlib.import_module(name)
    gc.freeze()  # or the first collection of each program would write to, and so copy, every page that it shares
    if gpu:
        del os.environ[_ASK_NVML]
        if nvml is not None:
            os.environ[_ASK_NVML] = nvml
        if not _gpu_survives():
            sys.exit("an import has begun a GPU")
    try:
        server = os.getpid()
        for line in sys.stdin:
            pid = os.fork()
            if pid == 0:
                end_with(server)
                answers.close()
                _become(json.loads(line))
            print(pid, file=answers, flush=True)
            ended = os.pidfd_open(pid)
            if ended not in select.select([ended, sys.stdin], [], [])[0]:  # nothing is asked before the answer: who asked is gone
                os.kill(pid, signal.SIGKILL)
            os.close(ended)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
    except KeyboardInterrupt:
        pass  # the terminal's, which whoever asked has got too


def _gpu_survives() -> bool:
    """Whether a GPU can be used behind a fork."""
    import torch

    pid = os.fork()
    if pid == 0:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            os._exit(0)
        except BaseException:  # noqa: BLE001  there are many reasons, and one answer
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _become(order: dict[str, Any]) -> None:
    """Runs a program, and ends with it whatever happens."""
    code = 1
    try:
        os.chdir(order["folder"])
        for where, flags, numbers in ((os.devnull, os.O_RDONLY, (0,)), (order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, (1, 2))):
            opened = os.open(where, flags, 0o600)
            for number in numbers:
                os.dup2(opened, number)
        importlib.import_module(order["program"]).main(*order["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  what Python itself does with it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
