"""The benchmark: correctness first, then time against torch.nn, interleaved in one run."""
