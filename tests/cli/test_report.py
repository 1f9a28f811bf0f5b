import shutil


def test_report_writes_one_file_that_shows_the_run(finished, typed, tmp_path):
    answer = typed("report", finished, "--out", tmp_path / "page.html", "--json").json

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert answer["report"] == str(tmp_path / "page.html")
    assert answer["bytes"] == (tmp_path / "page.html").stat().st_size
    assert answer["features"] == 64
    for part in ("layers.1.residual", "MutualChoice", "ce_loss_score"):
        assert part in page


def test_report_evaluates_what_was_not_evaluated(finished, typed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "evaluation.json").unlink()

    outcome = typed("report", run)

    assert outcome.code == 0
    assert (run / "evaluation.json").exists()
    assert str(run / "report.html") in outcome.out


def test_report_does_not_begin_where_it_cannot_write(finished, typed, tmp_path):
    (tmp_path / "file").write_text("")

    outcome = typed("report", finished, "--out", tmp_path / "file" / "page.html")

    assert outcome.code == 2
    assert outcome.errors[0].startswith(f"error: --out: cannot write {tmp_path / 'file'}")
