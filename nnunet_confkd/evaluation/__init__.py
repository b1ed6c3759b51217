"""How good predictions are: metrics, comparison of models, calibration."""
