"""Data by name, as trials ask for it."""

from __future__ import annotations

import pytest
import torch

from evenorm.lab.data import Split, dataset, digits, split_of, wine
from evenorm.lab.trials import Trial, settings


def test_data_has_a_name_and_wine_a_split_for_each_seed() -> None:
    assert dataset("digits", 7) is digits()
    assert dataset("wine", 7) is wine(7)
    assert dataset("wine", 7) is not wine(8)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no data named 'digit'; choose from digits, "):
        dataset("digit")


def test_a_trial_that_names_no_data_is_on_its_experiments_own() -> None:
    plain = Trial("toy", 1, "a", 3, 0.1)
    assert split_of(plain, "digits") is digits()
    assert split_of(plain, "wine") is wine(3)
    named = Trial("toy", 1, "a", 3, 0.1, settings(data="wine"))
    assert split_of(named, "digits") is wine(3)
    assert named.digest() != plain.digest()


def test_standardised_columns_and_a_constant_one() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    split = Split(x, torch.zeros(2), x + 1, torch.zeros(2)).standardised()
    assert torch.equal(split.x_train, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    assert torch.equal(split.x_test, torch.tensor([[0.0, 1.0], [2.0, 1.0]]))


def test_badly_scaled_digits_are_digits_times_powers_of_ten() -> None:
    scaled, split = dataset("badly scaled digits"), dataset("digits")
    ratio = (scaled.x_train / split.x_train).nan_to_num(0.0).amax(0)
    assert torch.equal(scaled.y_test, split.y_test)
    assert ratio[ratio > 0].min() >= 0.01
    assert ratio.max() <= 100.0
    torch.testing.assert_close(scaled.x_test[:, ratio > 0], (split.x_test * ratio)[:, ratio > 0])
