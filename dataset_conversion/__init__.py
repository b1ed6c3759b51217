"""Converters of public data sets to nnU-Net's raw format: one file a data set, over the one writer (writer.py).

Each of the modules named here has `DESCRIPTION` (a line), `add_arguments(parser)` for its own options, and
`convert(source, dataset_id, *, name=..., processes=..., link=False, **own) -> Path`.
"""

# as in `confkd convert NAME`; the modules are imported when they are asked for
CONVERTERS = ("acdc", "brats", "la2018", "mmwhs", "mscmr", "msd", "promise12")
