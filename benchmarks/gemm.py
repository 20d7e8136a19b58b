"""The GEMM limit: how long the matrix products of given steps take alone, in the arithmetic that the CPU does best.

python benchmarks/gemm.py MODEL_FOLDER '[[tokens, scored], ...]' [--dtype fp32|bf16]

Per step and layer: the forward product and the one for the input's gradient (weights are frozen, so there is none
for theirs), q, k, v and gate, up each as one product; and for the scored tokens the head twice. Adapters, attention and
everything else count as nothing, so the limit cannot be reached. Prints one line of JSON: seconds per step, the rate.
"""

import argparse
import json
import time
from pathlib import Path

import torch


def shapes(config: dict[str, int], tokens: int, scored: int) -> list[tuple[int, int, int, int]]:
    """(rows, inner, columns, how often) of every product of a step of a Llama-like model."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = head * config["num_attention_heads"]
    qkv = queries + 2 * head * config["num_key_value_heads"]
    linear = [(hidden, qkv), (queries, hidden), (hidden, 2 * inner), (inner, hidden)]
    body = [(tokens, a, b, layers) for a, b in linear] + [(tokens, b, a, layers) for a, b in linear]
    vocabulary = config["vocab_size"]
    return [*body, (scored, hidden, vocabulary, 1), (scored, vocabulary, hidden, 1)]


def seconds_of(rows: int, inner: int, columns: int, dtype: torch.dtype, repeats: int = 3) -> float:
    """The fastest of some runs of (rows, inner) @ (inner, columns)."""
    x, w = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first is a warm-up in all but name: the minimum ignores it
        start = time.perf_counter()
        torch.mm(x, w, out=out)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("steps", type=json.loads)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    steps, flop, known = [], 0.0, {}
    for tokens, scored in args.steps:
        total = 0.0
        for *shape, times in shapes(config, tokens, scored):
            key = tuple(shape)
            if key not in known:
                known[key] = seconds_of(*shape, dtype)
            total += times * known[key]
            flop += times * 2.0 * shape[0] * shape[1] * shape[2]
        steps.append(total)
    print(json.dumps({"seconds": steps, "gflops": flop / sum(steps) / 1e9, "dtype": args.dtype}))


if __name__ == "__main__":
    main()
