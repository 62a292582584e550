"""The doctor: why is a network good in train() and bad in eval()? Checks, the diagnosis as data, its renderings."""
