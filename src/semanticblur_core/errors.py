"""Errors whose message is for the person: which file or setting, what is wrong, what would do."""

import logging
import warnings


class SemanticBlurError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line."""


class ConfigError(SemanticBlurError):
    """A setting is unknown or out of range."""


class ImageError(SemanticBlurError):
    """An image cannot be read, written or analysed."""


class WeightsError(SemanticBlurError):
    """A file of weights is missing, damaged or of another kind."""


class DataError(SemanticBlurError):
    """A folder of images and masks is incomplete or inconsistent."""


class TrainingError(SemanticBlurError):
    """A training run cannot go on."""


def quieten_readers() -> None:
    """Let the libraries that read images log nothing in this process beside what they raise.

    For programs, which tell of that in a line of their own; the library leaves it as it is.
    """
    for library in ("tifffile", "PIL"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
        # Of headers that make no sense, such as tiles without rows, which they refuse then.
        warnings.filterwarnings("ignore", module=rf"{library}\b")
