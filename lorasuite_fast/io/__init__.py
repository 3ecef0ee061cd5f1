"""Files, folders and bytes: what reads and writes, and knows no model."""
