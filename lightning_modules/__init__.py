"""LightningModules: classifiers and the diffusion model. Imports nothing else of this project."""
