"""Times GPTQ of one decoder block's linears, factorisations and column loops apart, beside the least such a block can take.

On CUDA the block is Llama-8B's (q 4096, k and v 1024, o, gate and up 14336, down), on a CPU the sample's (SmolLM2-135M). The floor on
one H100: three calls for each factorisation (Cholesky, inverse, Cholesky), 0.26 s a block, and the same loop without an order, groups or
scales of its own, 0.06 s.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from convert.algorithms import gptq
from convert.algorithms.output_error import output_error
from convert.algorithms.rtn import quantize
from formats.scheme import SCHEMES

#: The rows of the weights that share an input, and its features.
BLOCKS = {
    "cuda": {"q, k, v": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate, up": ((14336, 14336), 4096), "down": ((4096,), 14336)},
    "cpu": {"q, k, v": ((576, 192, 192), 576), "o": ((576,), 576), "gate, up": ((1536, 1536), 576), "down": ((576,), 1536)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--scheme", default="int8-dynamic", choices=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device, scheme = arguments.device, SCHEMES[arguments.scheme].weight
    if device == "cuda":
        print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    generator = torch.Generator(device).manual_seed(0)
    total = [0.0, 0.0]
    print(f"{'input of':10} {'weights':>20} {'factorise s':>12} {'columns s':>10} {'output error, of rounding':>26}")
    for name, (rows, columns) in BLOCKS[device].items():
        x = torch.randn(2 * columns, columns, device=device, generator=generator)
        x[:, 1:] += 0.5 * x[:, :-1]
        x *= torch.exp(torch.randn(columns, device=device, generator=generator))
        hessian = x.T @ x
        del x
        weights = [torch.randn(count, columns, device=device, generator=generator) * 0.02 for count in rows]
        factor = gptq.factorise(hessian)
        seconds = [
            timed(lambda hessian=hessian: gptq.factorise(hessian), arguments.rounds, device),
            timed(
                lambda weights=weights, factor=factor: gptq.quantize_together(weights, scheme, scale_dtype=torch.bfloat16, factor=factor),
                arguments.rounds,
                device,
            ),
        ]
        first = gptq.quantize_together(weights, scheme, scale_dtype=torch.bfloat16, factor=factor)[0].qtensor.dequantize()
        rounded = quantize(weights[0], scheme, scale_dtype=torch.bfloat16).dequantize()
        share = output_error(weights[0], first, hessian=hessian) / output_error(weights[0], rounded, hessian=hessian)
        print(f"{name:10} {f'{sum(rows)} x {columns}':>20} {seconds[0]:12.4f} {seconds[1]:10.4f} {share:26.3f}")
        total = [total[0] + seconds[0], total[1] + seconds[1]]
    print(f"{'block':10} {'':>20} {total[0]:12.4f} {total[1]:10.4f}")
    if device == "cuda":
        print(f"{'floor':10} {'':>20} {0.26:12.4f} {0.06:10.4f}")
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, the Hessian of the moment included")


def timed(function: Callable[[], object], rounds: int, device: str) -> float:
    """Seconds of the fastest of ``rounds``, after one that is not counted."""
    best = float("inf")
    for i in range(rounds + 1):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
