"""Data: sources and formats, tokenizers, encoders, stores of rows, the order of rows, and the cache."""
