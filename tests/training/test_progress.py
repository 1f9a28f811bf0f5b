"""A bar on a terminal, lines elsewhere, silence on request; always on stderr."""

import io

from rich.console import Console

from apportion.training import TrainingSettings, train
from apportion.training.progress import _Lines, progress_display


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_terminal_shows_a_bar_with_the_chosen_metrics():
    screen = console(terminal=True)
    with progress_display(True, 100, 0, ("loss", "dead"), screen) as display:
        display.update(50, {"step": 50, "loss": 0.12345, "dead": None, "other": 7.0})
        display.update(51, None)
    shown = screen.file.getvalue()
    assert "51/100" in shown
    assert "loss 0.1235  dead -" in shown
    assert "other" not in shown


def test_elsewhere_a_line_comes_every_ten_seconds():
    screen = console(terminal=False)
    now = 0.0
    lines = _Lines(screen, 2000, ("loss",), clock=lambda: now)
    for second in range(25):
        now = float(second)
        lines.update(second * 10, {"step": second * 10, "loss": 1.0})
    assert screen.file.getvalue().splitlines() == ["step 100/2,000  loss 1", "step 200/2,000  loss 1"]


def test_short_run_outside_a_terminal_says_nothing(capfd, regressor, objective, batches):
    train(regressor(), objective, batches, TrainingSettings(steps=20, learning_rate=0.01), None)
    assert capfd.readouterr() == ("", "")


def test_bar_is_drawn_on_stderr(capfd, monkeypatch, regressor, objective, batches):
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(regressor(), objective, batches, TrainingSettings(steps=20, learning_rate=0.01), None)
    out, err = capfd.readouterr()
    assert out == ""
    assert "20/20" in err
