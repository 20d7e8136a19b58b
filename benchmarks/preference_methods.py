"""SFT, then DPO, IPO, SimPO and KTO on its own samples, and ORPO from the untouched base: which of them helps.

python benchmarks/preference_methods.py [-o runs/preference-methods] [--only dpo-rpo kto-1-1 ...] [--pairs 400]

Task: a package's description in, its maintainer's one-line synopsis out (benchmarks/data/summaries). A pair's chosen
answer is the synopsis, its rejected one a sample of the SFT model, of prompts that SFT has not seen. Scored on 500
unseen rows: ROUGE-L, chrF, length against the references', win rate against SFT (by chrF, and by a reward model that
was trained on the same pairs), and reward accuracy on 100 unseen pairs. Every step is a command of the command line;
what is there already is not done again. Prints the tables of docs/results.md.
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from measure import HERE, SHIKOMI, table
from shikomi.metrics import measure
from shikomi.metrics._intervals import mcnemar, wilson
from shikomi.metrics.chrf import ChrF
from shikomi.metrics.rouge import Rouge

DATA = HERE / "data" / "summaries"
PROMPT = "Summarise this package description in one short line.\n\n{text}"
NEW_TOKENS = 32
LORA = {"name": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
HELD_BACK = 100


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def call(*arguments: str | Path) -> None:
    """One command of ours, its progress shown."""
    print("shikomi", *arguments, flush=True)
    subprocess.run([SHIKOMI, *map(str, arguments)], check=True, cwd=HERE.parent)


def train(folder: Path, **recipe: Any) -> dict[str, Any]:
    """A finished run's result.json; trained where it is not there yet, resumed where it was interrupted."""
    if not (folder / "result.json").exists():
        path = folder.with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe | {"output_dir": str(folder)}, sort_keys=False), encoding="utf-8")
        call("train", path)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def answers(model: str | Path, out: Path) -> list[str]:
    """What a model answers to the test rows, greedily."""
    if not out.exists():
        part = out.with_suffix(".part")
        arguments = (model, DATA / "test.jsonl", "-o", part, "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS))
        call("predict", *arguments, "--force")
        part.rename(out)
    return [row["prediction"] for row in rows_of(out)]


def make_pairs(sft: Path, work: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training pairs, held-back pairs): the maintainer's synopsis against a sample of the SFT model."""
    out = work / "pairs.jsonl"
    if not out.exists():
        part = out.with_suffix(".part.jsonl")
        rows = ("--prompt", PROMPT, "--completion", "{summary}")
        how = ("--chosen", "reference", "--temperature", "1.0", "--max-new-tokens", str(NEW_TOKENS))
        call("data", "pairs", sft, DATA / "prompts.jsonl", "-o", part, *rows, *how)
        part.rename(out)
    pairs = rows_of(out)
    return pairs[:-HELD_BACK], pairs[-HELD_BACK:]


def thumbs(pairs: Sequence[dict[str, Any]], good_share: float) -> list[dict[str, Any]]:
    """One judgement of every pair: the chosen answer of this share of them, the rejected one of the others."""
    picked = np.random.default_rng(0).permutation(len(pairs)) < round(good_share * len(pairs))
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": bool(good)}
        for pair, good in zip(pairs, picked, strict=True)
    ]


def plans(
    base: str, sft: Path, pairs: Path, held: Path, kto: dict[str, Path], epochs: int
) -> dict[str, dict[str, Any]]:
    """The recipe of every method.

    The usual block is batch 16 (4 by 4 accumulation steps) at 5e-5 or 5e-6, for thousands of updates. Some hundred
    pairs make a few dozen of those: the methods are compared with batches of 4. With 5e-4 the margin is learned and the
    chosen answers fade with the rejected ones; `dpo-rpo` holds them up by the SFT term of RPO.
    """
    data = {"train": str(pairs), "validation": str(held)}
    common: dict[str, Any] = {"model": str(sft / "final"), "max_length": 512, "num_train_epochs": epochs}
    dpo = {"name": "dpo", "beta": 0.1}
    usual = {**common, "data": data, "batch_size": 16, "objective": dpo}
    small = {**common, "data": data, "batch_size": 4, "learning_rate": 1e-4}
    found: dict[str, dict[str, Any]] = {
        "dpo-5e-6": {**usual, "learning_rate": 5e-6},
        "dpo-5e-5": {**usual, "learning_rate": 5e-5},
        "dpo-5e-4": {**small, "objective": dpo, "learning_rate": 5e-4},
        "dpo-rpo": {**small, "objective": {"name": "dpo", "beta": 0.3, "rpo_alpha": 1.0}, "learning_rate": 5e-4},
        "ipo": {**small, "objective": {"name": "ipo", "beta": 0.1}},
        "simpo": {**small, "objective": "simpo"},
        "orpo": {
            **{**small, "model": base, "adapter": LORA},
            **{"objective": {"name": "orpo", "beta": 0.1}, "learning_rate": 5e-4},
        },
    }
    kto_of = {"name": "kto", "beta": 0.1}
    weighted = {**kto_of, "desirable_weight": 5.0}  # what `shikomi data check` asks for at 1:5
    for name, options, path in (
        ("kto-1-1", kto_of, kto["kto-1-1"]),
        ("kto-1-5", weighted, kto["kto-1-5"]),
        ("kto-1-5-even", kto_of, kto["kto-1-5"]),
    ):
        found[name] = {**small, "data": {"train": str(path)}, "objective": options}
    return found


def reward_accuracy(run: Path) -> float | None:
    """rewards/accuracies (DPO's kin) or accuracy (reward models) on the held-back pairs at the end of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [record for line in lines if "eval_loss" in (record := json.loads(line))]
    if not evaluations:
        return None
    last = evaluations[-1]
    return last.get("eval_rewards/accuracies", last.get("eval_accuracy"))


def per_row_chrf(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """chrF of every row by itself: (n,)."""
    return np.asarray(ChrF()(predictions, references)["rows"])


def win_rate(mine: np.ndarray, theirs: np.ndarray) -> str:
    """Share of rows where mine is higher, ties left out, with its Wilson interval and the p of a sign test."""
    wins, losses = int((mine > theirs).sum()), int((mine < theirs).sum())
    if wins + losses == 0:
        return "no row differs"
    low, high = wilson(wins, wins + losses)
    share = wins / (wins + losses)
    return f"{share:.1%} ({low:.1%} to {high:.1%}) of {wins + losses}, p {mcnemar(losses, wins):.2g}"


def describe(
    name: str,
    predictions: Sequence[str],
    references: Sequence[str],
    sft: Sequence[str],
    values: tuple[np.ndarray, np.ndarray],
    run: Path | None,
) -> list[str]:
    """A row of the table; `values` of the reward model are those of the predictions and of SFT's."""
    rouge, chrf = (measure(metric, predictions, references) for metric in (Rouge(), ChrF()))
    length = np.mean([len(text.split()) for text in predictions]) / np.mean([len(text.split()) for text in references])
    against = ["", ""]
    if list(predictions) != list(sft):
        by_chrf = win_rate(per_row_chrf(predictions, references), per_row_chrf(sft, references))
        against = [by_chrf, win_rate(*values)]
    cost = ["", "", ""]
    if run is not None:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        accuracy = reward_accuracy(run)
        told = "" if accuracy is None else f"{accuracy:.0%}"
        cost = [told, f"{result['training_seconds']:.0f} s", f"{result['peak_memory_bytes'] / 1e9:.2f} GB"]
    scores = [f"{m['value']:.3g} ({m['ci95'][0]:.3g} to {m['ci95'][1]:.3g})" for m in (rouge, chrf)]
    return [name, *scores, f"{length:.2f}", *against, *cost]


def judged(work: Path, given: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """What the reward model gives the answers of each model: (n,); kept in files."""
    from shikomi import open_reward_model

    files = {name: work / f"{name}.values.json" for name in given}
    if missing := [name for name, path in files.items() if not path.exists()]:
        asked = [PROMPT.format(**row) for row in rows_of(DATA / "test.jsonl")]
        turns = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": given[name][row]}]
            for row, question in enumerate(asked)
            for name in missing  # one after the other: their prompt is computed once
        ]
        scored = np.asarray(open_reward_model(work / "reward").score(turns)).reshape(len(asked), len(missing))
        for name, column in zip(missing, scored.T, strict=True):
            files[name].write_text(json.dumps(column.tolist()), encoding="utf-8")
    return {name: np.asarray(json.loads(path.read_text(encoding="utf-8"))) for name, path in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=HERE.parent / "runs" / "preference-methods")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=400, help="training pairs")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the pairs")
    parser.add_argument("--only", nargs="+", help="these methods only")
    parser.add_argument("--no-table", action="store_true", help="train and answer only, to do several side by side")
    args = parser.parse_args()
    work = args.output.absolute()
    references = [row["summary"] for row in rows_of(DATA / "test.jsonl")]
    sft = work / "sft"
    data = {"train": str(DATA / "sft.jsonl"), "validation": str(DATA / "validation.jsonl")}
    data |= {"prompt": PROMPT, "completion": "{summary}"}
    keys = {"adapter": LORA, "max_length": 512, "num_train_epochs": 2, "batch_size": 16, "learning_rate": 5e-4}
    train(sft, model=args.model, data=data, **keys)
    training, held_back = make_pairs(sft, work)
    training = training[: args.pairs]
    pairs, held = write_rows(work / "train.jsonl", training), write_rows(work / "held.jsonl", held_back)
    kto = {
        "kto-1-1": write_rows(work / "kto-1-1.jsonl", thumbs(training, 1 / 2)),
        "kto-1-5": write_rows(work / "kto-1-5.jsonl", thumbs(training, 1 / 6)),
    }
    data = {"train": str(pairs), "validation": str(held)}
    keys = {"objective": "reward", "max_length": 512, "num_train_epochs": 2, "batch_size": 16, "learning_rate": 1e-3}
    train(work / "reward", model=args.model, adapter=LORA, data=data, **keys)
    recipes = plans(args.model, sft, pairs, held, kto, args.epochs)
    if unknown := set(args.only or ()) - recipes.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(recipes)}")
    chosen = [name for name in recipes if not args.only or name in args.only]
    runs: dict[str, Path | None] = {"base": None, "sft": sft}
    for name in chosen:
        runs[name] = work / name
        train(work / name, **recipes[name])
    given = {name: answers(run or args.model, work / f"{name}.answers.jsonl") for name, run in runs.items()}
    if args.no_table:
        return
    values = judged(work, given)
    lines = [
        describe(name, given[name], references, given["sft"], (values[name], values["sft"]), run)
        for name, run in runs.items()
    ]
    accuracy = reward_accuracy(work / "reward")
    head = ["", "ROUGE-L", "chrF", "length / references'", "wins over SFT by chrF", "by the reward model"]
    head += ["reward accuracy, unseen pairs", "training", "peak memory"]
    print(table(head, lines))
    print(f"\nReward model: {accuracy:.0%} of {HELD_BACK} unseen pairs. Pairs: {len(training)}.")


if __name__ == "__main__":
    main()
