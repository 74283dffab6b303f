"""Gates keep their limits, and calibration puts the limit between good and bad examples."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from semanticblur_core.errors import ConfigError, DataError
from semanticblur_core.focus import calibration
from semanticblur_core.focus.calibration import Gate, calibrate
from semanticblur_core.focus.scores import HIGHER_IS_SHARPER


def example(**values: float) -> dict[str, float]:
    """Scores that tell nothing, but for those given."""
    return {**dict.fromkeys(HIGHER_IS_SHARPER, 0.5), **values}


def test_a_gate_keeps_the_sharp_side() -> None:
    at_least, at_most = Gate("tenengrad", 0.2), Gate("mean_blur", 0.2)
    assert at_least.passes(example(tenengrad=0.2))
    assert not at_least.passes(example(tenengrad=0.19))
    assert at_most.passes(example(mean_blur=0.2))
    assert not at_most.passes(example(mean_blur=0.21))
    assert not at_least.passes(example(tenengrad=math.nan))
    assert not at_most.passes(example(mean_blur=math.nan))
    assert (at_least.describe(), at_most.describe()) == ("tenengrad >= 0.2", "mean_blur <= 0.2")


def test_the_limit_is_the_middle_of_the_gap() -> None:
    good = [example(mean_blur=v) for v in (0.1, 0.2, 0.3)]
    bad = [example(mean_blur=v) for v in (0.7, 0.8, 0.9)]
    found = calibrate(good, bad, protocol={"method": "lbp"})
    assert found.gate == Gate("mean_blur", 0.5)
    assert (found.auc, found.accuracy) == (1.0, 1.0)
    assert (found.n_good, found.n_bad) == (3, 3)


def test_the_score_that_separates_best_is_chosen() -> None:
    good = [example(tenengrad=t, spectrum_slope=s) for t, s in ((3, -2), (1, -2.1), (4, -1.9))]
    bad = [example(tenengrad=t, spectrum_slope=s) for t, s in ((2, -3), (0, -3.1), (1.5, -2.9))]
    found = calibrate(good, bad, protocol={})
    assert found.score == "spectrum_slope"
    assert found.limit == pytest.approx(-2.5)
    asked = calibrate(good, bad, protocol={}, score="tenengrad")
    # Of nine pairs, the good 1 loses to the bad 2 and 1.5.
    assert (asked.score, asked.auc) == ("tenengrad", pytest.approx(7 / 9))


def test_accuracy_is_that_of_examples_left_out(rng: np.random.Generator) -> None:
    """What says nothing is right about half the time, however well it fits its own examples."""
    accuracies = []
    for _ in range(20):
        good, bad = ([example(tenengrad=v) for v in rng.random(8)] for _ in range(2))
        try:
            accuracies.append(calibrate(good, bad, protocol={}, score="tenengrad").accuracy)
        except DataError:
            continue
    assert len(accuracies) > 5
    assert np.mean(accuracies) < 0.65


def test_scores_that_could_not_be_had_count_as_bad() -> None:
    good = [example(in_focus_fraction=v) for v in (0.6, 0.7)]
    bad = [example(in_focus_fraction=math.nan), example(in_focus_fraction=0.2)]
    found = calibrate(good, bad, protocol={})
    assert found.auc == 1.0
    assert 0.2 < found.limit < 0.6


def test_a_limit_lies_among_values_that_could_be_had() -> None:
    good = [example(spectrum_slope=s, tenengrad=t) for s, t in ((-2, 3), (-2.1, 4), (-1.9, 5))]
    blank = [example(spectrum_slope=math.nan, tenengrad=0)] * 3
    found = calibrate(good, blank, protocol={})
    assert found.gate == Gate("tenengrad", 1.5)
    # Of a score that no bad example has, the worst good value.
    asked = calibrate(good, blank, protocol={}, score="spectrum_slope")
    assert (asked.gate, asked.auc) == (Gate("spectrum_slope", -2.1), 1.0)
    # A bad value above all good ones is not worth one of them.
    mixed = [*blank, example(spectrum_slope=-1)]
    assert calibrate(good, mixed, protocol={}, score="spectrum_slope").limit == -2.1


def test_a_score_that_no_bad_example_has_is_better_than_one_that_tells_nothing() -> None:
    good = [example(mean_blur=m, tenengrad=t) for m, t in ((0.1, 1), (0.2, 2))]
    bad = [example(mean_blur=math.nan, tenengrad=t) for t in (1, 2)]
    assert calibrate(good, bad, protocol={}).gate == Gate("mean_blur", 0.2)


def test_examples_without_a_value_do_not_widen_the_gap() -> None:
    good = [example(mean_blur=m, tenengrad=t) for m, t in ((0.1, 8), (0.2, 9))]
    bad = [example(mean_blur=m, tenengrad=t) for m, t in ((0.9, 1), (math.nan, 7))]
    assert calibrate(good, bad, protocol={}).score == "mean_blur"


def test_a_score_that_no_good_example_has_sets_no_gate() -> None:
    without, bad = [example(mean_blur=math.nan)] * 2, [example(mean_blur=0.8)] * 2
    with pytest.raises(ConfigError, match="no good example has a value of mean_blur; give others"):
        calibrate(without, bad, protocol={}, score="mean_blur")
    # Without the only good one that has it there is no gate to be right.
    one = [without[0], example(mean_blur=0.2)]
    found = calibrate(one, [without[0], bad[0]], protocol={}, score="mean_blur")
    assert (found.limit, found.accuracy) == (pytest.approx(0.5), 0.5)


def test_examples_that_are_too_few_or_alike_are_refused() -> None:
    with pytest.raises(DataError, match="at least 2 good and 2 bad examples, got 1 and 2"):
        calibrate([example()], [example(), example()], protocol={})
    with pytest.raises(DataError, match="no score tells good from bad"):
        calibrate([example()] * 3, [example()] * 3, protocol={})


def test_it_is_stored_by_name_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMANTICBLUR_HOME", str(tmp_path))
    good, bad = [example(tenengrad=2)] * 2, [example(tenengrad=1)] * 2
    made = calibrate(good, bad, protocol={"method": "lbp", "threshold": 0.5})
    path = calibration.stored_path("mine")
    assert tmp_path in path.parents
    calibration.save(made, path)
    assert calibration.load(calibration.resolve("mine")) == made
    assert calibration.load(calibration.resolve(str(path))) == made
    with pytest.raises(ConfigError, match=r"neither a file nor a stored one \(mine\)"):
        calibration.resolve("yours")
    with pytest.raises(ConfigError, match="a name is of letters"):
        calibration.stored_path("../mine")


def test_other_files_are_no_calibrations(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    made = calibrate([example(tenengrad=2)] * 2, [example(tenengrad=1)] * 2, protocol={})
    calibration.save(replace(made, score="sharpness"), path)
    with pytest.raises(ConfigError, match="gate on 'sharpness'"):
        calibration.load(path)
    path.write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ConfigError, match="format version 99; this release reads 1"):
        calibration.load(path)
    for text in ("{}", "[]", "no JSON", '{"format_version": 1, "score": "tenengrad"}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not a calibration"):
            calibration.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        calibration.load(tmp_path / "none.json")
