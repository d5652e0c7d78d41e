"""Warns where a second moment is so close to singular that what is solved with it means little."""

from __future__ import annotations

import warnings

from mechedit.errors import InputError
from mechedit.moments.second_moment import SecondMoment, singularity_warning
from mechedit.solve import factorize


def warn_if_singular(moment: SecondMoment) -> None:
    """Warn when a moment is singular or nearly so; its factor is not kept, which would take as much memory again."""
    try:
        condition = factorize(moment.matrix).condition
    except InputError:
        condition = float("inf")
    if text := singularity_warning(moment, condition):
        warnings.warn(text, stacklevel=3)
