"""``python -m semanticblur_core``: the same as ``semanticblur-core``."""

from semanticblur_core.cli import main

if __name__ == "__main__":
    main()
