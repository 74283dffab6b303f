"""Published results on the field's four test sets.

The eleven methods and SemanticBlur's own row are quoted from Table 4 of the SemanticBlur paper;
D-DFFNet's row, which that table leaves out, from its authors. Each row is MAE, F-beta, IoU for each
data set, None where none was published. Papers differ in protocol, so a quoted IoU in particular
need not be what this package would measure on the same maps.
"""

from __future__ import annotations

DATA_SETS = ("cuhk", "dut", "ctcug", "ebd")

Row = tuple[float, float, float] | None

TABLE_4: dict[str, tuple[Row, Row, Row, Row]] = {
    "DBDF": (
        (0.292, 0.806, 0.549),
        (0.384, 0.754, 0.519),
        (0.360, 0.668, 0.438),
        (0.389, 0.603, 0.435),
    ),
    "LBP": (
        (0.154, 0.917, 0.755),
        (0.199, 0.873, 0.783),
        (0.291, 0.732, 0.638),
        (0.334, 0.705, 0.611),
    ),
    "HiFST": (
        (0.223, 0.803, 0.743),
        (0.313, 0.839, 0.640),
        (0.274, 0.775, 0.618),
        (0.376, 0.603, 0.498),
    ),
    "BTBNet": ((0.110, 0.949, 0.914), (0.196, 0.861, 0.803), (0.177, 0.809, 0.762), None),
    "BTBNet2": ((0.085, 0.935, 0.908), (0.145, 0.873, 0.837), None, None),
    "CENet": (
        (0.061, 0.945, 0.932),
        (0.141, 0.869, 0.833),
        (0.117, 0.845, 0.820),
        (0.072, 0.810, 0.899),
    ),
    "BR2Net": (
        (0.059, 0.966, 0.927),
        (0.083, 0.943, 0.893),
        (0.140, 0.834, 0.788),
        (0.087, 0.813, 0.880),
    ),
    "DD": (
        (0.045, 0.966, 0.941),
        (0.074, 0.935, 0.903),
        (0.155, 0.797, 0.775),
        (0.118, 0.812, 0.842),
    ),
    "DefuNet": (None, (0.085, 0.952, 0.889), (0.132, 0.828, 0.798), None),
    "IS2CNet": (
        (0.049, 0.964, 0.937),
        (0.142, 0.868, 0.831),
        (0.112, 0.858, 0.826),
        (0.070, 0.809, 0.901),
    ),
    "DFFNet": (
        (0.039, 0.971, 0.947),
        (0.072, 0.938, 0.903),
        (0.082, 0.879, 0.868),
        (0.091, 0.823, 0.872),
    ),
    "SemanticBlur (paper)": (
        (0.039, 0.969, 0.951),
        (0.067, 0.942, 0.909),
        (0.086, 0.887, 0.894),
        (0.084, 0.835, 0.886),
    ),
    "D-DFFNet": (
        (0.036, 0.973, 0.951),
        (0.070, 0.939, 0.906),
        (0.074, 0.892, 0.878),
        (0.084, 0.826, 0.882),
    ),
}


def rows(data_set: str) -> list[tuple[str, Row]]:
    """Name and MAE, F-beta, IoU of every published method on a data set, in the table's order."""
    index = DATA_SETS.index(data_set)
    return [(name, values[index]) for name, values in TABLE_4.items()]
