"""Who gets how much synthetic data. numpy and scipy only."""
