"""Runs of equal ids are documents."""

import numpy as np

from kernels_pallas.common import segments

IDS = np.array([[4, 4, 7, 7, 7, 4, 0, 0], [1, 2, 2, 2, 2, 2, 2, 3]], np.int32)


def test_starts_leave_the_first_token_to_the_initial_state():
    expected = [[0, 0, 1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(segments.starts(IDS), np.array(expected, bool))


def test_starts_in_reverse_are_those_of_flipped_time():
    flipped = segments.starts(IDS[:, ::-1])[:, ::-1]
    np.testing.assert_array_equal(segments.starts(IDS, reverse=True), flipped)


def test_run_index_tells_an_id_that_comes_back_apart():
    expected = [[0, 0, 1, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 2]]
    np.testing.assert_array_equal(segments.run_index(IDS), expected)
    np.testing.assert_array_equal(segments.count_starts(segments.starts(IDS)), expected)


def test_positions_count_within_documents():
    expected = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 0]]
    np.testing.assert_array_equal(segments.positions(IDS), expected)


def test_one_token():
    one = np.array([[3]], np.int32)
    for function in (segments.starts, segments.run_index, segments.positions):
        np.testing.assert_array_equal(function(one), [[0]])
