"""How long `shikomi --help` takes, as a user waits for it: whole processes, the median of ten after one warm-up.

python benchmarks/cli_help.py
"""

import statistics
import subprocess
import time

from measure import SHIKOMI, table, write_section

ALLOWED_SECONDS = 0.3


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([SHIKOMI, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    rows = []
    for arguments in (["--help"], ["train", "--help"]):
        seconds(arguments)
        taken = [seconds(arguments) for _ in range(10)]
        met = "yes" if statistics.median(taken) <= ALLOWED_SECONDS else "no"
        name = f"`shikomi {' '.join(arguments)}`"
        rows.append([name, f"{statistics.median(taken):.2f} s", f"{min(taken):.2f}-{max(taken):.2f} s", met])
    text = table(["", "median of 10", "range", f"within {ALLOWED_SECONDS} s"], rows)
    write_section("cli_help", "Time of --help", text, "python benchmarks/cli_help.py")


if __name__ == "__main__":
    main()
