"""Reference text, samples, and how two tokenizers cut the same text."""
