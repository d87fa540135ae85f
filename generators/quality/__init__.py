"""How good synthetic images are: one measure, or family of measures, per file.

Feature measures (``frechet``, ``kernel``, ``manifold``) take feature vectors, float [N, D], of an extractor
(``classifier``, ``inception``); the others take images, uint8 [N, C, H, W]. Values are comparable only where the
extractor, the real images and the counts are the same.
"""
