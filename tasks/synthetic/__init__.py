"""The papers' small tasks of memory: selective copying, induction heads, multi-query associative recall."""
