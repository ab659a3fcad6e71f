"""Speed as a ratio: the engine against a bare PyTorch loop and Flower's own simulator, interleaved in one run."""
