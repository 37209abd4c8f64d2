"""From documents to rows of token ids: sources and formats, the tokenizer, the token store, and their cache."""
