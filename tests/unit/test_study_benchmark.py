"""What benchmarks/study.py reads instead of running it again."""

import json

from benchmarks.study_runs import SECONDS, Timed, _begin, _keep, _kept


def test_a_run_that_lies_there_counts_for_its_own_settings_alone(tmp_path):
    run, timed = tmp_path / "0", Timed(12.5, 3.0)
    assert _kept(run, ["trainer.max_steps=9"]) is None
    _begin(run)
    assert _kept(run, ["trainer.max_steps=9"]) is None  # begun, and killed
    _keep(run, ["trainer.max_steps=9"], timed)
    assert _kept(run, ["trainer.max_steps=9"]) == timed
    assert _kept(run, ["trainer.max_steps=27"]) is None
    (run / SECONDS).write_text(json.dumps({"seconds": 12.5, "until_logged_s": 3.0}))  # as it once was
    assert _kept(run, ["trainer.max_steps=9"]) is None
    _begin(run)
    assert not (run / SECONDS).exists()
    assert (tmp_path / "0.aside0" / SECONDS).exists()
