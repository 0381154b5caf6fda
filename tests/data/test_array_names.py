"""Archives whose arrays are called as people call them are read without a word; others are asked about."""

from __future__ import annotations

import pytest

from data.array_names import choose_arrays
from data.option_fields import ArrayNames

KERAS = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = tuple(f"{part}_{what}" for part in ("train", "val", "test") for what in ("images", "labels"))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("inputs", "label", "x_train", "y_train"), {"train": ("inputs", "label")}),
        (
            ("inputs", "label", "eval_inputs", "eval_label", "test_inputs", "test_label"),
            {
                "train": ("inputs", "label"),
                "eval": ("eval_inputs", "eval_label"),
                "test": ("test_inputs", "test_label"),
            },
        ),
        (KERAS, {"train": ("x_train", "y_train"), "eval": ("x_test", "y_test")}),
        (
            MEDMNIST,
            {
                "train": ("train_images", "train_labels"),
                "eval": ("val_images", "val_labels"),
                "test": ("test_images", "test_labels"),
            },
        ),
        (
            ("X_train", "Y_train", "X_valid", "Y_valid"),
            {"train": ("X_train", "Y_train"), "eval": ("X_valid", "Y_valid")},
        ),
        (("Xtrain", "ytrain", "Xtest", "ytest"), {"train": ("Xtrain", "ytrain"), "eval": ("Xtest", "ytest")}),
        (("trainX", "trainY", "devX", "devY"), {"train": ("trainX", "trainY"), "eval": ("devX", "devY")}),
        (("X", "y", "feature_names"), {"train": ("X", "y")}),
        (("data", "target", "images_mean"), {"train": ("data", "target")}),
        (("images", "labels", "x_test"), {"train": ("images", "labels")}),
        (("features_training", "targets_training"), {"train": ("features_training", "targets_training")}),
    ],
)
def test_known_names(names: tuple[str, ...], parts: dict[str, tuple[str, str]]) -> None:
    chosen = choose_arrays(names, None)
    assert chosen.parts == parts
    # What is called as ours is read as it ever was; of all else it is said what was taken for what.
    own = parts["train"] == ("inputs", "label")
    assert chosen.said == ("" if own else "; ".join(f"{part}: {a} and {b}" for part, (a, b) in parts.items()))


def test_names_that_are_given_come_first() -> None:
    given = ArrayNames(inputs="x_test", label="y_test", eval_inputs="x_train", eval_label="y_train")
    assert choose_arrays(KERAS, given).parts == {"train": ("x_test", "y_test"), "eval": ("x_train", "y_train")}
    given = ArrayNames(inputs="pixels", label="digit", test_inputs="p", test_label="d")
    assert choose_arrays(("pixels", "digit", "p", "d"), given).parts["test"] == ("p", "d")


@pytest.mark.parametrize(
    ("names", "given", "part"),
    [
        (("pixels", "digit"), None, "it has: digit, pixels; say which with data.columns={inputs: NAME, label: NAME}"),
        ((), None, "it has: none"),
        (("x_test", "y_test"), None, "nor names that are known"),
        (("x_train", "y_test"), None, "nor names that are known"),
        (("images", "data", "label"), None, "has data and images, which may both be inputs of train"),
        (("inputs", "label", "eval_inputs"), None, "has no array eval_label; it has: eval_inputs, inputs, label"),
        (KERAS, ArrayNames(inputs="x_trian", label="y_train"), "has no array x_trian; did you mean x_train?"),
        (KERAS, ArrayNames(inputs="x_train"), "has no array label; it has: x_train, y_train, x_test, y_test"),
        (KERAS, ArrayNames(inputs="x_train", label="digit"), "has no array digit; it has: x_train, y_train, x_test"),
        (tuple(f"block{n}" for n in range(500)), None, "and 480 more"),
    ],
)
def test_unknown_names_are_asked_about(names: tuple[str, ...], given: ArrayNames | None, part: str) -> None:
    with pytest.raises(ValueError, match="has ") as caught:
        choose_arrays(names, given)
    assert part in str(caught.value)


def test_inputs_go_with_a_label() -> None:
    with pytest.raises(ValueError, match="eval_label: a value is needed"):
        ArrayNames(inputs="a", label="b", eval_inputs="c")
    with pytest.raises(ValueError, match="test_inputs: a value is needed"):
        ArrayNames(inputs="a", label="b", test_label="c")
