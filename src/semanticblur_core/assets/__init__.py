"""Files of weights that ship with the package."""
