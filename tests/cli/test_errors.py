import warnings

import pytest
import typer

from apportion.cli.errors import exit_code
from apportion.errors import InputError


def _app(error: BaseException | None = None) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def only() -> None:
        if error is not None:
            raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (None, 0, ""),
        (InputError("site 'x' is not a site: write ..."), 2, "error: site 'x' is not a site: write ...\n"),
        (ValueError("x[3] has NaN: drop such tokens"), 2, "error: x[3] has NaN: drop such tokens\n"),
        (FloatingPointError("the loss became NaN at step 3"), 1, "error: the loss became NaN at step 3\n"),
        (KeyError("mistake"), 1, "error: KeyError: 'mistake' (APPORTION_DEBUG=1 shows where)\n"),
        (UnicodeError("odd"), 1, "error: UnicodeError: odd (APPORTION_DEBUG=1 shows where)\n"),
        (OSError(28, "No space left on device"), 1, "free some space and run the same command again"),
        (MemoryError("640 KiB"), 1, "try fewer --features or a smaller --batch-size"),
        (KeyboardInterrupt(), 130, "to go on, run the same command again"),
    ],
)
def test_every_error_has_its_exit_code_and_one_message(error, code, shown, capsys, monkeypatch):
    monkeypatch.delenv("APPORTION_DEBUG", raising=False)

    assert exit_code(_app(error), []) == code

    captured = capsys.readouterr()
    assert captured.out == ""
    assert shown in captured.err
    assert captured.err.count("\n") == (error is not None)
    assert "Traceback" not in captured.err


def test_debugging_shows_the_traceback_as_well(capsys, monkeypatch):
    monkeypatch.setenv("APPORTION_DEBUG", "1")

    assert exit_code(_app(InputError("no")), []) == 2

    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert captured.endswith("error: no\n")


def test_warnings_are_a_line_on_stderr(capsys):
    app = typer.Typer()

    @app.command()
    def only() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("the newest checkpoint is damaged", stacklevel=1)

    assert exit_code(app, []) == 0
    assert capsys.readouterr().err == "warning: the newest checkpoint is damaged\n"
