"""The display: what a pipe gets, and when; what a terminal shows."""

import io

import pytest
from rich.console import Console

from shikomi.progress import Lines, Terminal, describe, duration, make, size


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def step(number, total=1000, **more):
    return {"step": number, "total_steps": total, "loss": 2.5, "tokens_per_second": 812.4, "eta_seconds": 65.0, **more}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(clock):
    return Lines(io.StringIO(), clock=clock)


def text_of(display):
    return display._stream.getvalue().splitlines()


def test_steps_make_one_line_every_ten_seconds(lines, clock):
    lines.start(1000, "training")
    for number in range(1, 101):
        clock.now += 1
        lines.advance(step(number))
    shown = [line.split()[1] for line in text_of(lines) if line.startswith("step")]
    assert shown == ["1/1,000", *(f"{n}/1,000" for n in range(11, 101, 10))]


def test_the_first_and_the_last_step_are_always_shown(lines):
    for number in (1, 2, 3):
        lines.advance(step(number, total=3))
    assert [line.split()[1] for line in text_of(lines)] == ["1/3", "3/3"]


def test_phases_are_named_at_once_and_quick_counting_says_nothing(lines, clock):
    lines.phase("importing torch")
    for done in range(1, 6):
        clock.now += 1
        lines.tick(done, 5, "tokenising")
    assert text_of(lines) == ["importing torch ..."]


def test_long_counting_shows_where_it_is_and_that_it_is_done(lines, clock):
    for done in range(1, 26):
        clock.now += 1
        lines.tick(done, 25, "evaluating")
    assert text_of(lines) == ["evaluating 10/25", "evaluating 20/25", "evaluating 25/25"]


def test_a_step_shows_loss_speed_time_left_memory_and_checkpoint():
    record = step(7, peak_memory_bytes=1_340_000_000, next_checkpoint_step=50)
    assert describe(record) == "loss 2.5000  812 tokens/s  1 min 5 s left  peak 1.3 GB  checkpoint at 50"
    assert "left" not in describe(step(1000))


def test_a_record_without_the_extras_is_shown_too(lines):
    lines.advance({"step": 1, "loss": None})
    assert text_of(lines) == ["step 1  "]


def terminal(clock, width=120):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    return Terminal(console, clock), console


def frame(display, console):
    with console.capture() as captured:
        console.print(display._view())
    return captured.get()


def test_the_terminal_shows_training_and_the_evaluation_inside_it(clock):
    display, console = terminal(clock)
    try:
        display.start(100, "training")
        display.advance(step(40, total=100))
        display.tick(3, 9, "evaluating")
        seen = frame(display, console)
        assert "training" in seen and "40/100" in seen and "1 min 5 s left" in seen
        assert "evaluating" in seen and "3/9" in seen
        display.advance(step(41, total=100))
        assert "evaluating" not in frame(display, console)
    finally:
        display.finish()
    assert frame(display, console).strip() == ""


def test_the_terminal_names_a_silent_phase_and_keeps_a_long_one(clock):
    display, console = terminal(clock)
    display.phase("importing torch")
    clock.now += 3
    assert "importing torch" in frame(display, console)
    display.phase("loading [weights]")
    assert "importing torch" not in frame(display, console)
    display.finish()
    assert "importing torch: 3.0 s" in console.file.getvalue()


def test_brackets_in_notes_are_text(clock):
    display, console = terminal(clock)
    display.note("took [bold]adapter[/bold] from [/x]")
    display.finish()
    assert "took [bold]adapter[/bold] from [/x]" in console.file.getvalue()


def test_a_finished_run_leaves_its_last_step_on_the_screen(clock):
    display, console = terminal(clock)
    display.start(2, "training")
    display.advance(step(1, total=2))
    display.advance(step(2, total=2))
    display.finish()
    assert "training: step 2/2  loss 2.5000" in console.file.getvalue()


def test_without_a_terminal_there_are_lines_on_stderr(capsys):
    display = make(json=False)
    assert isinstance(display, Lines)
    display.note("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


@pytest.mark.parametrize("seconds, text", [(0.34, "0.3 s"), (59, "59 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("n, text", [(12, "12 B"), (1500, "1.5 kB"), (270_000_000, "270 MB"), (1.34e9, "1.3 GB")])
def test_sizes(n, text):
    assert size(n) == text
