"""Studies: many runs of one recipe, with settings chosen by a search."""
