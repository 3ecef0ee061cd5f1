"""The verbs: each checks what it is given, computes, and writes once."""
