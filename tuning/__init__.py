"""Search. Knows no federated learning: it is handed an objective."""
