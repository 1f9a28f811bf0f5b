"""Allocation over several processes gives every one of them its part of what one process would have chosen."""

from pathlib import Path

import pytest

from forked_ranks import run_script


@pytest.mark.slow
def test_every_rule_chooses_over_a_mesh_what_it_chooses_on_one_process():
    same = run_script(Path(__file__).parent / "mesh_choices.py")
    assert [case for case, fine in same.items() if not fine] == []
    assert len(same) > 250
    assert "4x1 NofM is refused" in same
