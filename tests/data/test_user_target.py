"""What a target is called with, as it is read from a document."""

from __future__ import annotations

from data.user_target import restore_number_keys


def test_whole_numbers_are_keys_again_within_options() -> None:
    scales = {"100": 0.1, "-20": [{"0": {"7": "x"}}]}
    assert restore_number_keys({"scales": scales, "7": 1}) == {"scales": {100: 0.1, -20: [{0: {7: "x"}}]}, "7": 1}
    # What is no number as Python writes one, or stands beside a name, is a name.
    for names in ({"01": 1}, {"1": 1, "a": 2}, {"1.5": 1}, {"1_0": 1}, {"٣": 1}, {"-0": 1}, {}):
        assert restore_number_keys({"names": names}) == {"names": names}
    assert restore_number_keys({"whole": 1, "text": "12"}) == {"whole": 1, "text": "12"}
