"""Commands whose work imports torch: their parsers, so that their help appears at once."""
