"""A page on what a trained model does."""
