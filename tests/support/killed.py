"""python killed.py MODEL ROWS FOLDER KILLS: kills a run at random instants KILLS times, then lets it finish.

torch is imported once; every attempt is a forked child. Prints how often a kill hit a live run.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child cannot use its parent's thread pool

import torch
from running import tiny_recipe

from shikomi.checkpoint.rundir import RunDir
from shikomi.run import train


def attempt(recipe, seconds: float | None) -> int | None:
    """Runs in a child, killed after `seconds`; its exit code, None where the kill came first."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if not RunDir(recipe.output_dir).is_finished():  # a kill may come after the last byte
                train(recipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main() -> None:
    model, rows, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    keys = {"max_steps": 12, "save_steps": 2, "adapter": {"name": "lora", "r": 4, "lora_dropout": 0.1}}
    started = time.monotonic()
    assert attempt(tiny_recipe(model, rows, folder / "whole", **keys), None) == 0
    whole = time.monotonic() - started
    chance, hit, number = random.Random(7), 0, 0
    while hit < kills:
        recipe = tiny_recipe(model, rows, folder / f"killed-{number}", **keys)
        for _ in range(10):
            code = attempt(recipe, chance.uniform(0.05, 0.6) * whole)
            assert code in (None, 0), f"an attempt failed with {code}"
            hit += code is None
            if code == 0:
                break
        else:
            assert attempt(recipe, None) == 0
        number += 1
    print(f"killed {hit} runs {number}")


if __name__ == "__main__":
    main()
