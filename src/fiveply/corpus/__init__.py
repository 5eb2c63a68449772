"""Text to rows: `documents` reads sources, `tokenise` and `prepare` make memory-mapped tokens, `batches` draws rows."""
