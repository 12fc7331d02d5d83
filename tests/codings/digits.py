"""Digits of whole numbers in a base, taken off from the lowest on: for one number and for arrays."""

import numpy as np


def digits_of(level: int, timesteps: int, radix: int, signed: bool) -> list[int]:
    """Digits of a level below 2^T, the lowest first; the highest takes what remains."""
    digits = []
    while timesteps > radix.bit_length() - 1:
        digit = level % radix
        if signed and digit + level // radix % radix >= radix:
            digit -= radix
        digits.append(digit)
        level = (level - digit) // radix
        timesteps -= radix.bit_length() - 1
    return [*digits, level]


def nonzero_digits(
    level: np.ndarray, timesteps: np.ndarray, radix: int, signed: bool, always: np.ndarray
) -> np.ndarray:
    """Digits of levels below 2^T that are not zero, the last that is taken off among them if `always`.

    Signed: a digit with R or more in it and the next one is R less, which the next one makes up for.
    """
    bits = radix.bit_length() - 1
    number = -(-timesteps // bits)
    rest, count = level.copy(), np.zeros_like(level)
    for place in range(int(number.max())):
        digit, following = rest % radix, rest // radix % radix
        if signed:
            digit = np.where(digit + following >= radix, digit - radix, digit)
        digit = np.where(place < number - 1, digit, rest)
        rest = np.where(place < number, (rest - digit) // radix, rest)
        highest = place == number - 1
        rest = np.where(highest, 0, rest)
        count = count + np.where(highest & always, 1, (digit != 0) & (place < number))
    return count
