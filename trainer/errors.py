"""Errors of a training run that the settings could not have foretold."""

from weightcast.sync.errors import WeightcastError


class DivergedError(WeightcastError, ArithmeticError):
    """A loss or gradient is NaN or infinite; raised on every rank. Checkpoints of earlier steps are as they were."""
