"""Small label and text tasks for the tests of evaluation."""

from typing import Any

from shikomi.data.conversation import Conversation, prompt_answer

LABELS = ("admin", "games", "net")
WORDS = {"admin": "manages users and disks", "games": "a puzzle with levels", "net": "a client for mail"}


def conversation(prompt: str, answer: str | None, system: str | None = None) -> Conversation:
    """A prompt with its answer, as the readers of data make it."""
    made, problems = prompt_answer(system, prompt, answer, prompt)
    assert made is not None and not problems
    return made


def label_rows(n: int, system: str | None = None) -> tuple[Conversation, ...]:
    """n rows over LABELS in turn, each input different."""
    return tuple(
        conversation(f"Which section does this package belong to? {WORDS[label]}, version {i}.", label, system)
        for i, label in ((i, LABELS[i % len(LABELS)]) for i in range(n))
    )


def measurement(value: float, low: float, high: float, unit: str = "share", **more: Any) -> dict[str, Any]:
    """A Measurement as result.json holds it."""
    base = {"value": value, "ci95": [low, high], "n": 200, "unit": unit, "higher_is_better": True}
    return {**base, "interval": "wilson", "details": {}, **more}


def evaluation_json() -> dict[str, Any]:
    """A complete `evaluation` of result.json, with text that would break a page that does not escape it."""

    def system(value: float, low: float, high: float, **settings: Any) -> dict[str, Any]:
        return {"n": 200, "seconds": 31.2, **settings, "metrics": {"accuracy": measurement(value, low, high)}}

    gap = {"value": 0.345, "ci95": [0.26, 0.43], "n": 200, "unit": "share", "higher_is_better": True}
    common = "Which section of the archive does this package belong to? "
    return {
        "n": 200,
        "main_metric": "accuracy",
        "baseline": {"zero-shot": system(0.15, 0.107, 0.206), "few-shot": system(0.255, 0.2, 0.32, shots=5)},
        "trained": system(0.6, 0.531, 0.665),
        "difference": {
            "against": "few-shot",
            "metrics": {"accuracy": {**gap, "p_value": 1e-9, "gained": 80, "lost": 11}},
        },
        "examples": [
            {
                "input": f"{common}<script>alert(1)</script> & [bold]x[/bold]",
                "reference": "a<b",
                "base": '"games"',
                "trained": "a<b",
            }
        ],
        "examples_base": "few-shot",
        "examples_common": common,
        "notes": ["few-shot: 3 of 200 rows had room for fewer than 5 examples"],
    }
