"""The questions of the laboratory put to data that a user brings."""
