def test_doctor_says_what_the_machine_has_and_what_would_help(typed, shared_cache):
    found = typed("doctor", "--json").json

    assert found["torch"].startswith("2.")
    assert found["threads"]["torch"] >= 1
    assert {model["name"] for model in found["models"]} >= {"smollm2", "minilm"}
    assert found["cache"]["folder"] == str(shared_cache)
    assert found["cache"]["free_gib"] > 0
    assert any("apportion fetch smollm2" in line for line in found["advice"])
    assert found["bfloat16"]["native"] == any("--precision bfloat16" in line for line in found["advice"])


def test_doctor_for_people_names_every_packaged_model(typed):
    outcome = typed("doctor")

    assert outcome.code == 0
    for name in ("model smollm2", "model minilm", "bfloat16", "CUDA", "triton", "chromium"):
        assert name in outcome.out
