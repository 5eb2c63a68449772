"""The fit finds factors that made the measurements, keeps to 1 what nothing measures, and shrugs off a bad row."""

import numpy as np
import pytest
from calibrate import Case, fit, leave_out, predicted

FACTORS = {"products": ("speed",), "attention": ("speed", "kernel"), "tp": ("wires",)}
TRUE = {"speed": 1.2, "kernel": 1.5, "wires": 0.7}


def cases(count: int = 40, groups: int = 4) -> list[Case]:
    random = np.random.default_rng(0)
    found: list[Case] = []
    for number in range(count):
        terms = {
            "products": random.uniform(1, 3),
            "attention": random.uniform(0, 2),
            "tp": random.uniform(0, 1),
            "bubble": 0.3,
        }
        blank = Case(terms, 1.0, FACTORS, number % groups)
        found.append(Case(terms, predicted(blank, TRUE), FACTORS, number % groups))
    return found


def test_factors_that_made_the_measurements_are_found() -> None:
    assert fit(cases(), prior=1.0) == pytest.approx(TRUE, rel=0.02)


def test_what_nothing_measures_stays() -> None:
    given = [Case({"products": 2.0, "other": 1.0}, 3.0, {"products": ("speed",), "absent": ("nothing",)})]
    found = fit(given)
    assert found["nothing"] == 1.0
    assert found["speed"] == pytest.approx(1.0)


def test_one_bad_row_moves_little() -> None:
    good = cases()
    bad = Case(good[0].terms, good[0].measured * 2, FACTORS)
    assert fit([*good, bad], prior=1.0) == pytest.approx(TRUE, rel=0.06)


def test_the_bubble_grows_with_computation() -> None:
    one = Case({"products": 1.0, "bubble": 0.5}, 1.0, FACTORS)
    assert predicted(one, {"speed": 2.0}) == pytest.approx(3.0)


def test_a_group_is_judged_by_the_others() -> None:
    odd = [Case(case.terms, case.measured * (1.1 if case.group == 0 else 1.0), FACTORS, case.group) for case in cases()]
    errors = leave_out(odd, lambda seen: fit(seen, prior=1.0))
    assert np.mean(errors[0]) == pytest.approx(1 / 1.1 - 1, abs=0.01)
    assert max(abs(error) for error in errors[1]) < 0.08
