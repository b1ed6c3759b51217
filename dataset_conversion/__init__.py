"""Converters of public data sets to nnU-Net's raw format."""
