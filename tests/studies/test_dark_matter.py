"""The smoke scale runs all of the study on known directions; what it finds there is no result."""

from apportion.studies import run


def test_the_smoke_study_measures_everything_and_keeps_its_picture(apportion_cache) -> None:
    finding = run("dark_matter", "smoke", seeds=1, progress=False)
    assert finding.seeds == [0]
    names = {row.name.rpartition(": ")[2] for row in finding.rows}
    assert {"F=48", "F=160", "encoder", "gradient pursuit", "the activation", "controls"} <= names
    by_claim = {each.claim: each for each in finding.comparisons}
    shrinkage = next(each for claim, each in by_claim.items() if "0.9 x is linear" in claim)
    assert shrinkage.mean > 0
    assert all(row.n == 1 for row in finding.rows)
    assert "<svg" in finding.plots["width"]
