"""Diffusion guided by classifiers: FedLMG's losses and its sampling (arXiv 2311.08870, ICML 2025)."""
