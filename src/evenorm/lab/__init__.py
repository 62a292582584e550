"""The laboratory: each claim made for batch norm, measured on real data."""
