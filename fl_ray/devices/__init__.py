"""Device fleets, the cost model (latency, energy) and the virtual clock.

The cost model and the default cell are the standard ones of Yang et al. (arXiv 1911.02417); they are our reconstruction
of what FIMI (arXiv 2310.13981) uses, whose body was not available to us.
"""
