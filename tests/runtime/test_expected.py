"""Inputs by rule, and digests that tell how far a tensor is from the right one."""

import math

import numpy as np
import pytest

from movdc.runtime.expected import (
    MAX_DB,
    Recipe,
    compare,
    compare_with_digest,
    digest_of,
    make_input,
    split_mix,
)

OWNER = "stage.plain.0"
F32 = np.dtype(np.float32)


def _numbers(items: int, owner: str = OWNER) -> np.ndarray:
    return make_input(Recipe(name="x", rule="uniform", low=-1, high=1), owner, (items,), F32)


def test_the_generator_is_the_published_one() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert split_mix(1234567, 0, 4).tolist() == published
    assert split_mix(1234567, 2, 4).tolist() == published[2:]


def test_inputs_are_within_their_range_and_depend_on_owner_and_name() -> None:
    numbers = make_input(Recipe(name="x", rule="uniform", low=2, high=5), OWNER, (3, 1000), F32)
    assert numbers.dtype == F32
    assert numbers.shape == (3, 1000)
    assert 2 <= numbers.min() < 2.05
    assert 4.95 < numbers.max() <= 5
    whole = make_input(Recipe(name="ids", rule="integers", high=7), OWNER, (1, 500), np.dtype(np.int64))
    assert set(whole.ravel().tolist()) == set(range(7))
    assert not np.array_equal(_numbers(100), _numbers(100, "stage.plain.1"))
    assert np.array_equal(_numbers(100), _numbers(200)[:100])
    mask = make_input(Recipe(name="m", rule="prefix", high=3), OWNER, (2, 5), F32)
    assert mask.tolist() == [[1, 1, 1, 0, 0]] * 2


@pytest.mark.parametrize("error", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("items", [1, 50, 300_000])  # the last in two steps
def test_a_digest_tells_the_distance(error: float, items: int) -> None:
    right = _numbers(items)
    digest = digest_of(right, "x", OWNER)
    assert compare_with_digest(right, digest, OWNER).sqnr_db == MAX_DB
    wrong = (right.astype(np.float64) + error * np.random.default_rng(0).standard_normal(items)).astype(np.float32)
    known, estimated = compare(wrong, right, "x"), compare_with_digest(wrong, digest, OWNER)
    assert abs(known.sqnr_db - estimated.sqnr_db) < 4
    assert abs(known.psnr_db - estimated.psnr_db) < 4
    assert known.relative_l2 == pytest.approx(np.linalg.norm(wrong - right) / np.linalg.norm(right), rel=1e-3)
    assert known.max_abs == np.abs(wrong.astype(np.float64) - right).max()


def test_a_digest_sees_order_and_single_items() -> None:
    right = _numbers(10_000).reshape(100, 100)
    digest = digest_of(right, "x", OWNER)
    assert compare_with_digest(np.ascontiguousarray(right.T), digest, OWNER).sqnr_db < 0
    one = right.copy()
    one[3, 4] += 1
    estimated = compare_with_digest(one, digest, OWNER)
    assert estimated.relative_l2 == pytest.approx(1 / np.linalg.norm(right), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_or_has_another_shape_is_as_wrong_as_can_be(value: float) -> None:
    right = _numbers(100)
    broken = right.copy()
    broken[5] = value
    for wrong in (broken, right[:99]):
        for error in (compare(wrong, right, "x"), compare_with_digest(wrong, digest_of(right, "x", OWNER), OWNER)):
            assert error.sqnr_db == -math.inf
